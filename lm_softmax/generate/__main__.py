"""`python -m lm_softmax.generate`."""

import sys

if __name__ == "__main__":
    try:
        from lm_softmax.generate import main
    except KeyboardInterrupt:  # the libraries take seconds
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "lm_softmax":
            raise
        sys.stderr.write(f'error: {error.name} is missing: pip install "lm_softmax[train]"\n')
        sys.exit(2)
    sys.exit(main())
