"""Runs that are killed, terminated, damaged or starved of disk, and what is left of them."""

import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import survival
import torch
from survival import assert_same_run, begin, call, call_ranks, end, rows

from lm_softmax.cli import checkpoint_io
from lm_softmax.cli.checkpoint_io import AtomicCheckpointIO
from lm_softmax.module import LanguageModel
from lm_softmax.vocab import Vocab, load_archive

KINDS = {
    "sampled": {},
    "quantized": {
        "model.head": {
            "class_path": "ProductQuantizedSoftmax",
            "init_args": {"num_codebooks": 2, "codebook_size": 4, "reassign_every": 3},
        },
        "data.batching": "blocks",
        "trainer.accumulate_grad_batches": 1,
        "trainer.val_check_interval": 4,
    },
}
RUN = Path("runs/whole")


@pytest.fixture(
    scope="module", params=["sampled", pytest.param("quantized", marks=pytest.mark.slow)]
)
def whole(request, tmp_path_factory):
    """The folder of a run that nothing disturbs, and its number of events."""
    folder = tmp_path_factory.mktemp(request.param)
    survival.write_corpus(folder / "corpus")
    survival.write_config(folder, "all.yaml", **KINDS[request.param])
    said = call("fit", "-c", "all.yaml", "--run", RUN, folder=folder)
    assert said.code == 0, said.err
    return folder, said.num_events


def go_on(folder, run, **options):
    """Begins a run, or goes on with it."""
    if (folder / run / "checkpoints" / "last.ckpt").is_file():
        return call("fit", "--run", run, "--ckpt_path", "last", folder=folder, **options)
    shutil.rmtree(folder / run, ignore_errors=True)
    return call("fit", "-c", "all.yaml", "--run", run, folder=folder, **options)


