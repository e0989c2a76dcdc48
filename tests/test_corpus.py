"""Corpora against files written by hand, and token files against numpy."""

import json
import math
import os
import pickle
import re
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pytest
from datasets.arrow_writer import ArrowWriter
from huggingface_hub import HfApi
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_softmax.corpus import (
    Corpus,
    Source,
    SplitStats,
    TokenFile,
    TokenWriter,
    rows,
    source,
    stdlib,
    token_file,
    token_files,
    work,
)
from lm_softmax.corpus.token_file import MAGIC
from lm_softmax.vocab import Vocab, load_tokenizer

LINES = ["the cat sat", "", "the dog", "é cat"]
SHARED = os.environ.get("LM_SOFTMAX_DATA", "")
SPLITS = {"train": LINES, "validation": ["the cow"], "test": ["a", "b"]}


@pytest.fixture(autouse=True)
def _no_shared_data(monkeypatch):
    monkeypatch.delenv("LM_SOFTMAX_DATA", raising=False)


def write(path, lines, column="text"):
    """A file of rows, in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pandas.DataFrame({column: lines, "length": [len(line) for line in lines]})
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix in (".json", ".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")))
    else:
        path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return str(path)


def files(folder, suffix=".txt", **splits):
    named = (splits or SPLITS).items()
    return {split: write(folder / f"{split}{suffix}", lines) for split, lines in named}


def text(source, split):
    return [row for batch in source.rows(split).batches(10**6) for row in batch.to_pylist()]


def complaint(call, *parts):
    """The one line of the ValueError that a call ends in."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the parts are what is matched
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


# Where text comes from


@pytest.mark.parametrize("suffix", [".txt", ".tokens", ".json", ".jsonl", ".csv", ".parquet"])
def test_files_of_all_formats_hold_the_same_rows(tmp_path, suffix):
    corpus = Source(data_files=files(tmp_path, suffix, train=LINES, validation=["x"]))
    assert text(corpus, "train") == LINES
    assert text(corpus, "validation") == ["x"]


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize(
    "lines",
    [
        ["NA", "None", "null", "nan", "", "true", "a"],
        ["1", "02", "3.50", "1e3"],
        ["2020-01-01", "2021-12-31"],
    ],
)
def test_text_that_looks_like_something_else_is_text(tmp_path, suffix, lines):
    corpus = Source(data_files=files(tmp_path / "corpus", suffix, train=lines))
    assert text(corpus, "train") == lines
    assert text(Source(str(tmp_path / "corpus")), "train") == lines


def test_numbers_in_files_without_types_are_text(tmp_path):
    (tmp_path / "a.json").write_text('{"text": 1}\n{"text": "b"}\n{"text": null}\n{"text": 2.5}\n')
    assert text(Source(data_files={"train": str(tmp_path / "a.json")}), "train") == [
        "1",
        "b",
        "2.5",
    ]
    (tmp_path / "a.csv").write_text("text,length\n1,\n2,4\n")
    assert text(Source(data_files={"train": str(tmp_path / "a.csv")}), "train") == ["1", "2"]
    for value in ("[1]", '{"a": 1}', "true"):
        (tmp_path / "b.json").write_text(f'{{"text": {value}}}\n')
        listed = Source(data_files={"train": str(tmp_path / "b.json")})
        complaint(lambda listed=listed: text(listed, "train"), "holds", "not text")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    row = {"a.txt": "a b\n", "a.csv": "text\na b\n", "a.json": '{"text": "a b"}\n'}[name]
    for file in (tmp_path / name, tmp_path / f"second_{name}"):
        file.write_text(row, "utf-8-sig")
    corpus = Source(data_files={"train": str(tmp_path / f"*{name}")})
    assert text(corpus, "train") == ["a b", "a b"]


def test_files_below_the_home_folder(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", ["at home"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert text(Source(data_files={"train": "~/a.txt"}), "train") == ["at home"]


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".json", ".parquet"])
def test_a_file_written_again_is_another_whatever_its_time(tmp_path, suffix):
    def ids():
        corpus = Corpus(Source(data_files={"train": file}), cache_dir=str(tmp_path / "cache"))
        return corpus.vocab.decode(corpus.tokens("train")[:])

    file = write(tmp_path / f"a{suffix}", ["one"])
    before = os.stat(file)
    assert ids() == ids() == "one\n"
    write(tmp_path / f"a{suffix}", ["two"])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ids() == "two\n"


