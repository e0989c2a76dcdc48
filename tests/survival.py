"""Commands in processes of their own, which a signal hits at an event of one's choice.

An event is a hook of the trainer, or the moment before a file is opened to be written, renamed,
linked or removed. They come in the same order each time, so that their numbers name moments.
"""

import csv
import itertools
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MODULES = ["lm_softmax.cli", "lm_softmax.module", "tensorboard.backend", "survival"]
FILE_EVENTS = ("os.rename", "os.link", "os.remove")
DDP = ("--trainer.strategy=ddp",)
WRITES = os.O_WRONLY | os.O_RDWR
CORPUS_WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "to", "mat", "it", "then", ";", "."]

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(MODULES)


class Ended(NamedTuple):
    """How a process ended: its exit code (minus the signal), what it said, its events."""

    code: int
    out: str
    err: str
    events: list[str]

    @property
    def num_events(self):
        return len(self.events)


class _Events:
    """Counts events, and sends this process a signal at one of them."""

    def __init__(self, at: int, number: int, *, again: bool) -> None:
        from lightning.pytorch.trainer import call

        self.names, self._at, self._number, self._again = [], at, number, again
        self._pid, hooks = os.getpid(), call._call_callback_hooks

        def with_event(trainer, hook, *args, **kwargs):
            self.happen(hook)
            return hooks(trainer, hook, *args, **kwargs)

        call._call_callback_hooks = with_event
        sys.addaudithook(self._audit)

    def _audit(self, event, args):
        opened = event == "open" and isinstance(args[2], int) and args[2] & WRITES
        if (opened or event in FILE_EVENTS) and "runs" in str(args[0]):
            self.happen(f"{event} {os.path.basename(str(args[0]))}")

    def happen(self, name):
        if os.getpid() != self._pid:
            return
        self.names.append(name)
        if len(self.names) == self._at or (0 < self._at < len(self.names) and self._again):
            os.kill(self._pid, self._number)


