"""The one folder of a run: its name, its loggers, and what is left of it when nothing was run."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lm_softmax.callbacks.run_summary import FILE_NAME
from lm_softmax.cli.checkpoint_io import FOLDER, LAST
from lm_softmax.cli.metrics_table import TableLogger

FOLDER_OF_RUN = "LM_SOFTMAX_RUN_FOLDER"


class RunFolder:
    """Where a run keeps TensorBoard events, metrics.csv, config.yaml, checkpoints and a summary.

    Args:
        path: The folder.
        resumes: Whether the run goes on in a folder that exists.
        numbered: Whether to append -2, -3, ... to the name of a folder that exists.

    Attributes:
        path: The folder, which exists from now on; other processes of the run take it from the
            first one's environment.

    Raises:
        ValueError: If the folder exists and the run does not go on from one of its checkpoints.
    """

    def __init__(self, path: Path, *, resumes: bool = False, numbered: bool = False) -> None:
        self.path, self._made = path, list[Path]()
        if getattr(rank_zero_only, "rank", 0) != 0:
            self.path = Path(os.environ.get(FOLDER_OF_RUN, path)) if numbered else path
            return
        if not resumes:
            self._reserve(numbered)
        os.environ[FOLDER_OF_RUN] = str(self.path)

    def _reserve(self, numbered: bool) -> None:
        """Makes the folder, which of several processes at once only one can."""
        path, number = self.path, 1
        while True:
            missing = [folder for folder in (path, *path.parents) if not folder.exists()]
            try:
                path.mkdir(parents=True)
            except FileExistsError as error:
                if not numbered:
                    raise ValueError(
                        f"run folder {path} exists: give another --run, "
                        f"or go on with --run {path} --ckpt_path last"
                    ) from error
                number += 1
                path = self.path.with_name(f"{self.path.name}-{number}")
            else:
                self.path, self._made = path, missing
                return

    @staticmethod
    def name(configs: Sequence[str], head: str) -> Path:
        """The default: `runs/<first configuration>-<head>-<time>`."""
        words = [Path(config).stem for config in configs[:1]] or ["run"]
        words.append(re.sub(r"(?<=[a-z])(?=[A-Z])", "-", head).lower())
        return Path("runs", "-".join([*words, datetime.now().strftime("%Y%m%d-%H%M%S")]))

    def last_words(self) -> str:
        """What an interrupted run can go on from."""
        last = self.path / FOLDER / LAST
        if not last.is_file():
            return "interrupted before the first checkpoint"
        return f"interrupted; {last} goes on with: fit --run {self.path} --ckpt_path last"

    def is_closed(self, step: int) -> bool:
        """Whether the summary is that of a run which came to its end, after so many steps."""
        try:
            summary = json.loads((self.path / FILE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        ended = {"status": "finished", "steps": step}
        return isinstance(summary, dict) and ended.items() <= summary.items()

    def loggers(self, step: int = 0) -> list[Logger]:
        """TensorBoard and CSV side by side in the folder; on a resumed run from `step` on."""
        from lm_softmax.cli.event_logger import EventLogger  # a tenth of a second, for a run alone

        return [EventLogger(self.path, step), TableLogger(self.path)]

    @rank_zero_only
    def keep_rows(self, loggers: list[Logger], num_rows: int | None, step: int) -> None:
        """Go back to the rows of metrics.csv that a checkpoint knows of.

        Args:
            loggers: Those of the run.
            num_rows: How many there were; None for those before `step`.
            step: Where TensorBoard's events begin again; what was logged there before the
                checkpoint is given to it once more.
        """
        table = next((each for each in loggers if isinstance(each, TableLogger)), None)
        if table is None:
            return
        rows = table.experiment.rows()
        if num_rows is None:
            kept = [row for row in rows if int(row["step"]) < step]
        else:
            kept = rows[:num_rows]
        table.experiment.keep(kept)
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                for row in kept:
                    values = {n: float(v) for n, v in row.items() if v and n != "step"}
                    if int(row["step"]) >= step:
                        logger.log_metrics(values, int(row["step"]))

    @rank_zero_only
    def remove(self, *, only_empty: bool = False) -> None:
        """Take back the folder and those above it, as far as this run made them."""
        for folder in self._made:
            if folder == self.path and not only_empty:
                shutil.rmtree(folder, ignore_errors=True)
            elif folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