def test_lists_of_files_and_patterns(tmp_path):
    write(tmp_path / "a1.txt", ["one"])
    write(tmp_path / "a2.txt", ["two"])
    write(tmp_path / "b.txt", ["three"])
    pattern = Source(data_files={"train": str(tmp_path / "a*.txt")})
    assert text(pattern, "train") == ["one", "two"]
    names = Source(data_files={"train": [str(tmp_path / "b.txt"), str(tmp_path / "a1.txt")]})
    assert text(names, "train") == ["three", "one"]


def test_a_local_folder_is_a_dataset(tmp_path):
    folder = tmp_path / "corpus"
    files(folder / "data", ".parquet")
    assert text(Source(str(folder)), "test") == ["a", "b"]
    assert text(Source(str(folder), data_files={"train": "data/test.parquet"}), "train") == [
        *("a", "b")
    ]


def test_configurations_by_name(tmp_path):
    for name in ("small", "large"):
        files(tmp_path / name, train=[name])
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - {{split: train, path: {name}/train.txt}}\n"
        for name in ("small", "large")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert text(Source(str(tmp_path), "small"), "train") == ["small"]
    complaint(lambda: Source(str(tmp_path), "huge").rows("train"), "huge", "small", "large")
    complaint(lambda: Source(str(tmp_path)).rows("train"), "small", "large")


def test_shared_data_come_before_the_hub(tmp_path, monkeypatch):
    files(tmp_path / "shared" / "wikitext", train=["of the shared folder"])
    files(tmp_path / "shared" / "a" / "b", train=["of its sub-folder"])
    monkeypatch.setenv("LM_SOFTMAX_DATA", str(tmp_path / "shared"))
    assert text(Source("Salesforce/wikitext"), "train") == ["of the shared folder"]
    assert text(Source("wikitext"), "train") == ["of the shared folder"]
    assert text(Source("a/b"), "train") == ["of its sub-folder"]
    monkeypatch.chdir(tmp_path)
    files(tmp_path / "wikitext", train=["of this folder"])
    assert text(Source("wikitext"), "train") == ["of this folder"]


def test_missing_values_are_no_rows(tmp_path):
    file = write(tmp_path / "train.parquet", ["a", None, "b"][::2])
    pandas.DataFrame({"text": ["a", None, "b"]}).to_parquet(file)
    assert text(Source(data_files={"train": file}), "train") == ["a", "b"]


def test_another_column(tmp_path):
    file = write(tmp_path / "train.json", ["a", "b"], column="body")
    assert text(Source(data_files={"train": file}, text_column="body"), "train") == ["a", "b"]
    no_text = Source(data_files={"train": file})
    complaint(lambda: no_text.rows("train"), "'text'", "'train'", "columns are body, length")
    typed = write(tmp_path / "train.parquet", ["a", "b"])
    number = Source(data_files={"train": typed}, text_column="length")
    complaint(lambda: number.rows("train"), "'length'", "holds int64, not text")


def test_a_missing_split_lists_those_there_are(tmp_path):
    corpus = Source(data_files=files(tmp_path, train=["a"], test=["b"]))
    complaint(
        lambda: corpus.rows("validation"),
        *("no split 'validation'", "only train, test", "validation_fraction"),
    )


def test_a_share_of_train_is_held_out(tmp_path):
    rows = [str(i) for i in range(10)]
    corpus = Source(data_files=files(tmp_path, train=rows), validation_fraction=0.2)
    assert text(corpus, "train") == rows[:8]
    assert text(corpus, "validation") == rows[8:]
    assert corpus.rows("train").fingerprint != corpus.rows("validation").fingerprint