def _child(args, folder, name, at, number, environment):
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from lm_softmax import cli

    multiprocessing.set_start_method("fork", force=True)  # not the way that this process came by
    os.chdir(folder)
    os.environ.update(environment)
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))
    for stream, suffix in ((1, "out"), (2, "err")):
        file = os.open(f"{name}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
    torch.set_num_threads(1)
    if limit := environment.get("LIMIT"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    if user := environment.get("USER_ID"):
        os.setuid(int(user))
    events = _Events(at, number, again="AGAIN" in environment)
    try:
        cli.main([str(arg) for arg in args])
    finally:
        sys.stdout.flush()
        if not limit and not user:
            Path(f"{name}.events").write_text("\n".join(events.names))


def begin(*args, folder, at=0, number=signal.SIGKILL, name="said", **environment):
    """A process that runs a command; signal `number` hits it at its event `at` (0: at none).

    Of its environment, LIMIT is the largest size of a file, USER_ID the user it becomes, and with
    AGAIN the signal comes at each later event too.
    """
    Path(folder, f"{name}.events").unlink(missing_ok=True)
    options = (args, str(folder), name, at, number, environment)
    process = server.Process(target=_child, args=options)
    process.start()
    return process


def end(process, *, folder, name="said", timeout=300):
    """Waits for the end of a process."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"it hangs: {Path(folder, f'{name}.err').read_text()}")
    events = Path(folder, f"{name}.events")
    said = [Path(folder, f"{name}.{suffix}").read_text() for suffix in ("out", "err")]
    names = events.read_text().splitlines() if events.is_file() else []
    return Ended(process.exitcode, *said, names)


def call(*args, folder, **options):
    """The command's end."""
    return end(begin(*args, folder=folder, **options), folder=folder)


def call_ranks(
    *args,
    folder,
    world_size,
    kill=(),
    number=signal.SIGKILL,
    strategy=DDP,
    timeout=300,
    **environment,
):
    """Several processes of one run; `kill` holds the event for each at which the signal comes.

    Where one is killed, the others are, as a launcher does it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"} | environment
    options = (*strategy, f"--trainer.devices={world_size}")
    processes = []
    for rank in range(world_size):
        own = {"at": kill[rank] if kill else 0, "number": number, "name": f"rank{rank}"}
        processes.append(
            begin(*args, *options, folder=folder, **own, **common, LOCAL_RANK=str(rank))
        )
    if kill and number == signal.SIGKILL:
        processes[0].join(300)
        for process in processes[1:]:
            process.kill()
    names = [f"rank{rank}" for rank in range(world_size)]
    try:
        return [
            end(p, folder=folder, name=name, timeout=timeout)
            for p, name in zip(processes, names, strict=True)
        ]
    finally:
        for process in processes:
            process.kill()


def write_corpus(folder):
    """A corpus of a few hundred words."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    for split, lines in (("train", 40), ("validation", 12), ("test", 9)):
        picks = torch.randint(len(CORPUS_WORDS), (lines, 7), generator=generator).tolist()
        text = "\n".join(" ".join(CORPUS_WORDS[i] for i in line) for line in picks)
        (folder / f"{split}.txt").write_text(f"{text}\n")


def write_numbered_corpus(folder, num_files):
    """A corpus whose words are all different, so that what is repeated or left out shows."""
    folder.mkdir(parents=True)
    words = (f"w{number}" for number in itertools.count())
    for split, number in (("train", num_files), ("validation", 1), ("test", 1)):
        for file in range(number):
            lines = [" ".join(itertools.islice(words, 1 + line % 7)) for line in range(19 + file)]
            (folder / f"{split}-{file}.txt").write_text("\n".join(lines) + "\n")
    return [*itertools.chain(*(_words(folder / f"train-{n}.txt") for n in range(num_files)))]


def _words(file):
    return [w for line in file.read_text().splitlines() for w in (*line.split(), "<eos>")]


class SeenText(pl.Callback):
    """Writes down the words of the targets of each training batch, `seen-<rank>.jsonl`."""

    def on_train_start(self, trainer, pl_module):
        file = Path(trainer.default_root_dir, f"seen-{trainer.global_rank}.jsonl")
        self._file = file.open("a", buffering=1)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        words = [pl_module.vocab.tokens[i] for i in batch.target.flatten().tolist() if i != -100]
        place = trainer.current_epoch, batch_idx
        self._file.write(json.dumps([place, words]) + "\n")


def seen(run, rank=0):
    """The words of each `(epoch, batch)`; of a batch that came again after a kill, those."""
    lines = map(json.loads, (run / f"seen-{rank}.jsonl").read_text().splitlines())
    return {tuple(place): words for place, words in lines}


def write_config(folder, name, **changes):
    """A training whose every part has a state: 2 epochs of 10 batches, validated in the midst."""
    options = {
        "model.encoder": {
            "class_path": "LSTMEncoder",
            "init_args": {"embedding_size": 8, "hidden_size": 8, "output_dropout": 0.1},
        },
        "model.head": {"class_path": "SampledSoftmax", "init_args": {"num_samples": 5}},
        "model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "model.lr_scheduler": {"class_path": "WarmupDecay", "init_args": {"warmup": 3}},
        "data": {
            "path": str(folder / "corpus"),
            "batch_size": 4,
            "eval_batch_size": 2,
            "block_size": 8,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "log_every_n_steps": 3,
            "accumulate_grad_batches": 2,
            "val_check_interval": 5,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "trainer.callbacks+": [
            {"class_path": "BetweenSteps", "init_args": {"every_n_steps": 2}},
            {"class_path": "EarlyStopping", "init_args": {"monitor": "val/ppl", "patience": 9}},
        ],
    }
    nested: dict = {}
    for key, value in (options | changes).items():
        *path, last = key.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = {**place.get(last, {}), **value} if isinstance(value, dict) else value
    (folder / name).write_text(yaml.safe_dump(nested))


def table(run):
    """The rows of metrics.csv."""
    with (run / "metrics.csv").open() as file:
        return [*csv.DictReader(file)]


def rows(run):
    """What metrics.csv has, without times and memory."""
    kept = [
        {k: v for k, v in row.items() if v and not k.startswith(("perf/", "mem/"))}
        for row in table(run)
    ]
    return [row for row in kept if set(row) - {"step", "epoch"}]


def scalars(run):
    """What TensorBoard shows, without times and memory: (step, value) of each tag."""
    board = EventAccumulator(str(run)).Reload()
    tags = [t for t in board.Tags()["scalars"] if not t.startswith(("perf/", "mem/", "final/"))]
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags}


def state(run, name="last"):
    """What a checkpoint holds, but times and the names of files."""
    content = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    del content["hyper_parameters"]["requested"]  # a resumed run asks for what was chosen before
    content["datamodule_hyper_parameters"].pop("vocab_path")  # the checkpoint gone on from
    for name in [*content["callback_metrics"]]:
        if name.startswith(("perf/", "mem/")):
            del content["callback_metrics"][name]
    for key, callback in content["callbacks"].items():
        if key.startswith(("StepTimeMonitor", "RunSummary", "ModelCheckpoint", "LastCheckpoint")):
            for part in [*callback]:
                if part in ("best", "last"):
                    callback[part].pop("perf/train_time_s", None)
                elif not isinstance(callback[part], torch.Tensor | int):
                    callback.pop(part)
            callback.pop("current_score", None)  # Lightning writes it, and never reads it
    return content


def differences(one, other, path=""):
    """Places where two nested states are not the same, bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
        return [] if same else [path]
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{path}.{key}" for key in one.keys() ^ other.keys()]
        for key in one.keys() & other.keys():
            found += differences(one[key], other[key], f"{path}.{key}")
        return found
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [path]
        pairs = enumerate(zip(one, other, strict=True))
        return [place for i, (a, b) in pairs for place in differences(a, b, f"{path}[{i}]")]
    nan = isinstance(one, float) and isinstance(other, float) and one != one and other != other
    return [] if nan or one == other else [path]


def assert_same_run(run, whole):
    """Weights, optimizer, generators, logs and events are those of an undisturbed run."""
    assert differences(state(run), state(whole)) == []
    best = [state(each, "best")["state_dict"] for each in (run, whole)]
    assert differences(*best) == []
    assert rows(run) == rows(whole)
    assert scalars(run) == scalars(whole)
