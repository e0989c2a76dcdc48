"""Random inputs: each gives a result or one clear line, never a traceback, never a hang.

    python tests/fuzz.py --iterations 5000 --seed 1

Three kinds in turn: bytes as text, values as options, and damaged files of all that we read.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas
import survival
import torch
import yaml

from lm_softmax import cli, compare
from lm_softmax.checkpoint import Checkpoint
from lm_softmax.corpus import Corpus, Source, TokenFile, TokenWriter
from lm_softmax.vocab import Vocab, load_tokenizer

SECONDS = 60  # for one input
MEMORY = 12 * 2**30  # address space: what is too large is refused and harms nobody else
SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet", ".txt.gz")
VALUES = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 10**30, 0.5, -0.5, 1e300, float("nan"), float("inf")),
    *("", " ", "x", "é", "a\nb", "\\0", "..", "/", "/dev/null", "1e9999", "null", "os.system"),
    *([], {}, [1, "a"], {"a": 1}, [[[]]], {"class_path": "os.system"}, {"init_args": 3}),
)
# These wait for other machines, as they are told to, or start processes of their own.
WAIT = ("trainer.num_nodes", "trainer.devices", "trainer.strategy", "data.num_workers")


class Clear(Exception):  # noqa: N818
    """An error of one clear line."""


class Hangs(BaseException):
    """Passes by whatever makes one line of exceptions."""


@contextlib.contextmanager
def clear_or_fine():
    """Lets results pass, makes `Clear` of errors of one line, and lets anything else fail."""
    signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(SECONDS)
    try:
        yield
    except ValueError as error:
        if not str(error) or "\n" in str(error):
            raise AssertionError(f"not one line: {error!r}") from error
        raise Clear(str(error)) from error
    finally:
        signal.alarm(0)


def _hangs(*_):
    raise Hangs(f"{SECONDS} seconds have passed")


def command(*words):
    """A command in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
    lines = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    if code:
        assert code == 2, (code, err.getvalue())
        assert len(lines) == 1, err.getvalue()
        raise Clear(lines[0])


# Bytes as text


def random_text(draw, folder):
    """A file of random bytes, or a true one of its format that was damaged, read as a corpus."""
    suffix = draw.choice(SUFFIXES)
    file = folder / f"a{suffix}"
    if draw.random() < 0.4:
        alphabet = draw.choice(
            [bytes(range(256)), b'ab \n,"{}:[]\\', b"a \n\r\t\0", "é\u2028 ".encode()]
        )
        file.write_bytes(bytes(draw.choices(alphabet, k=draw.choice([0, 1, 10, 1000, 9000]))))
    else:
        _write_text(draw, file)
        if draw.random() < 0.7:
            damage(draw, file)
    tokenizer = draw.choice(["words", "whitespace"])
    corpus = Corpus(
        Source(data_files={"train": str(file)}), tokenizer, cache_dir=str(folder / "cache")
    )
    tokens = corpus.tokens("train")
    assert len(tokens) == corpus.stats("train").num_tokens
    assert tokens[:].max(initial=0) < len(corpus.vocab)


def _write_text(draw, file):
    lines = [" ".join(draw.choices(survival.CORPUS_WORDS, k=draw.randint(0, 9))) for _ in range(30)]
    if file.suffix == ".parquet":
        pandas.DataFrame({"text": lines}).to_parquet(file)
    elif file.suffix == ".csv":
        pandas.DataFrame({"text": lines}).to_csv(file, index=False)
    elif file.suffix in (".json", ".jsonl"):
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    else:
        content = "\n".join(lines).encode()
        file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def damage(draw, file):
    """Cuts a file off, flips some of its bits, or puts bytes in."""
    content = bytearray(file.read_bytes())
    kind = draw.choice(["cut", "flip", "put", "swap"])
    place = draw.randrange(len(content)) if content else 0
    if kind == "cut":
        del content[place:]
    elif kind == "put":
        content[place:place] = draw.randbytes(draw.randint(1, 20))
    elif kind == "swap" and content:
        begin = draw.randrange(len(content))
        content[place : place + 16], content[begin : begin + 16] = (
            content[begin : begin + 16],
            content[place : place + 16],
        )
    elif content:
        for _ in range(draw.choice([1, 1, 8])):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.unlink()
    file.write_bytes(bytes(content))


# Values as options