def test_shares_that_cannot_be_held_out(tmp_path):
    one = files(tmp_path / "one", train=["a"])
    complaint(lambda: Source(validation_fraction=1.0), "validation_fraction=1.0")
    complaint(lambda: Source(validation_fraction=0.1).rows("train"), "train, validation, test")
    held_out = Source(data_files=one, validation_fraction=0.5)
    complaint(lambda: held_out.rows("train"), "0.5 leaves nothing of the 1 rows")


def test_unknown_corpora(tmp_path, monkeypatch):
    def info(self, repo_id, *, repo_type, timeout):
        assert (repo_id, repo_type) == ("nobody/nothing", "dataset")
        assert timeout <= 10  # seconds; without one the hub's client tries for longer
        asked.append(repo_id)
        raise TimeoutError

    asked = []
    monkeypatch.setattr(HfApi, "repo_info", info)
    complaint(
        lambda: Source("nobody/nothing").rows("train"), "'nobody/nothing'", "could not be reached"
    )
    assert asked == ["nobody/nothing"]
    complaint(lambda: Source("./nothing").rows("train"), "'./nothing'", "no such folder")
    complaint(lambda: Source(str(tmp_path / "x")).rows("train"), tmp_path / "x", "no such folder")
    complaint(lambda: Source(str(tmp_path)).rows("train"), tmp_path, "doesn't contain any data")
    file = write(tmp_path / "a.txt", ["a"])
    complaint(lambda: Source(file).rows("train"), file, "is a file: give data_files")
    complaint(lambda: Source(name="small"), "name='small' needs the path")
    complaint(lambda: Source(""), "path='' names no corpus")
    monkeypatch.setattr(source, "hub_reachable", lambda path, kind: True)
    complaint(lambda: Source("nobody/nothing").rows("train"), "cannot read corpus 'nobody/nothing'")


def test_without_a_network_what_was_fetched_before_is_there(tmp_path, monkeypatch):
    files(tmp_path / "something", train=["fetched before"])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(source, "hub_reachable", lambda path, kind: False)
    load, seen = datasets.load_dataset, []

    def load_dataset(*args, **options):
        seen.append(datasets.config.HF_HUB_OFFLINE)
        return load(*args, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load(str(tmp_path / "something"))
    (tmp_path / "cache" / "something").rename(tmp_path / "cache" / "somebody___something")
    assert text(Source("somebody/something"), "train") == ["fetched before"]
    assert seen == [True]  # off the network, where there is none
    assert datasets.config.HF_HUB_OFFLINE is False


def test_scripts_are_not_run(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "corpus.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    complaint(lambda: Source(str(folder)).rows("train"), "scripts are no longer supported")
    assert not (tmp_path / "ran").exists()


def test_bad_files(tmp_path, capfd):
    def of(*names):
        return Source(data_files={"train": [str(tmp_path / name) for name in names]}).rows

    complaint(lambda: of("absent.txt")("train"), "no file matches", "absent.txt")
    complaint(lambda: of("*.nothing")("train"), "no file matches", "*.nothing")
    complaint(lambda: of("a.txt", "b.csv")("train"), "mixes formats", "a.txt", "b.csv")
    complaint(lambda: Source(data_files={}).rows("train"), "data_files names no file")
    for name in ("empty.txt", "empty.json", "empty.csv"):
        (tmp_path / name).touch()
        complaint(lambda name=name: of(name)("train"), "data_files is empty", tmp_path / name)
    (tmp_path / "header.csv").write_text("text,length\n")
    complaint(lambda: of("header.csv")("train"), "data_files is empty")
    (tmp_path / "list.json").write_text("[]")
    complaint(lambda: of("list.json")("train"), "data_files is empty")
    (tmp_path / "broken.json").write_text('{"text": ')
    complaint(lambda: of("broken.json")("train"), "cannot read data_files", "JSON")
    (tmp_path / "broken.parquet").write_text("PAR")
    complaint(lambda: of("broken.parquet")("train"), "cannot read data_files", "arquet")
    pandas.DataFrame({"text": [None, None]}).astype("string").to_parquet(tmp_path / "no.parquet")
    complaint(lambda: of("no.parquet")("train"), "is empty")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("a.txt", b"good line\n" * 20, b"\n"),
        ("a.txt", "é\n".encode() * 2**19, b"\n"),  # a character across the border of two reads
        ("a.csv", b"text,length\nfine,3\n", b",4\n"),
        ("a.json", b'{"text": "fine"}\n{"text": "', b'"}\n'),
    ],
)
def test_the_first_byte_that_is_not_utf8_is_named(tmp_path, name, before, after):
    good = write(tmp_path / f"good{os.path.splitext(name)[1]}", ["fine"])
    (tmp_path / name).write_bytes(before + b"\xff" + after)
    bad = {"train": [good, str(tmp_path / name)]}
    corpus = Corpus(Source(data_files=bad), cache_dir=str(tmp_path / "cache"))
    complaint(lambda: corpus.vocab, tmp_path / name, f"see byte {len(before)}")
    assert not [*tmp_path.glob("cache/*[!k]")]  # nothing but a lock
    folder = Corpus(Source(str(tmp_path)), cache_dir=str(tmp_path / "cache"))
    if name != "a.json":
        complaint(lambda: folder.vocab, tmp_path / name, f"see byte {len(before)}")


