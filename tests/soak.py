"""A training that is killed again and again ends as one that nothing disturbed.

    python tests/soak.py --minutes 30                  # configs/quickstart.yaml
    python tests/soak.py --steps 60 --kill-after 1 4 --config FILE

Trains once undisturbed, then once with SIGKILL at random moments and a restart after each, and
compares: weights, optimizer, schedule, generators, positions, metrics.csv and TensorBoard, bit for
bit. Memory is looked at in both. The last line is "same" or what differs.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import survival
import yaml

ROOT = Path(__file__).resolve().parent.parent
GROWTH_MIB = 48  # that the second half of a run may take beyond the first


class Life(NamedTuple):
    """One process: how it ended, how long it trained, and its most memory."""

    code: int
    seconds: float
    peak_mib: float


def live(command, run, lasts, log):
    """Runs a command, killed `lasts` seconds after it began to train (None: to its end)."""
    metrics, before = run / "metrics.csv", _changed(run / "metrics.csv")
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    trains_since, peak = None, 0.0
    while process.poll() is None:
        time.sleep(0.05)
        peak = max(peak, _memory_mib(process.pid))
        if trains_since is None and _changed(metrics) != before:
            trains_since = time.monotonic()
        if lasts is not None and trains_since and time.monotonic() - trains_since > lasts:
            process.kill()
            process.wait()
    return Life(process.returncode, time.monotonic() - (trains_since or time.monotonic()), peak)


def _changed(file):
    return file.stat().st_mtime_ns if file.is_file() else 0


def _memory_mib(pid):
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth_mib(run):
    """How much more memory the last quarter of a run's process took than its second one."""
    values = [
        1024 * float(row["mem/host_rss_gib"])
        for row in survival.table(run)
        if row.get("mem/host_rss_gib")
    ]
    quarter = len(values) // 4
    return median(values[-quarter:]) - median(values[quarter : 2 * quarter]) if quarter else 0.0


def disturbed(begin, go_on, run, kill_after, draw, log):
    """The lives of a run that is killed until it comes to its end."""
    lives = []
    while not lives or lives[-1].code != 0:
        if (run / "checkpoints" / "last.ckpt").is_file():
            command = go_on
        else:
            shutil.rmtree(run, ignore_errors=True)  # killed before the first checkpoint
            command = begin
        lives.append(live(command, run, draw.uniform(*kill_after), log))
        print(f"life {len(lives)}: {lives[-1]}", flush=True)  # noqa: T201
        if lives[-1].code not in (0, -9):
            raise SystemExit(f"exit code {lives[-1].code}: see {log.name}")
    return lives


def soak(config, folder, *, steps, kill_after, every_n_steps, seed=0):
    """Both runs; their lives and what differs."""
    overlay = folder / "soak.yaml"
    callback = {"class_path": "BetweenSteps", "init_args": {"every_n_steps": every_n_steps}}
    trainer = {
        "max_epochs": -1,
        "max_steps": steps,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "callbacks+": [callback],
    }
    overlay.write_text(yaml.safe_dump({"trainer": trainer}))

    def fit(run, *words):
        return [sys.executable, str(ROOT / "train.py"), "fit", "--run", str(run), *map(str, words)]

    whole, killed = folder / "whole", folder / "killed"
    configs = ("-c", config, "-c", overlay)
    with (folder / "log").open("w") as log:
        undisturbed = live(fit(whole, *configs), whole, None, log)
        if undisturbed.code:
            raise SystemExit(f"exit code {undisturbed.code}: see {log.name}")
        print(f"undisturbed: {undisturbed}", flush=True)  # noqa: T201
        go_on = fit(killed, "--ckpt_path", "last")
        lives = disturbed(
            fit(killed, *configs), go_on, killed, kill_after, random.Random(seed), log
        )
    return undisturbed, lives, faults(killed, whole, lives, undisturbed)


def faults(killed, whole, lives, undisturbed):
    """What differs between the two runs, and memory that grew."""
    found = [
        f"last{p}" for p in survival.differences(survival.state(killed), survival.state(whole))
    ]
    best = [survival.state(run, "best")["state_dict"] for run in (killed, whole)]
    found += [f"best{place}" for place in survival.differences(*best)]
    found += ["metrics.csv"] * (survival.rows(killed) != survival.rows(whole))
    found += ["TensorBoard"] * (survival.scalars(killed) != survival.scalars(whole))
    grown = growth_mib(whole)
    found += [f"memory grew by {grown:.0f} MiB"] * (grown > GROWTH_MIB)
    most = max(life.peak_mib for life in lives) - undisturbed.peak_mib
    found += [f"a life took {most:.0f} MiB more"] * (most > 4 * GROWTH_MIB)
    return found


def rate(config, folder):
    """Steps a second of an undisturbed training."""
    steps = 150
    words = ["--trainer.max_steps", steps, "--trainer.max_epochs", -1, "--trainer.accelerator"]
    command = [sys.executable, ROOT / "train.py", "fit", "-c", config, "--run", folder / "rate"]
    overlay = ["--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"]
    with (folder / "log").open("w") as log:
        command = [str(word) for word in [*command, *words, "cpu", *overlay]]
        life = live(command, folder / "rate", None, log)
    if life.code:
        raise SystemExit(f"exit code {life.code}: see {folder / 'log'}")
    return steps / life.seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of the run that is killed")
    parser.add_argument("--steps", type=int, help="of each run, instead of --minutes")
    parser.add_argument("--kill-after", type=float, nargs=2, default=(20.0, 60.0), metavar="S")
    parser.add_argument("--every-n-steps", type=int, default=25, help="between checkpoints")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    steps = options.steps or int(60 * options.minutes * rate(options.config, folder))
    print(f"{steps} steps in {folder}", flush=True)  # noqa: T201
    begin = time.monotonic()
    _, lives, found = soak(
        options.config,
        folder,
        steps=steps,
        kill_after=options.kill_after,
        every_n_steps=options.every_n_steps,
        seed=options.seed,
    )
    minutes = (time.monotonic() - begin) / 60
    print(  # noqa: T201
        f"{len(lives) - 1} kills survived, {steps} steps, {minutes:.1f} minutes for both runs,"
        f" memory grew by {growth_mib(folder / 'whole'):.0f} MiB in the undisturbed one, most of a"
        f" life {max(life.peak_mib for life in lives):.0f} MiB"
    )
    print("; ".join(found) or "same")  # noqa: T201
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
