"""Train, validate, test or predict; without arguments, train on what every machine has.

python train.py fit -c configs/quickstart.yaml -c configs/head/full.yaml --trainer.max_steps 500
python train.py validate --ckpt_path runs/<run>/checkpoints/best.ckpt
"""

import sys
from pathlib import Path

QUICKSTART = Path(__file__).resolve().parent / "configs" / "quickstart.yaml"

if __name__ == "__main__":
    try:
        from lm_softmax.cli import main
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "lm_softmax":
            raise
        sys.stderr.write(f'error: {error.name} is missing: pip install "lm_softmax[train]"\n')
        sys.exit(2)
    main(sys.argv[1:] or ["fit", f"--config={QUICKSTART}"])