def test_a_file_that_ends_within_a_character(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc" + "é".encode()[:1])
    corpus = Source(data_files={"train": str(tmp_path / "a.txt")})
    complaint(lambda: corpus.rows("train"), tmp_path / "a.txt", "see byte 3")


def test_a_binary_column_that_is_not_utf8(tmp_path):
    broken = pa.array([b"fine", b"\xff"]).view(pa.string())
    found = rows.Rows(lambda: [broken], 1, "", "column 'text'", lambda: [])
    complaint(lambda: [*found.batches(10)], "column 'text' is not UTF-8")


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.one_of(st.none(), st.text("aé\n", max_size=12)), max_size=6), max_size=5),
    st.integers(1, 40),
)
def test_batches_are_whole_rows_of_bounded_size(chunks, max_bytes):
    pieces = [pa.array(chunk, pa.string()) for chunk in chunks]
    batches = [*rows.Rows(lambda: pieces, None, "", "", lambda: []).batches(max_bytes)]
    whole = [row for chunk in chunks for row in chunk if row is not None]
    assert [row for batch in batches for row in batch.to_pylist()] == whole
    longest = max((len(row.encode()) for row in whole), default=0)
    sizes = [sum(len(row.encode()) for row in batch.to_pylist()) for batch in batches]
    assert max(sizes, default=0) <= 2 * (max_bytes + longest)


@pytest.mark.parametrize(("begin", "end"), [(0, 9), (0, 4), (2, 7), (5, 6), (8, 9)])
def test_columns_are_read_from_several_files(tmp_path, begin, end):
    parts = []
    for part, (first, last) in enumerate(((0, 5), (5, 9))):
        with ArrowWriter(path=str(tmp_path / f"{part}.arrow"), writer_batch_size=2) as writer:
            for number in range(first, last):
                writer.write({"text": str(number)})
            writer.finalize()
        parts.append(datasets.Dataset.from_file(str(tmp_path / f"{part}.arrow")))
    data = datasets.concatenate_datasets(parts)
    assert len(data.cache_files) == 2
    read = [row for piece in rows.read_column(data, "text", begin, end) for row in piece]
    assert [row.as_py() for row in read] == [str(number) for number in range(begin, end)]


# The corpus that every machine has


def test_the_standard_library_is_a_corpus():
    splits = stdlib.read_stdlib()
    size = {split: sum(len(row.encode()) for row in rows) for split, rows in splits.items()}
    assert [*size] == ["train", "validation", "test"]
    assert 8e6 < sum(size.values()) < 20e6
    assert 0.8 < size["train"] / sum(size.values()) < 0.95
    assert min(size.values()) > 2e5
    assert any("class Random(" in row for rows in splits.values() for row in rows)
    assert not any("test_main()" in row for rows in splits.values() for row in rows)
    assert stdlib.read_stdlib() == splits


