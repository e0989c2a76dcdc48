"""The table and the plot of runs, from files as a run writes them."""

import csv
import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from tiny import TinyData, TinyModel, trainer

from lm_softmax.callbacks import MemoryMonitor, PerplexityMonitor, RunSummary, StepTimeMonitor
from lm_softmax.compare import Run, draw, find_runs, main, table


def write_summary(folder: Path, **changes: Any) -> None:
    summary = {
        "status": "finished",
        "head": "AdaptiveSoftmax",
        "vocab_size": 33278,
        "vocab_fingerprint": "wikitext",
        "num_parameters": {"total": 12_345_678, "head": 1, "encoder": 2},
        "best": {"val/ppl": 160.123, "val/bits_per_byte": 1.5, "val/unk_rate": 0.0256},
        "perf": {"perf/step_time_ms": 98.76, "perf/tokens_per_s": 12345.6},
        "mem": {"mem/host_rss_gib": 1.25},
        "train_time_s": 605.4,
        "wall_time_s": 700.0,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary | changes))


def write_metrics(folder: Path, rows: Iterable[dict[str, float]]) -> None:
    rows = list(rows)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)


def curve(*perplexities: float) -> Iterable[dict[str, float]]:
    """Training rows with a validation after each, a minute apart."""
    for number, perplexity in enumerate(perplexities, start=1):
        yield {
            "step": number * 100 - 1,
            "train/loss": 5.0,
            "perf/step_time_ms": 90.0 / number,
            "perf/tokens_per_s": 1000.0 * number,
        }
        yield {
            "step": number * 100 - 1,
            "val/ppl": perplexity,
            "val/bits_per_byte": math.log2(perplexity) / 5,
            "perf/train_time_s": 60.0 * number,
        }


def test_table_of_finished_runs_by_perplexity(tmp_path: Path) -> None:
    write_summary(tmp_path / "a")
    write_summary(
        tmp_path / "deep" / "b",
        head="FullSoftmax",
        best={"val/ppl": 99.5, "val/bits_per_byte": 1.25, "val/unk_rate": 0.0},
        mem={"mem/host_rss_gib": 9.0, "mem/peak_allocated_gib": 2.5},
        train_time_s=3725.0,
    )
    assert table(find_runs([tmp_path])).splitlines() == [
        "run     head             vocabulary  parameters  val/ppl  bits/byte  <unk>  ms/step"
        "  tokens/s    peak memory     time",
        "------  ---------------  ----------  ----------  -------  ---------  -----  -------"
        "  --------  -------------  -------",
        "deep/b  FullSoftmax          33,278  12,345,678    99.50     1.2500  0.00%     98.8"
        "    12,346   2.50 GiB GPU  1:02:05",
        "a       AdaptiveSoftmax      33,278  12,345,678   160.12     1.5000  2.56%     98.8"
        "    12,346  1.25 GiB host  0:10:05",
    ]


def test_another_vocabulary_is_marked_and_comes_last(tmp_path: Path) -> None:
    write_summary(tmp_path / "a")
    write_summary(tmp_path / "b", best={"val/ppl": 150.0})
    write_summary(tmp_path / "c", best={"val/ppl": 20.0}, vocab_fingerprint="bytes")
    runs = find_runs([tmp_path])
    assert [run.label for run in runs] == ["b", "a", "c *"]
    text = table(runs)
    assert "* another vocabulary: perplexity does not compare, bits/byte does" in text
    assert "?" not in text


