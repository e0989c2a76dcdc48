"""The short form of `python tests/soak.py`."""

import pytest
import soak
import survival


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_another(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_SOFTMAX_CACHE", str(tmp_path / "cache"))
    survival.write_corpus(tmp_path / "corpus")
    survival.write_config(tmp_path, "all.yaml")
    _, lives, faults = soak.soak(
        tmp_path / "all.yaml", tmp_path, steps=150, kill_after=(0.5, 2.0), every_n_steps=5
    )
    assert faults == []
    assert len(lives) > 2
