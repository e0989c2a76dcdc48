"""A few random inputs of each kind; `python tests/fuzz.py` tries as many as one likes."""

import os
import random
import resource
import time

import fuzz
import pytest
import survival
import torch


def _few(folder, iterations):
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (fuzz.MEMORY, fuzz.MEMORY))
    torch.set_num_threads(1)
    fuzz.prepare(folder)
    tried = fuzz.fuzz(folder, iterations, seed=1)
    assert sum(tried.values()) == iterations
    assert len(tried) == 2 * len(fuzz.KINDS), tried  # results and clear lines, of each kind


def in_a_process(function, *args):
    process = survival.server.Process(target=function, args=args)
    process.start()
    process.join(300)
    assert process.exitcode == 0, "see above"


def test_random_inputs_give_a_result_or_one_clear_line(tmp_path):
    in_a_process(_few, tmp_path, 60)


@pytest.mark.slow
def test_many_random_inputs(tmp_path):
    in_a_process(_few, tmp_path, 600)


def test_what_is_neither_is_found(tmp_path, monkeypatch):
    """The test above can fail."""

    def traceback(draw, folder):
        raise KeyError("a bug")

    def two_lines(draw, folder):
        raise ValueError("one\ntwo")

    def hang(draw, folder):
        try:
            time.sleep(30)
        except Exception as error:
            raise ValueError("one line") from error

    monkeypatch.setattr(fuzz, "SECONDS", 1)
    for kind in (traceback, two_lines, hang):
        with pytest.raises(AssertionError, match=f"{kind.__name__}, seed 0, number 0"):
            fuzz.fuzz(tmp_path, 1, 0, (kind,))
    with pytest.raises(AssertionError, match="not one line"), fuzz.clear_or_fine():
        raise ValueError("one\ntwo")
    file = tmp_path / "file"
    for number in range(30):
        file.write_bytes(b"content" * 9)
        fuzz.damage(random.Random(number), file)
        assert file.exists()
