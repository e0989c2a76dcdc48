"""`python -m lm_softmax.compare`."""

import sys

from lm_softmax.compare import main

sys.exit(main())
