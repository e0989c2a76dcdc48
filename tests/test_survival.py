"""Runs that are killed, terminated, damaged or starved of disk, and what is left of them."""

import random
import shutil
import signal
from pathlib import Path

import pytest
import survival
from survival import assert_same_run, call, call_ranks, rows

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


@pytest.fixture(scope="module", params=KINDS)
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
