"""TensorBoard's events of a run, in a file that is made when the first one is written."""

from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter


class EventLogger(TensorBoardLogger):
    """Lightning's `TensorBoardLogger` that touches nothing before something is logged.

    Lightning opens a logger, and has it save, before a training is known to start: on a run that
    was to go on the file would hide the events from the resumed step on. The options of a run are
    in its config.yaml, so that there is no hparams.yaml.

    Args:
        folder: Where the events are.
        step: The one that a run goes on from; what is there from it on is hidden.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        super().__init__(folder, name="", version="", default_hp_metric=False)
        self._step = step

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The writer."""
        if self._experiment is None:
            self._experiment = _LateWriter(self.log_dir, purge_step=self._step or None)
        return self._experiment

    def save(self) -> None:
        """Forces what was logged to the disk."""
        if self._experiment is not None:
            self._experiment.flush()


class _LateWriter(SummaryWriter):
    """Opens its file with the first event, where torch's does at once."""

    _made = False

    def __init__(self, log_dir: str, *, purge_step: int | None) -> None:
        super().__init__(log_dir, purge_step=purge_step)
        self._made = True

    def _get_file_writer(self) -> FileWriter | None:
        return super()._get_file_writer() if self._made else None  # type: ignore[no-untyped-call]