def test_killed_at_any_moment_a_run_ends_as_one_that_was_not(whole):
    folder, num_events = whole
    run, draw = Path("runs/killed"), random.Random(3)
    for _ in range(8):
        said = go_on(folder, run, at=draw.randint(1, num_events // 2))
        assert said.code in (0, -signal.SIGKILL), said.err
        if said.code == 0:
            break
    else:
        said = go_on(folder, run)
    assert said.code == 0, said.err
    assert_same_run(folder / run, folder / RUN)
    assert len(rows(folder / run)) > 10


def test_terminated_at_any_moment_a_run_goes_on(whole):
    """Between two steps there is a checkpoint, wherever the signal came; the exit code is 143."""
    folder, num_events = whole
    run, draw = Path("runs/terminated"), random.Random(5)
    at = [draw.randint(num_events // 4, num_events // 2) for _ in range(3)]
    codes = []
    for event in [*at, 0]:
        said = go_on(folder, run, at=event, number=signal.SIGTERM)
        codes.append(said.code)
        if said.code:
            assert said.err.splitlines()[-1] == (
                f"interrupted; {run}/checkpoints/last.ckpt goes on with: "
                f"fit --run {run} --ckpt_path last"
            )
    assert codes[0] == 143
    assert codes[-1] == 0, said.err
    assert_same_run(folder / run, folder / RUN)


EARLY_STOPPING = {
    "class_path": "EarlyStopping",
    "init_args": {"monitor": "val/ppl", "patience": 1},
}
ENDS = {
    "a number of steps": (
        {"trainer.max_epochs": -1, "trainer.max_steps": 7, "trainer.val_check_interval": 1.0},
        "has done 7 steps of trainer.max_steps=7 already: raise trainer.max_steps",
    ),
    "early stopping": (
        {"model.optimizer": {"init_args": {"lr": 1.0}}, "trainer.callbacks+": [EARLY_STOPPING]},
        "has done 5 steps, after which early stopping ended the run: "
        "leave EarlyStopping of val/ppl out",
    ),
}


@pytest.mark.parametrize("kind", ENDS)
def test_killed_after_its_last_checkpoint_a_run_is_completed(kind, tmp_path):
    """The metrics, the best checkpoint and the summary of its end are there; it trains no more."""
    changes, message = ENDS[kind]
    survival.write_corpus(tmp_path / "corpus")
    survival.write_config(tmp_path, "all.yaml", **{"trainer.max_epochs": 9} | changes)
    begun = ("fit", "-c", "all.yaml", "--run")
    whole = call(*begun, RUN, folder=tmp_path)
    assert whole.code == 0, whole.err
    run = Path("runs/killed")
    renamed = max(i for i, e in enumerate(whole.events) if e == "os.rename last.ckpt.partial")
    killed = call(*begun, run, folder=tmp_path, at=renamed + 3)  # the first that is not the save's
    assert killed.code == -signal.SIGKILL
    last = run / "checkpoints" / "last.ckpt"
    written = (tmp_path / last).read_bytes()
    assert _summary(tmp_path / run)["status"] == "running"
    said = go_on(tmp_path, run)
    assert (said.code, said.out.splitlines()[0]) == (
        0,
        f"nothing is left to do: {last} {message} to train on",
    )
    assert (tmp_path / last).read_bytes() == written
    assert_same_run(tmp_path / run, tmp_path / RUN)
    assert _summary(tmp_path / run) == _summary(tmp_path / RUN)
    before = {path: path.read_bytes() for path in (tmp_path / run).rglob("*") if path.is_file()}
    said = go_on(tmp_path, run)
    assert (said.code, said.out.count("\n")) == (0, 1)
    assert {p: p.read_bytes() for p in (tmp_path / run).rglob("*") if p.is_file()} == before


def _summary(run):
    """What the summary says, but times, memory and the name of the run."""
    summary = json.loads((run / "summary.json").read_text())
    for name in ("run_dir", "wall_time_s", "train_time_s"):
        assert summary.pop(name), name
    for name in ("best", "last"):
        assert summary[name].pop("perf/train_time_s") > 0
    return summary | {name: sorted(summary[name]) for name in ("perf", "mem")}


def test_what_is_done_at_the_end_of_an_epoch_is_not_lost(tmp_path):
    """Early stopping looks at the metrics of a validation that the checkpoint was written after."""
    survival.write_corpus(tmp_path / "corpus")
    survival.write_config(tmp_path, "all.yaml", **{"trainer.val_check_interval": 1.0})
    begun = ("fit", "-c", "all.yaml", "--run")
    whole = call(*begun, RUN, folder=tmp_path)
    assert whole.code == 0, whole.err
    run = Path("runs/killed")
    assert call(*begun, run, folder=tmp_path, at=whole.num_events // 2).code == -signal.SIGKILL
    loops = survival.state(tmp_path / run)["loops"]["fit_loop"]
    assert loops["epoch_loop.batch_progress"]["is_last_batch"]
    said = go_on(tmp_path, run)
    assert said.code == 0, said.err
    assert_same_run(tmp_path / run, tmp_path / RUN)


# One training is enough for what follows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    survival.write_corpus(folder / "corpus")
    survival.write_config(folder, "all.yaml")
    said = call("fit", "-c", "all.yaml", "--run", "runs/whole", folder=folder)
    assert said.code == 0, said.err
    return folder, said.num_events


def test_slurm_puts_a_run_back_in_the_queue(trained):
    """Lightning's plugin saves and calls scontrol; the same command then goes on."""
    folder, num_events = trained
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $* >> {folder}/scontrol.log\n")
    scontrol.chmod(0o755)
    slurm = {
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
        **{f"SLURM_{name}": "0" for name in ("PROCID", "LOCALID", "NODEID")},
        **{f"SLURM_{name}": "1" for name in ("NTASKS", "NNODES")},
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NAME": "a",
        "SLURM_NODELIST": "localhost",
    }
    command = ("fit", "-c", "all.yaml", "--run", "runs/requeued")
    signals = {"at": num_events // 2, "number": signal.SIGUSR1}
    first = begin(*command, folder=folder, **signals, **slurm)
    requeued = folder / "runs/requeued/hpc_ckpt_1.ckpt"
    # SLURM ends a job that is put back; here with the next event that comes after the checkpoint
    deadline = time.monotonic() + 120
    while first.is_alive() and time.monotonic() < deadline:
        if (folder / "scontrol.log").exists():
            break
        time.sleep(0.01)
    first.kill()
    end(first, folder=folder)
    assert (folder / "scontrol.log").read_text() == "requeue 17\n"
    assert requeued.is_file()
    again = call(*command, folder=folder, **slurm, SLURM_RESTART_COUNT="1")
    assert again.code == 0, again.err
    assert not requeued.exists()
    assert_same_run(folder / "runs/requeued", folder / RUN)


def test_two_processes_go_on_from_their_own_states(tmp_path):
    survival.write_corpus(tmp_path / "corpus")
    survival.write_config(tmp_path, "all.yaml")
    fit = ("fit", "-c", "all.yaml", "--run")
    whole = call_ranks(*fit, "runs/whole", folder=tmp_path, world_size=2)
    assert [said.code for said in whole] == [0, 0], whole[0].err + whole[1].err
    state = survival.state(tmp_path / RUN)
    first, second = state["moments"]
    assert not torch.equal(first["state"][1][0], second["state"][1][0])
    run, kill = "runs/stopped", (whole[0].num_events // 2, 0)
    said = call_ranks(*fit, run, folder=tmp_path, world_size=2, kill=kill)
    assert [each.code for each in said] == [-9, -9], said[0].err + said[1].err
    go_on = ("fit", "--run", run, "--ckpt_path", "last")
    resumed = call_ranks(*go_on, folder=tmp_path, world_size=2)
    assert [each.code for each in resumed] == [0, 0], resumed[0].err + resumed[1].err
    assert_same_run(tmp_path / run, tmp_path / RUN)


def moment(said, event, number=0):
    """The number of an event, of those with a name."""
    return [i for i, name in enumerate(said.events, start=1) if name == event][number]


def test_terminated_while_it_starts_or_saves(trained):
    """A signal that comes again and again does not keep the checkpoint from being written."""
    folder, _ = trained
    run, again = Path("runs/insisted"), {"number": signal.SIGTERM, "AGAIN": "1"}
    begun = ("fit", "-c", "all.yaml", "--run", run)
    whole = call(*begun[:-1], "runs/for-events", folder=folder)
    said = call(*begun, folder=folder, at=moment(whole, "on_sanity_check_start"), **again)
    assert (said.code, said.err) == (143, "interrupted before the first checkpoint\n")
    assert not (folder / run).exists()
    said = call(*begun, folder=folder, at=moment(whole, "on_before_backward", 6), **again)
    assert said.code == 143
    assert survival.state(folder / run)["global_step"] == 3
    assert go_on(folder, run).code == 0
    assert_same_run(folder / run, folder / RUN)


@pytest.mark.slow
def test_one_of_two_processes_is_terminated(tmp_path):
    """Both end after the same step, and neither waits for ever, wherever the signal comes."""
    survival.write_corpus(tmp_path / "corpus")
    survival.write_config(tmp_path, "all.yaml")
    fit = ("fit", "-c", "all.yaml", "--run")
    whole = call_ranks(*fit, RUN, folder=tmp_path, world_size=2)
    assert [said.code for said in whole] == [0, 0], whole[0].err + whole[1].err
    run = Path("runs/terminated")
    options = {"folder": tmp_path, "world_size": 2, "number": signal.SIGTERM, "timeout": 120}
    for rank, event, number, step in (
        (1, "on_sanity_check_start", 0, None),
        (0, "on_sanity_check_start", 0, None),
        (1, "on_train_start", 0, None),
        (1, "on_before_backward", 6, 3),
        (1, "on_validation_batch_start", 5, 2),
        (0, "open last.ckpt.partial", 1, 4),
    ):
        shutil.rmtree(tmp_path / run, ignore_errors=True)
        kill = [0, 0]
        kill[rank] = moment(whole[rank], event, number)
        again = {"AGAIN": "1"} if step else {}
        said = call_ranks(*fit, run, kill=kill, **options, **again)
        assert [each.code for each in said] == [143, 143], (event, said[0].err, said[1].err)
        if step is None:
            assert not (tmp_path / run).exists()
        else:
            assert survival.state(tmp_path / run)["global_step"] == step
    resumed = call_ranks("fit", "--run", run, "--ckpt_path", "last", folder=tmp_path, world_size=2)
    assert [each.code for each in resumed] == [0, 0], resumed[0].err + resumed[1].err
    assert_same_run(tmp_path / run, tmp_path / RUN)


def test_another_number_of_processes_takes_the_rest_of_the_text(trained, tmp_path):
    folder, num_events = trained
    run = Path("runs/fewer")
    said = go_on(folder, run, at=num_events // 3, number=signal.SIGTERM)
    assert said.code == 143
    given = survival.state(folder / run)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert 0 < given[0]["given"] < given[0]["length"]
    words = ("fit", "--run", run, "--ckpt_path", "last")
    resumed = call_ranks(*words, folder=folder, world_size=2)
    assert [each.code for each in resumed] == [0, 0], resumed[0].err
    seen = [survival.state(folder / each)["callbacks"] for each in (run, RUN)]
    tokens = [next(v for k, v in s.items() if "StepTime" in k)["tokens_seen"] for s in seen]
    assert tokens[0] == tokens[1]
    message = "rows cannot be shared evenly by 3 processes: make it a multiple of 3"
    before = {path: path.read_bytes() for path in (folder / run).rglob("*.*")}
    three = call_ranks(*words, "--trainer.max_epochs=3", folder=folder, world_size=3)
    assert {path: path.read_bytes() for path in (folder / run).rglob("*.*")} == before
    for said in three:
        assert said.code == 2
        assert message in said.err.splitlines()[-1]
        assert "Traceback" not in said.err


# Files


def flip(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 256] = (b ^ 1 for b in content[middle : middle + 256])  # no padding
    path.unlink()  # it may be the same file as another one
    path.write_bytes(content)


def test_the_checkpoint_before_a_damaged_one_is_gone_on_from(trained):
    folder, num_events = trained
    run = Path("runs/damaged")
    assert go_on(folder, run, at=num_events * 2 // 3).code == -signal.SIGKILL
    last = run / "checkpoints" / "last.ckpt"
    step = survival.state(folder / run, "previous")["global_step"]
    assert step < survival.state(folder / run)["global_step"]
    flip(folder / last)
    said = call("fit", "--run", run, "--ckpt_path", last, folder=folder)  # not asked for another
    assert (said.code, said.err) == (2, f"error: {last} is damaged or incomplete\n")
    said = go_on(folder, run)
    assert said.code == 0
    assert said.err.splitlines()[0] == (
        f"warning: {last} is damaged or incomplete; going on from"
        f" {run}/checkpoints/previous.ckpt instead"
    )
    assert_same_run(folder / run, folder / RUN)
    for name in ("last", "previous"):
        flip(folder / run / "checkpoints" / f"{name}.ckpt")
    said = go_on(folder, run)
    assert said.code == 2
    assert said.err.count("\n") == 1
    shutil.rmtree(folder / run / "checkpoints")
    said = call("fit", "--run", run, "--ckpt_path", "last", folder=folder)
    assert (said.code, said.err) == (2, f"error: no checkpoint {last}\n")


@pytest.mark.parametrize("links", [True, False])
def test_a_damaged_checkpoint_never_replaces_the_one_before_it(links, tmp_path, monkeypatch):
    """Killed at any moment of the saves after it, with and without hard links."""
    if not links:
        monkeypatch.setattr(os, "link", _refuse)
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    seen = set()
    for at in (*range(1, 30), 0):
        for number, file in enumerate((previous, last)):
            torch.save({"step": number, "weights": torch.zeros(999)}, file)
        flip(last)
        seen.add(_killed_in_a_save(last, at))
        whole = [step for file in (last, previous) if (step := _step(file)) is not None]
        assert whole
        assert whole == sorted(whole, reverse=True)
    assert whole == [3, 2]
    assert seen == {0, signal.SIGKILL}


def test_a_checkpoint_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """A whole file is forced there under another name, and the folder once it has its own."""
    last, there, force = tmp_path / "last.ckpt", [], os.fsync

    def fsync(descriptor):
        there.append({path.name: _step(path) for path in tmp_path.iterdir()})
        force(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save = AtomicCheckpointIO().save_checkpoint
    save({"step": 1}, last)
    save({"step": 2}, last)
    assert there == [
        {"last.ckpt.partial": 1},
        {"last.ckpt": 1},
        {"last.ckpt": 1, "last.ckpt.partial": 2},
        {"last.ckpt": 2, "previous.ckpt": 1},
    ]
    monkeypatch.setattr(checkpoint_io, "load_archive", None)  # what it wrote itself is whole
    save({"step": 3}, last)
    assert _step(last) == 3


def test_what_a_kill_left_of_a_second_name_is_in_nobodys_way(tmp_path):
    """Killed between the link and the renaming of it; the next save is as any other."""
    (tmp_path / "previous.ckpt.partial").write_bytes(b"of an earlier checkpoint")
    save = AtomicCheckpointIO().save_checkpoint
    for step in (1, 2):
        save({"step": step}, tmp_path / "last.ckpt")
    found = {path.name: _step(path) for path in tmp_path.iterdir()}
    assert found == {"last.ckpt": 2, "previous.ckpt": 1}


def _refuse(*args):
    raise PermissionError


def _killed_in_a_save(last, at):
    """A process that saves twice; its signal, which comes at the event `at`."""
    if not (process := os.fork()):
        events = 0

        def count(event, args):
            nonlocal events
            if event in ("open", *survival.FILE_EVENTS) and str(last.parent) in str(args[0]):
                events += 1
                if events == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        save = AtomicCheckpointIO().save_checkpoint
        try:
            save({"step": 2, "weights": torch.ones(999)}, last)
            save({"step": 3, "weights": torch.ones(999)}, last)
        finally:
            os._exit(0)
    return os.waitpid(process, 0)[1]


def _step(file):
    try:
        return load_archive(file)["step"]
    except (ValueError, FileNotFoundError):
        return None


def limited(limit, *args, folder, **options):
    """A command whose files may not grow beyond some bytes, as on a full disk."""
    return call(*args, folder=folder, LIMIT=str(limit), **options)


def test_a_full_disk_leaves_the_checkpoint_before(trained, tmp_path):
    folder, num_events = trained
    run = Path("runs/full")
    assert go_on(folder, run, at=num_events // 3, number=signal.SIGTERM).code == 143
    checkpoints = folder / run / "checkpoints"
    before = {path.name: path.read_bytes() for path in checkpoints.iterdir()}
    words = ("fit", "--run", run, "--ckpt_path", "last")
    said = limited(len(before["last.ckpt"]) // 2, *words, folder=folder)
    assert said.code == 2
    assert said.err.splitlines()[-1].startswith("error: cannot write the checkpoint ")
    assert said.err.splitlines()[-1].endswith("File too large; the one before it is as it was")
    assert {path.name: path.read_bytes() for path in checkpoints.iterdir()} == before
    assert "Traceback" not in said.err
    assert go_on(folder, run).code == 0
    assert_same_run(folder / run, folder / RUN)


def test_a_full_disk_leaves_no_half_a_cache(trained):
    folder, _ = trained
    for limit in (1000, 2000):
        cache = {"LM_SOFTMAX_CACHE": str(folder / f"cache-{limit}")}
        command = ("fit", "-c", "all.yaml", "--run", "runs/nothing")
        said = limited(limit, *command, folder=folder, **cache)
        assert (said.code, said.err.count("\n")) == (2, 1), said.err
        assert "cannot write to the cache folder" in said.err
        left = [path.name for path in Path(cache["LM_SOFTMAX_CACHE"]).glob("*")]
        assert all(name.endswith(".lock") or name.startswith("vocab-") for name in left)
        assert not any(name.endswith(".partial") for name in left)
        assert not (folder / "runs/nothing").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_cache_of_somebody_else_is_one_line(trained):
    folder, _ = trained
    (folder / "theirs").mkdir(mode=0o755)
    environment = {"LM_SOFTMAX_CACHE": str(folder / "theirs"), "USER_ID": "65534"}
    datasets = Path(os.environ["HF_DATASETS_CACHE"])  # which they may write
    theirs = (datasets.parent, datasets, *datasets.rglob("*"))
    above = [path for path in folder.parents if path.name.startswith(("pytest-", "popen-"))]
    for path in (*above, folder, folder / "runs", *theirs):
        path.chmod(0o777)
    said = call("fit", "-c", "all.yaml", "--run", "runs/nobody", folder=folder, **environment)
    assert (said.code, said.err.count("\n")) == (2, 1), said.err
    assert "cannot write to the cache folder" in said.err
    assert "Permission denied" in said.err


# Files that want to run something


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def bombs(folder, whole):
    """Files that touch `folder/proof` where they are unpickled."""
    bomb = Bomb(folder / "proof")
    content = torch.load(whole, weights_only=True)
    torch.save(content | {"moments": [bomb]}, folder / "in.ckpt")
    torch.save(bomb, folder / "zip.ckpt")
    torch.save({"a": bomb}, folder / "old.ckpt", _use_new_zipfile_serialization=False)
    (folder / "raw.ckpt").write_bytes(pickle.dumps(bomb, protocol=2))
    return sorted(folder.glob("*.ckpt"))


def test_nothing_in_a_file_is_run(trained, tmp_path):
    folder, _ = trained
    files = bombs(tmp_path, folder / RUN / "checkpoints" / "last.ckpt")
    assert len(files) == 4
    force = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    for file in files:
        shutil.copytree(folder / RUN, tmp_path / "run")
        for name in ("last", "previous", "best"):
            target = tmp_path / "run" / "checkpoints" / f"{name}.ckpt"
            target.unlink(missing_ok=True)
            shutil.copy(file, target)
        for words in (
            ("validate", "--ckpt_path", file),
            ("test", "--ckpt_path", "best", "--run", tmp_path / "run"),
            ("predict", "--ckpt_path", file),
            ("fit", "-c", "all.yaml", "--ckpt_path", file),
            ("fit", "--run", tmp_path / "run", "--ckpt_path", "last"),
            ("fit", "-c", "all.yaml", "--data.vocab_path", file),
        ):
            said = call(*words, folder=folder, **force)
            assert said.code == 2, said.err
            assert said.err.splitlines()[-1].startswith("error: cannot read ")
            assert "Traceback" not in said.err
            assert not (tmp_path / "proof").exists()
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(ValueError, match="cannot read"):
            Vocab.load(file)
        with pytest.raises(pickle.UnpicklingError):
            LanguageModel.load_from_checkpoint(file)
        assert not (tmp_path / "proof").exists()
    torch.load(files[0], weights_only=False)  # they do what they say
    assert (tmp_path / "proof").exists()
