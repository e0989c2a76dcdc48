"""`python -m lm_softmax.compare runs/`: a table and a plot of runs."""

from lm_softmax.compare.report import draw, main, table
from lm_softmax.compare.runs import Run, find_runs, read_run

__all__ = ["Run", "draw", "find_runs", "main", "read_run", "table"]
