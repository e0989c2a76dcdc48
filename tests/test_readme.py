"""What the README shows, run: its Python blocks, and its command lines up to the parser."""

import re
import shlex
from pathlib import Path

import pytest

from lm_softmax.cli import main
from lm_softmax.generate import main as generate

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language):
    for document in DOCUMENTS:
        for block in re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.M | re.S):
            yield pytest.param(block, id=f"{document.name}:{block.strip().splitlines()[0][:40]}")


def module_commands(module):
    """The options of each `python -m lm_softmax.MODULE ...` line."""
    for parameter in blocks("bash"):
        for line in parameter.values[0].replace("\\\n", " ").splitlines():
            if found := re.match(rf"python -m lm_softmax\.{module} ([^#>]*)", line):
                yield pytest.param(found[1], id=line.strip()[:80])


def train_commands():
    """Each `python train.py ...` line, also behind a launcher, continuation lines joined."""
    for parameter in blocks("bash"):
        for line in parameter.values[0].replace("\\\n", " ").splitlines():
            if found := re.search(r"train\.py(?: +([^#]*))?$", line.split(" # ")[0].strip()):
                yield pytest.param(found[1] or "", id=line.strip()[:80])


@pytest.mark.parametrize("block", list(blocks("python")))
def test_python_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("arguments", list(train_commands()))
def test_train_commands_are_understood(arguments, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = shlex.split(arguments)
    if "--ckpt_path" in words:
        pytest.skip("needs a finished run: tests/test_cli.py makes and uses one of its own")
    if not words:
        words = ["fit", "--config", "configs/quickstart.yaml"]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--print_config"])
    assert stopped.value.code in (0, None), capsys.readouterr().err
    assert "class_path" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", list(module_commands("generate")))
def test_generate_commands_are_understood(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.txt", "sentences.txt"):
        Path(name).write_text("a prompt\n")
    with pytest.raises(SystemExit) as stopped:
        generate(shlex.split(arguments))
    assert stopped.value.code == 2  # tests/test_generate.py has checkpoints
    assert capsys.readouterr().err == "error: no checkpoint best.ckpt\n"


def test_the_two_commands_are_there():
    lines = [line for line in DOCUMENTS[0].read_text().splitlines() if line.startswith("pip ")]
    assert lines[:2] == [
        'pip install -c constraints.txt -e ".[train]" && python train.py',
        'pip install -c constraints.txt -e ".[dev]" && pytest -n 2 --dist loadfile',
    ]


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_no_figure_is_left_open():
    for document in DOCUMENTS:
        assert "@@" not in document.read_text(), document.name
