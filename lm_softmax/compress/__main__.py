"""`python -m lm_softmax.compress`."""

import sys

try:
    import lightning.pytorch  # noqa: F401

    from lm_softmax.compress import main
except ImportError as error:
    sys.stderr.write(f'error: {error}: pip install "lm_softmax[train]"\n')
    sys.exit(2)
sys.exit(main())
