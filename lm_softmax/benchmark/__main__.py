"""`python -m lm_softmax.benchmark`."""

import sys

from lm_softmax.benchmark import main

if __name__ == "__main__":  # processes that measure memory import this file too
    try:
        import lightning  # noqa: F401
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        sys.stderr.write(f'error: {error}: pip install "lm_softmax[train]"\n')
        sys.exit(2)
    sys.exit(main())