def test_tests_and_other_people_s_packages_are_left_out(tmp_path):
    for i in range(60):
        write(tmp_path / "library" / f"module{i}.py", [f"number = {i}"])
    expected = sorted(f"number = {i}\n" for i in range(60))
    left_out = ("test", "tests", "site-packages", "a/__pycache__", "idlelib/idle_test")
    for folder in left_out:
        write(tmp_path / "library" / folder / "x.py", ["left out"])
    write(tmp_path / "library" / "_sysconfigdata_linux.py", ["left out"])
    (tmp_path / "library" / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "library" / "gone.py").symlink_to(tmp_path / "absent.py")
    splits = stdlib.read_stdlib(tmp_path / "library")
    assert sorted(row for rows in splits.values() for row in rows) == expected
    (tmp_path / "library").rename(tmp_path / "elsewhere")
    assert stdlib.read_stdlib(tmp_path / "elsewhere") == splits
    (tmp_path / "empty").mkdir()
    complaint(lambda: stdlib.read_stdlib(tmp_path / "empty"), "python-stdlib", tmp_path / "empty")


def test_the_default_corpus_has_a_vocabulary_of_its_own(tmp_path):
    corpus = Corpus(Source(), cache_dir=str(tmp_path))
    stats = {split: corpus.stats(split) for split in ("train", "validation", "test")}
    assert 20_000 < len(corpus.vocab) < 40_000
    assert 2e6 < stats["train"].num_tokens < 5e6
    assert stats["train"].num_unk == 0
    assert 0 < stats["validation"].num_unk < 0.05 * stats["validation"].num_tokens
    assert 0 < stats["test"].num_unk < 0.05 * stats["test"].num_tokens


# Token files


@pytest.fixture
def corpus(tmp_path):
    return Corpus(
        Source(data_files=files(tmp_path)), "whitespace", cache_dir=str(tmp_path / "cache")
    )


def test_token_files_hold_the_ids_of_the_text(corpus):
    assert corpus.vocab.tokens == ["<eos>", "cat", "the", "dog", "sat", "é", "<unk>"]
    for split, lines in SPLITS.items():
        ids = corpus.vocab.encode("".join(line + "\n" for line in lines))
        assert corpus.tokens(split)[:].tolist() == ids
        assert len(corpus.tokens(split)) == len(ids)


def test_statistics_of_a_split(corpus):
    assert corpus.stats("train")[:3] == (11, 0, sum(len(f"{x}\n".encode()) for x in LINES))
    counts = Counter(["the", "cat", "sat", "\n", "\n", "the", "dog", "\n", "é", "cat", "\n"])
    total, size = sum(counts.values()), len(counts) + 1
    nats = -sum(math.log((counts[word] + 1) / (total + size)) for word in ["the", "?", "\n"])
    assert corpus.stats("validation")[:3] == (3, 1, 8)
    assert corpus.stats("validation").unigram_nats == pytest.approx(nats, rel=1e-12)


def test_bytes_are_counted_with_one_line_end_a_row(tmp_path):
    file = write(tmp_path / "a.json", ["é", "b\n", "", "c\nd"])
    corpus = Corpus(Source(data_files={"train": file}), cache_dir=str(tmp_path / "cache"))
    assert corpus.stats("train").num_bytes == 3 + 2 + 1 + 4
    assert corpus.stats("train").num_tokens == 2 + 2 + 1 + 4


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (2**32, "uint32")],
)
def test_ids_take_the_smallest_type_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    with TokenWriter(tmp_path / "tokens.bin", vocab_size) as writer:
        writer.append(np.array([0, vocab_size - 1]))
    tokens = TokenFile(tmp_path / "tokens.bin")
    assert tokens.dtype == dtype
    assert tokens[:].tolist() == [0, vocab_size - 1]


def test_workers_are_given_the_name_of_the_file(tmp_path):
    with TokenWriter(tmp_path / "tokens.bin", 200) as writer:
        writer.append(np.zeros(10**6, np.int64))
    tokens = TokenFile(tmp_path / "tokens.bin")
    assert len(tokens) == 10**6
    sent = pickle.dumps(tokens)
    assert len(sent) < 1000
    assert len(pickle.loads(sent)) == 10**6


def built(corpus):
    return sorted(
        name
        for name in os.listdir(corpus.cache_dir)
        if not name.endswith(".lock")  # locks stay, they are empty
    )


