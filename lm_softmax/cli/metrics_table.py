"""metrics.csv: a table that a kill at any moment leaves whole, and a resumed run goes on with."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class TableLogger(CSVLogger):
    """Lightning's `CSVLogger` that begins with the rows that are there.

    Args:
        folder: Where metrics.csv is.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> "Table":
        """The table."""
        if self._experiment is None:
            self._experiment = Table(self.log_dir)
        return self._experiment  # type: ignore[return-value]


class Table(ExperimentWriter):
    """Rows are appended; a new column has the whole written beside it and renamed.

    Args:
        log_dir: Folder of the file.

    Attributes:
        num_rows: Rows of the file that are whole.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir=log_dir)
        self._file = Path(self.metrics_file_path)
        rows = self.rows()
        self.num_rows = len(rows)
        if rows:
            self.metrics_keys = sorted(rows[0])

    def rows(self) -> list[dict[str, str]]:
        """The rows of the file, without one that a kill cut off."""
        if not self._file.is_file():
            return []
        lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
        table = csv.DictReader(line for line in lines if line.endswith("\n"))
        return [row for row in table if None not in row and (row.get("step") or "").isdecimal()]

    def keep(self, rows: Sequence[dict[str, str]]) -> None:
        """Replaces the rows of the file."""
        self.num_rows = len(rows)
        if rows or self._file.is_file():
            self._replace(self.metrics_keys, rows)

    def save(self) -> None:
        """Appends the rows that were logged.

        Raises:
            ValueError: If the disk refuses.
        """
        if not self.metrics:
            return
        try:
            if self._record_new_keys():
                self._replace(self.metrics_keys, self.rows())
            with self._file.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.metrics_keys).writerows(self.metrics)
        except OSError as error:
            raise ValueError(f"cannot write {self._file}: {error.strerror or error}") from error
        self.num_rows += len(self.metrics)
        self.metrics = []

    def _replace(self, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
        partial = self._file.with_suffix(".csv.partial")
        try:
            with partial.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
            partial.replace(self._file)
        finally:
            partial.unlink(missing_ok=True)

    def _check_log_dir_exists(self) -> None:
        """Lightning's would delete the file."""
