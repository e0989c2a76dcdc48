"""The closing lines of a run."""

import shlex
import textwrap
from pathlib import Path
from typing import Any

WIDTH = 100
NUM_SAMPLE_LINES = 4


def closing_lines(summary: dict[str, Any]) -> list[str]:
    """Returns what a run closes with: its figures, some text, and where things are.

    Args:
        summary: What `RunSummary` keeps; nothing gives no lines.
    """
    if not summary:
        return []
    run_dir = Path(summary["run_dir"])
    lines = _validation_lines(summary.get("best", {}))
    if text := summary.get("sample_text"):
        wrapped = [part for line in text.splitlines() for part in textwrap.wrap(line, WIDTH - 4)]
        lines += ["generated text:", *(f"    {line}" for line in wrapped[:NUM_SAMPLE_LINES])]
    lines += [
        f"{name} checkpoint: {run_dir / path}" for name, path in summary["checkpoints"].items()
    ]
    return [*lines, f"TensorBoard: tensorboard --logdir {shlex.quote(str(run_dir))}"]


def _validation_lines(best: dict[str, float]) -> list[str]:
    if "val/ppl" not in best:
        return ["no validation has run"]
    perplexity = f"val/ppl {best['val/ppl']:.1f} (best, step {best['step']:,})"
    if "val/ppl_unigram" in best:
        perplexity += f", unigram model on the same split {best['val/ppl_unigram']:.1f}"
    others = [
        f"{name} {best[name]:.4f}" for name in ("val/unk_rate", "val/bits_per_byte") if name in best
    ]
    return [perplexity, *([", ".join(others)] if others else [])]