def test_a_split_is_encoded_when_asked_for_and_once(corpus, monkeypatch):
    assert corpus.vocab
    assert [name.split("-")[0] for name in built(corpus)] == ["vocab"]
    corpus.stats("validation")
    assert [name.split("-")[0] for name in built(corpus)] == ["tokens", "vocab"]
    kept = built(corpus)
    monkeypatch.setattr(token_files, "_encode", None)  # encoding again would fail
    monkeypatch.setattr(token_files, "SymbolCounter", None)
    again = Corpus(corpus.source, "whitespace", cache_dir=corpus.cache_dir)
    assert again.vocab == corpus.vocab
    assert again.tokens("validation")[:].tolist() == corpus.tokens("validation")[:].tolist()
    assert built(corpus) == kept


def test_what_the_files_depend_on_is_in_their_names(tmp_path):
    data = files(tmp_path / "whole", train=LINES)
    half = files(tmp_path / "half", train=LINES[:2])

    def made(data=data, **options):
        corpus = Corpus(Source(data_files=data), cache_dir=str(tmp_path / "cache"), **options)
        corpus.tokens("train")
        return built(corpus)

    sizes = [
        len(made()),
        len(made()),
        len(made(tokenizer="whitespace")),
        len(made(max_vocab_size=3)),
        len(made(min_count=2)),
        len(made(half)),
    ]
    assert sizes == [2, 2, 4, 6, 8, 10]


def test_a_given_vocabulary_needs_no_train(tmp_path, corpus, monkeypatch):
    corpus.vocab.save(tmp_path / "vocab.pt")
    elsewhere = Corpus(
        Source(data_files=files(tmp_path / "b", test=["the cow"])),
        tokenizer="words",  # that of the vocabulary holds
        vocab_path=str(tmp_path / "vocab.pt"),
        cache_dir=str(tmp_path / "other"),
    )
    monkeypatch.setattr(token_files, "SymbolCounter", None)  # counting would fail
    assert elsewhere.vocab == corpus.vocab
    assert elsewhere.tokens("test")[:].tolist() == corpus.vocab.encode("the cow\n")
    assert [name.split("-")[0] for name in built(elsewhere)] == ["tokens"]
    missing = Corpus(Source(), vocab_path=str(tmp_path / "absent.pt"))
    complaint(lambda: missing.vocab, "absent.pt")


def test_any_number_of_cores_makes_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "_LEAST_BYTES", 1)
    lines = [" ".join(f"w{i * j % 97}" for j in range(i % 40)) for i in range(200)]
    made = set()
    for num_proc, at_work in ((1, 2**25), (1, 500), (2, 500), (7, 500)):
        monkeypatch.setattr(work, "_BYTES_AT_WORK", at_work)
        data = files(tmp_path / "data", train=lines)
        cache = tmp_path / f"{num_proc}-{at_work}"
        own = Corpus(Source(data_files=data), cache_dir=str(cache), num_proc=num_proc)
        ids = own.tokens("train")[:].tobytes()
        made.add((own.vocab.fingerprint, ids, own.stats("train")))
        assert not [*cache.glob("*/counts*")]
    assert len(made) == 1


def test_an_error_on_a_core_is_the_error(corpus, monkeypatch):
    def symbols(self, rows):
        raise ValueError("one line")

    monkeypatch.setattr(type(load_tokenizer("words")), "symbols", symbols)
    assert complaint(lambda: corpus.vocab) == "one line"


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_what_fails_leaves_nothing_behind(corpus, monkeypatch, stop):
    def encode_rows(self, rows):
        raise stop

    assert corpus.vocab
    before = built(corpus)
    with monkeypatch.context() as patch:
        patch.setattr(Vocab, "encode_rows", encode_rows)
        with pytest.raises(stop):
            corpus.tokens("train")
    assert built(corpus) == before
    assert len(corpus.tokens("train")) == 11


def test_what_a_killed_process_left_is_in_nobody_s_way(corpus):
    whole = corpus.tokens("train")
    partial = whole.path.parent.with_suffix(".partial")
    whole.path.parent.rename(partial)
    (partial / "tokens.bin").write_bytes(b"half")
    assert len(corpus.tokens("train")) == 11
    assert not partial.exists()