def test_run_without_a_summary_is_read_from_its_metrics(tmp_path: Path) -> None:
    write_metrics(
        tmp_path / "going",
        [
            *curve(300, 200, 250),
            {"step": 300, "mem/host_rss_gib": 1.5},
            {"step": 301, "mem/host_rss_gib": 1.0},
        ],
    )
    (tmp_path / "going" / "config.yaml").write_text(
        "model:\n  head:\n    class_path: lm_softmax.heads.FullSoftmax\n    init_args: {}\n"
    )
    (run,) = find_runs([tmp_path])
    assert (run.label, run.head) == ("going (unfinished) ?", "FullSoftmax")
    assert run.best["val/ppl"] == 200
    assert run.best["val/bits_per_byte"] == math.log2(200) / 5
    assert (run.step_ms, run.tokens_per_s) == (45.0, 2000.0)
    assert (run.memory, run.time_s) == ((1.5, "host"), 180.0)
    assert run.curve == [(60.0 * n, p, math.log2(p) / 5) for n, p in ((1, 300), (2, 200), (3, 250))]
    assert (
        " ".join(table([run]).splitlines()[2].split())
        == "going (unfinished) ? FullSoftmax - - 200.00 1.5288 - 45.0 2,000 1.50 GiB host 0:03:00"
    )
    assert "? vocabulary not known" in table([run])


def test_run_that_has_only_begun(tmp_path: Path) -> None:
    write_metrics(tmp_path / "new", [{"step": 0, "train/loss": 9.0}])
    (run,) = find_runs([tmp_path])
    assert run == Run("new", comparable=None)
    assert table([run]).splitlines()[2].split()[3:] == ["-"] * 10


@pytest.mark.parametrize(
    ("status", "label"),
    [("running", "a (unfinished)"), ("interrupted", "a (interrupted)"), ("failed", "a (failed)")],
)
def test_status_is_shown(tmp_path: Path, status: str, label: str) -> None:
    write_summary(tmp_path / "a", status=status, best={})
    (run,) = find_runs([tmp_path])
    assert run.label == label
    assert run.best == {}


def test_infinite_and_nan_perplexity_come_last(tmp_path: Path) -> None:
    for name, value in (("a", "nan"), ("b", "inf"), ("c", 1e6)):
        write_summary(tmp_path / name, best={"val/ppl": value})
    assert [run.name for run in find_runs([tmp_path])] == ["c", "a", "b"]
    assert "inf" in table(find_runs([tmp_path]))