def leaves(options, path=""):
    """Dotted names of all options of a configuration."""
    for key, value in options.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")


def random_options(draw, folder):
    """A configuration in which some options have random values."""
    config = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    names = [name for name in leaves(config) if not name.startswith(WAIT)]
    for name in draw.sample(names, draw.choice([1, 1, 1, 2, 3])):
        *path, last = name.split(".")
        place = config
        for part in path:
            place = place.get(part) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[last] = draw.choice(VALUES)
    (folder / "random.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(folder / "fuzzed", ignore_errors=True)
    command(
        *("fit", "-c", folder / "random.yaml", "--run", folder / "fuzzed"),
        *("--trainer.fast_dev_run=8", "--trainer.max_time=00:00:00:30"),
    )


# Damaged files


def random_file(draw, folder):
    """A damaged file of one of the kinds that we read."""
    name, read = draw.choice([*READERS.items()])
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    source = folder / name
    file = scratch / source.name
    shutil.copy(source, file)
    for _ in range(draw.choice([1, 1, 2])):
        damage(draw, file)
    read(file)


def _read_config(file):
    command("fit", "-c", file, "--run", file.parent / "fuzzed", "--trainer.fast_dev_run=8")


def _read_run(file):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            compare.main([str(file.parent)])
        except SystemExit as stop:
            code = stop.code
    if code:
        assert (code, err.getvalue().splitlines()[-1][:7]) == (2, "error: "), err.getvalue()
        raise Clear(err.getvalue())


READERS = {
    "run/checkpoints/last.ckpt": lambda file: Checkpoint(file),
    "run/checkpoints/best.ckpt": lambda file: Vocab.load(file),
    "vocab.pt": lambda file: Vocab.load(file),
    "tokens.bin": lambda file: TokenFile(file)[:].sum(),
    "tokenizer.json": lambda file: load_tokenizer(str(file)).complete,
    "run/config.yaml": _read_config,
    "run/metrics.csv": _read_run,
    "run/summary.json": _read_run,
}
KINDS = (random_text, random_options, random_file)


def prepare(folder):
    """A run, and a file of each kind."""
    from tokenizers import Tokenizer, models

    survival.write_corpus(folder / "corpus")
    survival.write_config(folder, "all.yaml")
    os.environ["LM_SOFTMAX_CACHE"] = str(folder / "cache")
    command("fit", "-c", folder / "all.yaml", "--run", folder / "run")
    Vocab.load(folder / "run" / "checkpoints" / "last.ckpt").save(folder / "vocab.pt")
    with TokenWriter(folder / "tokens.bin", 300) as writer:
        writer.append(np.arange(300))
    words = {word: i for i, word in enumerate([*survival.CORPUS_WORDS, "<unk>", "<eos>"])}
    Tokenizer(models.WordLevel(words, "<unk>")).save(str(folder / "tokenizer.json"))


def fuzz(folder, iterations, seed, kinds=KINDS):
    """Tries inputs; how many of each kind gave a result, and how many a clear line.

    Raises:
        AssertionError: For one that gave neither; it names the seed.
    """
    tried: Counter[tuple[str, str]] = Counter()
    for number in range(iterations):
        kind, draw = kinds[number % len(kinds)], random.Random(f"{seed} {number}")
        torch.manual_seed(0)
        try:
            with clear_or_fine():
                kind(draw, folder)
            tried[kind.__name__, "result"] += 1
        except Clear:
            tried[kind.__name__, "clear line"] += 1
        except BaseException as error:
            raise AssertionError(f"{kind.__name__}, seed {seed}, number {number}") from error
    return tried


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-going", action="store_true", help="list all that fail")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-")) / "inputs"  # a path of ".." is not all of /tmp
    folder.mkdir()
    os.chdir(folder)
    prepare(folder)
    if not options.keep_going:
        print(dict(fuzz(folder, options.iterations, options.seed)))  # noqa: T201
        return
    failed = 0
    for number in range(options.iterations):
        kind = KINDS[number % len(KINDS)]
        try:
            with clear_or_fine():
                kind(random.Random(f"{options.seed} {number}"), folder)
        except Clear:
            pass
        except BaseException as error:
            failed += 1
            print(f"{kind.__name__} {number}: {error!r:.300}", flush=True)  # noqa: T201
    print(f"{failed} of {options.iterations} failed")  # noqa: T201
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