def damages(whole):
    """What may become of a file: name, and its bytes."""
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    yield "one bit", bytes(flipped)
    yield "cut off", whole[:-1]
    yield "header alone", whole[:4096]
    yield "half a header", whole[:50]
    yield "empty", b""
    yield "one more", whole + b"\0"
    yield "foreign", b"\0" * len(whole)
    yield "another version", whole.replace(b'"version": 1', b'"version": 9')
    yield "another type", whole.replace(b'"dtype": "uint8"', b'"dtype": "int64"')


def forged(path, **changes):
    """A token file with another header that passes its checksum."""
    whole = path.read_bytes()
    header = json.loads(whole[len(MAGIC) : whole.index(b"\n", len(MAGIC))])
    text = MAGIC + json.dumps(header | changes).encode()
    path.unlink()
    path.write_bytes((text + b"\n%08x\n" % zlib.crc32(text)).ljust(4096) + whole[4096:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "is of another version than 1"),
        ({"flags": 1}, "is of another version than 1"),
        ({"dtype": "int8"}, "is damaged: int8 ids of 9"),
        ({"vocab_size": 300}, "is damaged: uint8 ids of 300"),
        ({"num_tokens": 6}, "is damaged: 4101 bytes of 4102"),
        ({"num_tokens": 4}, "is damaged: 4101 bytes of 4100"),
        ({"crc32": 0}, "its ids fail their checksum"),
    ],
)
def test_headers_are_not_taken_at_their_word(tmp_path, changes, message):
    path = tmp_path / "tokens.bin"
    with TokenWriter(path, 9) as writer:
        writer.append(np.arange(5))
    forged(path)
    assert TokenFile(path)[:].tolist() == [*range(5)]
    forged(path, **changes)
    complaint(lambda: TokenFile(path), message)


def test_long_token_files_are_checked_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "_CHUNK", 7)
    with TokenWriter(tmp_path / "tokens.bin", 300) as writer:
        writer.append(np.arange(200))
        writer.append(np.arange(99))
    assert len(TokenFile(tmp_path / "tokens.bin")) == 299
    with TokenWriter(tmp_path / "empty.bin", 300):
        pass
    assert TokenFile(tmp_path / "empty.bin")[:].tolist() == []


def test_a_writer_that_fails_leaves_no_header(tmp_path):
    path = tmp_path / "tokens.bin"
    with pytest.raises(ValueError, match="invalid literal"), TokenWriter(path, 9) as writer:
        writer.append(np.array(["no number"]))
    complaint(lambda: TokenFile(path), "is no token file")


