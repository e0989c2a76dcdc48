"""`python -m lm_softmax.compare`."""

import sys

from lm_softmax.compare import main

try:
    import matplotlib.figure  # noqa: F401
    import yaml  # type: ignore[import-untyped]  # noqa: F401
except ImportError as error:
    sys.stderr.write(f'error: {error}: pip install "lm_softmax[train]"\n')
    sys.exit(2)
sys.exit(main())