def test_several_folders_and_a_run_given_itself(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_summary(tmp_path / name / "a")
    folders = [tmp_path / "one", tmp_path / "two" / "a", tmp_path / "one" / "a"]
    names = {run.name for run in find_runs(folders)}
    assert names == {str(tmp_path / "one" / "a"), str(tmp_path / "two" / "a")}  # each once
    assert [run.name for run in find_runs([tmp_path / "one" / "a"])] == [str(folders[2])]


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_reads_what_a_run_writes(tmp_path: Path) -> None:
    run = trainer(
        tmp_path / "a",
        StepTimeMonitor(1),
        MemoryMonitor(),
        PerplexityMonitor(),
        summary := RunSummary(),
        logger=CSVLogger(tmp_path / "a", name="", version=""),
        max_epochs=3,
    )
    run.fit(TinyModel(), datamodule=TinyData())
    (found,) = find_runs([tmp_path])
    written = summary.summary
    assert (found.label, found.head) == ("a", "AdaptiveSoftmax")
    assert found.best == written["best"]
    assert found.tokens_per_s == written["perf"]["perf/tokens_per_s"]
    assert found.step_ms == written["perf"]["perf/step_time_ms"]
    assert found.memory == (written["mem"]["mem/host_rss_gib"], "host")
    assert found.time_s == written["train_time_s"]
    assert len(found.curve) == 3
    last = [written["last"][name] for name in ("perf/train_time_s", "val/ppl", "val/bits_per_byte")]
    assert list(found.curve[-1]) == last
    (tmp_path / "a" / "summary.json").unlink()
    (unfinished,) = find_runs([tmp_path])
    assert unfinished.best["val/ppl"] == found.best["val/ppl"]
    assert unfinished.curve == found.curve


# Plot


def lines_of(runs: list[Run]) -> list[dict[str, tuple[list[float], list[float]]]]:
    figure = draw(runs)
    assert figure is not None
    return [
        {
            str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
            for line in axes.get_lines()
        }
        for axes in figure.axes
    ]


def test_plot_is_perplexity_against_training_time(tmp_path: Path) -> None:
    for name, values in (("a", (300, 200, 160, 150)), ("b", (500, 400))):
        write_summary(tmp_path / name, head=f"Head{name}", best={"val/ppl": min(values)})
        write_metrics(tmp_path / name, curve(*values))
    runs = find_runs([tmp_path])
    assert lines_of(runs) == [
        {"a: Heada": ([1, 2, 3, 4], [300, 200, 160, 150]), "b: Headb": ([1, 2], [500, 400])}
    ]
    figure = draw(runs)
    assert figure is not None
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "training time (minutes)",
        "validation perplexity",
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a: Heada", "b: Headb"]


def test_other_vocabularies_are_dashed_and_shown_in_bits_per_byte(tmp_path: Path) -> None:
    for name, vocab in (("a", "v"), ("b", "v"), ("c", "w")):
        write_summary(tmp_path / name, vocab_fingerprint=vocab, head="H")
        write_metrics(tmp_path / name, curve(32, 16))
    figure = draw(find_runs([tmp_path]))
    assert figure is not None
    perplexity, bits = figure.axes
    styles = {str(line.get_label()): line.get_linestyle() for line in perplexity.get_lines()}
    assert styles == {"a: H": "-", "b: H": "-", "c *: H": "--"}
    assert list(bits.get_lines()[2].get_ydata()) == [1.0, 0.8]
    assert bits.get_ylabel() == "validation bits per byte"


@pytest.mark.parametrize(
    ("seconds", "unit", "last"), [(100, "seconds", 100), (180, "minutes", 3), (14400, "hours", 4)]
)
def test_time_unit_fits_the_longest_run(seconds: float, unit: str, last: float) -> None:
    run = Run("a", curve=[(0.0, 9.0, 1.0), (seconds, 8.0, 1.0)])
    figure = draw([run])
    assert figure is not None
    assert figure.axes[0].get_xlabel() == f"training time ({unit})"
    assert figure.axes[0].get_lines()[0].get_xdata()[-1] == last


def test_command_prints_the_table_and_writes_the_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_summary(tmp_path / "a")
    write_metrics(tmp_path / "a", curve(300, math.inf, math.nan, 160))
    assert main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{table(find_runs([tmp_path]))}\nplot: {tmp_path / 'compare.png'}\n"
    assert err == ""
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.format == "PNG"
        assert picture.width >= 1000
    assert {path.name for path in tmp_path.iterdir()} == {"a", "compare.png"}


def test_output_names_the_picture_and_its_format(tmp_path: Path) -> None:
    write_summary(tmp_path / "runs" / "a")
    write_metrics(tmp_path / "runs" / "a", curve(300, 160))
    assert main([str(tmp_path / "runs"), "--output", str(tmp_path / "plot.svg")]) == 0
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    assert not (tmp_path / "runs" / "compare.png").exists()


def test_without_a_curve_there_is_a_table_and_no_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_summary(tmp_path / "a")
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(
        "no plot: no run has val/ppl beside perf/train_time_s in its metrics.csv\n"
    )
    assert not (tmp_path / "compare.png").exists()


# Bad input


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere: no such folder" in refused([str(tmp_path / "nowhere")], capsys)


def test_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run below" in refused([str(tmp_path)], capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "summary.json: not the summary of a run"),
        ("[]", "summary.json: not the summary of a run"),
        ('{"status": "finished"}', "summary.json: not the summary of a run, 'head' is missing"),
        ("\udcff", "summary.json: not the summary of a run, 'utf-8' codec"),
    ],
)
def test_broken_summary(
    tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.json").write_text(content, errors="surrogateescape")
    assert message in refused([str(tmp_path)], capsys)


def test_what_cannot_be_read_is_left_out_of_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_summary(tmp_path / "good")
    for name, file in (("foreign", "summary.json"), ("other", "metrics.csv")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text('{"a":\n1}')
    assert [run.name for run in find_runs([tmp_path])] == ["good"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "foreign/summary.json: not the summary of a run, 'status' is missing" in lines[0]
    assert "other/metrics.csv: not the metrics of a run" in lines[1]
    (tmp_path / "good" / "summary.json").unlink()
    err = refused([str(tmp_path)], capsys)
    assert "foreign/summary.json" in err
    assert "other/metrics.csv" in err


def test_an_evaluation_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path / "test", [{"step": 0, "test/nll": 5.0, "test/ppl": 148.0}])
    (tmp_path / "test" / "config.yaml").write_text("model: {}\n")
    assert "no run below" in refused([str(tmp_path)], capsys)
    write_summary(tmp_path / "a")
    assert [run.name for run in find_runs([tmp_path])] == ["a"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("missing", ["matplotlib", "yaml"])
def test_without_the_train_extra_the_command_says_what_to_install(
    tmp_path: Path, missing: str
) -> None:
    write_summary(tmp_path / "a")
    code = (
        f"import runpy, sys; sys.modules[{missing!r}] = None;"
        "runpy.run_module('lm_softmax.compare', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert 'pip install "lm_softmax[train]"' in done.stderr


@pytest.mark.parametrize(
    "changes",
    [{"best": 3}, {"best": {"val/ppl": "high"}}, {"num_parameters": None}, {"vocab_size": []}],
)
def test_summary_with_values_of_another_kind(
    tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    write_summary(tmp_path / "a", **changes)
    assert "not the summary of a run" in refused([str(tmp_path)], capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it has no column step"),
        ("a,b\n1,2\n", "it has no column step"),
        ("step,val/ppl\n1,2\n3,high\n", "line 3, val/ppl: 'high' is not a number"),
        ("step,val/ppl\n1,2,3\n", "line 2 has more cells than the header"),
        ('step,val/ppl\n1,"2\n', "unexpected end of data"),
        ("step\n\udcff\n", "'utf-8' codec"),
    ],
)
def test_broken_metrics(
    tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.csv").write_text(content, errors="surrogateescape")
    assert message in refused([str(tmp_path)], capsys)


def test_last_row_cut_off_by_a_kill_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/ppl\n1,2.0,\n2,3")
    assert find_runs([tmp_path])[0].best == {}


@pytest.mark.parametrize("content", ["a: [", "- 1", "model: {head: FullSoftmax}", ""])
def test_config_without_a_head(tmp_path: Path, content: str) -> None:
    write_metrics(tmp_path, [{"step": 0, "train/loss": 5.0}])
    (tmp_path / "config.yaml").write_text(content)
    if content == "a: [":
        with pytest.raises(ValueError, match=r"config\.yaml: not YAML"):
            find_runs([tmp_path])
    else:
        assert find_runs([tmp_path])[0].head is None


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("plot.doc", "must end in one of"),
        ("plot", "must end in one of"),
        ("no/plot.png", "no such"),
    ],
)
def test_impossible_output(
    tmp_path: Path, output: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_summary(tmp_path / "a")
    write_metrics(tmp_path / "a", curve(300, 160))
    assert message in refused([str(tmp_path), "--output", str(tmp_path / output)], capsys)


def test_a_failed_drawing_leaves_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Any, file: Any, **options: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    write_summary(tmp_path / "a")
    write_metrics(tmp_path / "a", curve(300, 160))
    (tmp_path / "compare.png").write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    assert "disk full" in refused([str(tmp_path)], capsys)
    assert (tmp_path / "compare.png").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "compare.png"}


def test_module_runs_as_a_command_without_torch(tmp_path: Path) -> None:
    write_summary(tmp_path / "a")
    code = (
        "import atexit, runpy, sys;"
        " atexit.register(lambda: print('torch' in sys.modules));"
        "runpy.run_module('lm_softmax.compare', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("run ")
    assert lines[-1] == "False"
    refusal = subprocess.run(
        [sys.executable, "-m", "lm_softmax.compare", "--colour", "red"],
        capture_output=True,
        text=True,
    )
    assert refusal.returncode == 2
    assert refusal.stderr.count("\n") == 1