def test_ids_are_on_the_disk_before_their_name(corpus, monkeypatch):
    """A header with its checksum is the last to be written, and then forced to the disk."""
    forced, force = {}, os.fsync

    def fsync(descriptor):
        for path in Path(corpus.cache_dir).rglob("tokens.bin"):
            forced[path.parent.suffix] = path.read_bytes()
        force(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    path = corpus.tokens("train").path
    assert forced[".partial"] == path.read_bytes()


def test_damaged_token_files_are_made_again(corpus, caplog):
    path = corpus.tokens("train").path
    whole, ids = path.read_bytes(), corpus.tokens("train")[:].tolist()
    for name, content in damages(whole):
        assert content != whole, name
        path.unlink()  # another file: the checksum of each is looked at once
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            TokenFile(path)
        assert "\n" not in str(caught.value)
        caplog.clear()
        again = Corpus(corpus.source, "whitespace", cache_dir=corpus.cache_dir)
        assert again.tokens("train")[:].tolist() == ids, name
        assert "making it again" in caplog.text
        assert path.read_bytes() == whole


def test_ids_of_another_vocabulary_are_made_again(corpus, tmp_path):
    path = corpus.tokens("train").path
    ids = corpus.tokens("train")[:].tolist()
    with TokenWriter(path, 9) as writer:
        writer.about = {"vocab": "another", "stats": corpus.stats("train")._asdict()}
        writer.append(np.arange(9))
    again = Corpus(corpus.source, "whitespace", cache_dir=corpus.cache_dir)
    assert again.tokens("train")[:].tolist() == ids


def test_a_damaged_vocabulary_is_counted_again(corpus, caplog):
    vocab = corpus.vocab
    (path,) = (file for file in Path(corpus.cache_dir).glob("vocab-*/vocab.pt"))
    whole = path.read_bytes()
    for content in (b"", whole[:99], whole.replace(b"cat", b"cow"), pickle.dumps({"tokens": []})):
        path.write_bytes(content)
        caplog.clear()
        assert Corpus(corpus.source, "whitespace", cache_dir=corpus.cache_dir).vocab == vocab
        assert "making it again" in caplog.text


def test_a_cache_that_can_only_be_read_is_enough(corpus, monkeypatch):
    ids = corpus.tokens("train")[:].tolist()
    monkeypatch.setattr(token_files, "FileLock", None)  # nothing is locked or written
    again = Corpus(corpus.source, "whitespace", cache_dir=corpus.cache_dir)
    assert again.tokens("train")[:].tolist() == ids


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    data = files(tmp_path, train=["a"])
    (tmp_path / "file").touch()
    corpus = Corpus(Source(data_files=data), cache_dir=str(tmp_path / "file"))
    complaint(lambda: corpus.vocab, "cannot write to the cache folder", tmp_path / "file")


def test_the_cache_folder_can_be_named_by_the_environment(tmp_path, monkeypatch):
    data = files(tmp_path, train=["a"])
    monkeypatch.setenv("LM_SOFTMAX_CACHE", str(tmp_path / "named"))
    assert Corpus(Source(data_files=data)).vocab
    assert any((tmp_path / "named").iterdir())


def test_impossible_limits_are_told_before_any_work():
    complaint(lambda: Corpus(Source("absent"), max_vocab_size=1), "max_vocab_size=1")
    complaint(lambda: Corpus(Source("absent"), min_count=0), "min_count=0")


RACE = """
import json, sys, time
from lm_softmax.corpus import Corpus, Source, token_files

def logged(build):
    def slowly(*arguments, **options):
        with open(sys.argv[3], "a") as log:
            log.write("built\\n")
        time.sleep(1)
        return build(*arguments, **options)
    return slowly

token_files._encode = logged(token_files._encode)
token_files.Vocab.build = logged(token_files.Vocab.build)
corpus = Corpus(Source(data_files=json.loads(sys.argv[1])), cache_dir=sys.argv[2])
print("ready", flush=True)
sys.stdin.read()
print(len(corpus.tokens("train")))
"""


def test_two_processes_at_once_build_once(tmp_path):
    arguments = [json.dumps(files(tmp_path)), str(tmp_path / "cache"), str(tmp_path / "log")]
    command = [sys.executable, "-c", RACE, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen(command, **pipes) as one,
        subprocess.Popen(command, **pipes) as other,
    ):
        assert [process.stdout.readline() for process in (one, other)] == ["ready\n"] * 2
        for process in (one, other):  # both imported all they need: now they race
            process.stdin.close()
        assert [process.stdout.read() for process in (one, other)] == ["11\n"] * 2
    assert one.returncode == other.returncode == 0
    assert (tmp_path / "log").read_text() == "built\n" * 2  # a vocabulary and a split


# Real text


@pytest.mark.skipif(
    not os.path.isdir(os.path.join(SHARED, "wikitext")),
    reason="the environment variable LM_SOFTMAX_DATA names no folder with wikitext",
)
def test_wikitext_2_has_the_published_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_SOFTMAX_DATA", SHARED)
    corpus = Corpus(
        Source("Salesforce/wikitext", "wikitext-2-v1"), "whitespace", cache_dir=str(tmp_path)
    )
    assert len(corpus.vocab) == 33_278
    assert [corpus.stats(split).num_tokens for split in SPLITS] == [2_088_628, 217_646, 245_569]
    assert corpus.tokens("train").dtype == "uint16"
    assert corpus.vocab.tokens[:4] == ["the", ",", ".", "of"]
    assert isinstance(corpus.stats("test"), SplitStats)
