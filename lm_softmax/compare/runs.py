"""What is known of the runs in a folder, from the files that they keep."""

import csv
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

SUMMARY, METRICS, CONFIG = "summary.json", "metrics.csv", "config.yaml"
TIME, STEP_TIME = "perf/train_time_s", "perf/step_time_ms"
SPEED = "perf/tokens_per_s"


@dataclass
class Run:
    """What is known of a run; None is unknown. Perplexity and its like are of the best validation.

    Attributes:
        status: "finished", "interrupted", "failed", or "unfinished" without a closed summary.
        step_ms: Median time of an optimizer step.
        memory: GiB and where: "GPU", or "host" where there was no GPU.
        time_s: Seconds of training.
        curve: (seconds of training, val/ppl, val/bits_per_byte) of each validation.
        comparable: Whether its perplexity compares with those of most other runs; None is unknown.
    """

    name: str
    status: str = "unfinished"
    head: str | None = None
    vocab_size: int | None = None
    fingerprint: str | None = None
    num_parameters: int | None = None
    best: dict[str, float] = field(default_factory=dict)
    step_ms: float | None = None
    tokens_per_s: float | None = None
    memory: tuple[float, str] | None = None
    time_s: float | None = None
    curve: list[tuple[float, float, float]] = field(default_factory=list)
    comparable: bool | None = True

    @property
    def label(self) -> str:
        """Name with what a reader has to know of the run."""
        status = "" if self.status == "finished" else f" ({self.status})"
        return self.name + status + {True: "", False: " *", None: " ?"}[self.comparable]


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads the runs in folders, those with a `summary.json` or a `metrics.csv`.

    What holds no more than an evaluation is no run. A run that cannot be read is left out, with a
    line on stderr.

    Returns:
        The runs by perplexity, those of another vocabulary than most at the end.

    Raises:
        ValueError: If a folder does not exist, or there is no run that can be read.
    """
    runs: dict[Path, Run] = {}
    unread: dict[Path, str] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        for path in sorted(Path(root) for root, _, _ in os.walk(folder)):
            inside = len(folders) == 1 and path != folder
            name = str(path.relative_to(folder) if inside else path)
            try:
                if _is_run(path):
                    runs.setdefault(path.resolve(), read_run(path, name))
            except (ValueError, OSError) as error:
                unread[path.resolve()] = " ".join(str(error).split())
    if not runs:
        places = ", ".join(map(str, folders))
        nothing = f"no run below {places}: none holds a {SUMMARY} or a {METRICS}"
        raise ValueError("; ".join(unread.values()) or nothing)
    for message in unread.values():
        sys.stderr.write(f"left out: {message}\n")
    known = Counter(run.fingerprint for run in runs.values() if run.fingerprint)
    for run in runs.values():
        if run.fingerprint is None:
            run.comparable = None
        else:
            run.comparable = run.fingerprint == known.most_common(1)[0][0]
    return sorted(runs.values(), key=_rank)


def read_run(path: Path, name: str) -> Run:
    """Reads a run's folder.

    Raises:
        ValueError: If a file in it cannot be read.
    """
    run = Run(name)
    rows = _read_metrics(path / METRICS) if (path / METRICS).is_file() else []
    if (path / SUMMARY).is_file():
        _fill_from_summary(run, path / SUMMARY)
    else:
        _fill_from_metrics(run, rows)
        if (path / CONFIG).is_file():
            run.head = _read_head(path / CONFIG)
    validations = [row for row in rows if TIME in row and "val/ppl" in row]
    run.curve = sorted(
        (row[TIME], row["val/ppl"], row.get("val/bits_per_byte", math.nan)) for row in validations
    )
    return run


def _is_run(path: Path) -> bool:
    if (path / SUMMARY).is_file() or not (path / METRICS).is_file():
        return (path / SUMMARY).is_file()
    rows = _read_metrics(path / METRICS)
    trained = any(name == TIME or name.startswith("train/") for row in rows for name in row)
    return trained or not (path / CONFIG).is_file()  # a config without training: an evaluation


def _rank(run: Run) -> tuple[bool, float, str]:
    perplexity = run.best.get("val/ppl", math.inf)
    return (run.comparable is False, math.inf if math.isnan(perplexity) else perplexity, run.name)


def _fill_from_summary(run: Run, path: Path) -> None:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        status = str(summary["status"])
        run.status = "unfinished" if status == "running" else status
        run.head, run.vocab_size = str(summary["head"]), int(summary["vocab_size"])
        run.fingerprint = summary["vocab_fingerprint"] and str(summary["vocab_fingerprint"])
        run.num_parameters = int(summary["num_parameters"]["total"])
        run.best = _numbers(summary["best"])
        perf = _numbers(summary.get("perf", {}))
        run.step_ms, run.tokens_per_s = perf.get(STEP_TIME), perf.get(SPEED)
        run.memory = _peak_memory(_numbers(summary.get("mem", {})))
        run.time_s = float(summary.get("train_time_s", summary["wall_time_s"]))
    except KeyError as error:
        raise ValueError(f"{path}: not the summary of a run, {error} is missing") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the summary of a run, {error}") from None


def _fill_from_metrics(run: Run, rows: Sequence[dict[str, float]]) -> None:
    columns: dict[str, list[float]] = {}
    for row in rows:
        for column, value in row.items():
            columns.setdefault(column, []).append(value)
    validations = [row for row in rows if not math.isnan(row.get("val/ppl", math.nan))]
    run.best = min(validations, key=lambda row: row["val/ppl"], default={})
    run.step_ms, run.tokens_per_s = (
        median(columns[name]) if name in columns else None for name in (STEP_TIME, SPEED)
    )
    run.memory = _peak_memory({name: max(values) for name, values in columns.items()})
    run.time_s = max(columns.get(TIME, []), default=None)


def _read_metrics(path: Path) -> list[dict[str, float]]:
    """The filled cells of each row."""
    rows: list[dict[str, float]] = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if "step" not in (reader.fieldnames or ()):
                raise ValueError("it has no column step")
            for cells in reader:
                rows.append({})
                for name, cell in cells.items():
                    if name is None:
                        raise ValueError(f"line {reader.line_num} has more cells than the header")
                    if cell:
                        rows[-1][name] = _number(cell, f"line {reader.line_num}, {name}")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: not the metrics of a run, {error}") from None
    return rows


def _number(cell: str, place: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{place}: {cell!r} is not a number") from None


def _read_head(path: Path) -> str | None:
    import yaml  # type: ignore[import-untyped]  # of the train extra, see __main__

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        head = config.get("fit", config)["model"]["head"]
        return str(head["class_path"]).rpartition(".")[2]
    except (KeyError, TypeError, AttributeError):
        return None  # a valid file that says nothing of a head
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML, {error}") from None


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _peak_memory(values: dict[str, float]) -> tuple[float, str] | None:
    for name, place in (("mem/peak_allocated_gib", "GPU"), ("mem/host_rss_gib", "host")):
        if name in values:
            return values[name], place
    return None
