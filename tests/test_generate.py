"""The command that continues and scores texts, on tiny models with vocabularies of their own."""

import io
import json
import math
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lm_softmax.decoding import beam_search, generate
from lm_softmax.encoders import LSTMEncoder, TransformerEncoder
from lm_softmax.generate import main
from lm_softmax.generate.texts import Detokenizer
from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax
from lm_softmax.module import LanguageModel
from lm_softmax.vocab import SymbolCounter, Vocab
from lm_softmax.vocab.huggingface import HuggingFaceTokenizer
from lm_softmax.vocab.words import WordTokenizer

TEXT = "the cat sat on the mat .\nthe dog ran to the mat\nthe cat saw the dog and ran .\n" * 3
MODELS = {
    "lstm": partial(LSTMEncoder, embedding_size=6, hidden_size=8),
    "transformer": partial(TransformerEncoder, hidden_size=8, num_heads=2, max_positions=12),
}


def vocabulary(tokenizer, **options):
    counter = SymbolCounter()
    counter.update(tokenizer.symbols(pa.array([TEXT], pa.large_string())))
    return Vocab.build(tokenizer, counter, **options)


def byte_level(text=TEXT):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return HuggingFaceTokenizer(tokenizer.to_str())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A file of each model with words, and of one with bytes."""
    folder = tmp_path_factory.mktemp("checkpoints")
    words, pieces = vocabulary(WordTokenizer("whitespace"), min_count=4), vocabulary(byte_level())
    for name, encoder, vocab in (
        ("lstm", MODELS["lstm"], words),
        ("transformer", MODELS["transformer"], words),
        ("bytes", MODELS["lstm"], pieces),
    ):
        torch.manual_seed(2)
        head = partial(AdaptiveSoftmax, cutoffs=[4]) if name == "lstm" else FullSoftmax
        model = LanguageModel(encoder, head, vocab.counts, vocab=vocab)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        content = {
            "pytorch-lightning_version": pl.__version__,
            "hyper_parameters": dict(model.hparams),
            "state_dict": model.state_dict(),
        }
        torch.save(content, folder / f"{name}.ckpt")
    return folder


class Said(NamedTuple):
    code: int
    out: str
    err: str


def call(*args, given=b""):
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(given), "utf-8")
    try:
        with redirect_stdout(out), redirect_stderr(err):
            try:
                code = main([str(arg) for arg in args])
            except SystemExit as stop:
                code = stop.code
    finally:
        sys.stdin = before
    return Said(code, out.getvalue(), err.getvalue())


def done(*args, given=b""):
    said = call(*args, given=given)
    assert said.code == 0, said.err
    return said


def load(path):
    return LanguageModel.load_from_checkpoint(path).eval()


def row(model, text):
    return torch.tensor([[model.vocab.eos_id, *model.vocab.encode(text)]])


@pytest.mark.parametrize("name", ["lstm", "transformer", "bytes"])
def test_text_is_that_of_the_library(name, checkpoints):
    path = checkpoints / f"{name}.ckpt"
    model, prompts = load(path), ["the cat", "the dog ran"]
    for words, options in (
        (["--temperature", 0], {"temperature": 0}),
        (["--seed", 5, "--temperature", 1.5, "--top-k", 6, "--top-p", 0.9], {"seed": 5}),
    ):
        expected, generator = [], torch.Generator().manual_seed(options.get("seed", 0))
        sampling = {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "generator": generator}
        for prompt in prompts:
            chosen = {"temperature": 0} if "temperature" in options else sampling
            tokens = generate(model.encoder, model.head, row(model, prompt), 20, **chosen)
            text = model.vocab.decode(tokens[0, 1:].tolist())
            assert text.startswith(prompt)
            expected.append(text if text.endswith("\n") else f"{text}\n")
        asked = [word for prompt in prompts for word in ("--prompt", prompt)]
        said = done("--checkpoint", path, *asked, "--num-tokens", 20, *words)
        assert said.out == "\n".join(expected)
        assert said.err.startswith("40 tokens in ")
        assert said.err.endswith(" tokens/s\n")
        again = done("--checkpoint", path, *asked, "--num-tokens", 20, *words, "--no-cache")
        assert again.out == said.out


def test_prompts_of_a_file_and_of_standard_input(checkpoints, tmp_path):
    path = checkpoints / "lstm.ckpt"
    (tmp_path / "prompts").write_bytes(b"the cat\r\nthe dog ran")
    asked = ["--checkpoint", path, "--num-tokens", 5]
    expected = done(*asked, "--prompt", "the cat", "--prompt", "the dog ran").out
    assert done(*asked, "--prompt-file", tmp_path / "prompts").out == expected
    assert done(*asked, "--prompt-file", "-", given=b"the cat\nthe dog ran\n").out == expected
    marked = b"\xef\xbb\xbfthe cat\nthe dog ran\n"  # as some editors begin a file
    assert done(*asked, "--prompt-file", "-", given=marked).out == expected
    both = done(*asked, "--prompt", "the cat", "--prompt-file", "-", given=b"the dog ran\n")
    assert both.out == expected


def test_without_a_prompt_a_text_begins(checkpoints):
    model = load(checkpoints / "lstm.ckpt")
    tokens = generate(model.encoder, model.head, row(model, ""), 6, temperature=0)
    said = done("--checkpoint", checkpoints / "lstm.ckpt", "--num-tokens", 6, "--temperature", 0)
    assert said.out.rstrip("\n") == model.vocab.decode(tokens[0, 1:].tolist()).rstrip("\n")


def test_no_unk_and_an_end_at_eos(checkpoints):
    asked = ["--checkpoint", checkpoints / "lstm.ckpt", "--temperature", 2, "--num-tokens", 300]
    said = done(*asked)
    assert "<unk>" in said.out
    assert "\n" in said.out.strip("\n")
    assert "<unk>" not in done(*asked, "--no-unk").out
    said = done(*asked, "--stop-at-eos")
    assert said.out.endswith("\n")
    assert "\n" not in said.out[:-1]
    assert int(said.err.split()[0]) == len(said.out.split()) + 1 < 300


def test_beams_are_json_lines(checkpoints):
    model, prompts = load(checkpoints / "transformer.ckpt"), ["the cat", "the dog ran"]
    asked = ["--prompt", prompts[0], "--prompt", prompts[1], "--num-tokens", 14, "--beams", 4]
    asked += ["--n-best", 3, "--length-penalty", 0.5, "--stop-at-eos", "--no-unk"]
    said = done("--checkpoint", checkpoints / "transformer.ckpt", *asked)
    lines = [json.loads(line) for line in said.out.splitlines()]
    vocab, expected = model.vocab, []
    options = {"num_beams": 4, "num_return": 3, "length_penalty": 0.5, "eos_id": vocab.eos_id}
    for prompt in prompts:
        (found,) = beam_search(
            model.encoder, model.head, row(model, prompt), 14, suppress=[vocab.unk_id], **options
        )
        for rank, hypothesis in enumerate(found, start=1):
            expected.append((prompt, rank, hypothesis))
    assert len(lines) == len(expected) == 6
    for line, (prompt, rank, hypothesis) in zip(lines, expected, strict=True):
        assert (line["prompt"], line["rank"]) == (prompt, rank)
        assert line["text"] == vocab.decode(hypothesis.tokens)
        assert line["num_tokens"] == len(hypothesis.tokens)
        assert line["score"] == pytest.approx(hypothesis.score, abs=1e-5)
        assert line["log_prob"] == pytest.approx(hypothesis.log_prob, abs=1e-5)


SENTENCES = ["the cat sat", "", "the zebra ran to the mat . the dog and the cat ran and ran", "a"]


@pytest.mark.parametrize("name", ["lstm", "bytes"])
def test_scores_are_those_of_each_sentence_alone(name, checkpoints, tmp_path):
    path = checkpoints / f"{name}.ckpt"
    model, vocab = load(path), load(path).vocab
    (tmp_path / "text").write_text("\n".join(SENTENCES))
    said = done("--checkpoint", path, "--score", tmp_path / "text", "--per-token")
    lines = [json.loads(line) for line in said.out.splitlines()]
    nats, count = 0.0, 0
    for line, sentence in zip(lines, SENTENCES, strict=True):
        ids = [*vocab.encode(sentence), vocab.eos_id]
        with torch.no_grad():
            hidden, _ = model.encoder(torch.tensor([[vocab.eos_id, *ids[:-1]]]))
            log_probs = model.head.log_prob(hidden)[0][range(len(ids)), ids]
        assert line["tokens"] == [vocab.tokens[id_] for id_ in ids]
        assert line["log_probs"] == pytest.approx(log_probs.tolist(), abs=1e-5)
        assert line["log_prob"] == pytest.approx(float(log_probs.sum()), abs=1e-4)
        assert line["num_tokens"] == len(ids)
        assert line["num_unk"] == ids.count(vocab.unk_id)
        assert line["perplexity"] == pytest.approx(math.exp(-log_probs.mean()), rel=1e-4)
        nats, count = nats + float(log_probs.sum()), count + len(ids)
    assert any(line["num_unk"] for line in lines) == (name == "lstm")
    assert f"4 sentences, {count} tokens, " in said.err
    perplexity = re.search(r"perplexity ([\d.]+);", said.err)[1]
    assert float(perplexity) == pytest.approx(math.exp(-nats / count), rel=1e-4)
    short = done("--checkpoint", path, "--score", "-", given="\n".join(SENTENCES).encode())
    for line, whole in zip(short.out.splitlines(), lines, strict=True):
        assert json.loads(line) == {key: whole[key] for key in list(whole)[:4]}


def test_rows_of_text_are_cut_apart():
    vocab = vocabulary(WordTokenizer("words"))
    rows = ["the cat", "", "a <eos> dog", "mat."]
    found = vocab.encode_each(rows)
    for ids, text in zip(found, rows, strict=True):
        assert ids.tolist() == [*vocab.encode(text), vocab.eos_id]
    assert np.array_equal(
        np.concatenate(found), vocab.encode_rows(pa.array(rows, pa.large_string()))
    )
    assert vocab.encode_each([]) == []


@pytest.mark.parametrize("size", [1, 3])
def test_pieces_of_text_join_to_the_whole(size):
    text = "the caf\u00e9 \U0001f408 sat\n\nthe m\u00e4t \u00e9\n"
    for tokenizer in (WordTokenizer("whitespace"), WordTokenizer("words"), byte_level()):
        vocab = vocabulary(tokenizer)
        ids = [*vocab.encode(text), vocab.eos_id, vocab.eos_id, *vocab.encode("the \u00e9")]
        stream = Detokenizer(vocab)
        pieces = [stream.add(ids[i : i + size]) for i in range(0, len(ids), size)]
        assert len([piece for piece in pieces if piece]) > len(ids) // (4 * size)
        assert "".join([*pieces, stream.rest()]) == vocab.decode(ids)
        assert "\ufffd" not in "".join(pieces)
        broken = vocab.encode("\U0001f408")[:1]  # a first byte alone, with bytes
        stream = Detokenizer(vocab)
        assert stream.add(broken) + stream.rest() == vocab.decode(broken)


X = ["--checkpoint", "{}/lstm.ckpt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --checkpoint"),
        (["--checkpoint", "nowhere.ckpt"], "no checkpoint nowhere.ckpt"),
        (["--checkpoint", "{}"], " is a folder: name a checkpoint in it\n"),
        (["--checkpoint", "{}/damaged.ckpt"], "damaged.ckpt is damaged or incomplete"),
        (
            ["--checkpoint", "{}/other.ckpt"],
            "other.ckpt is not the checkpoint of a language model: it has no hyper_parameters\n",
        ),
        (["--checkpoint", "{}/weightless.ckpt"], "of a language model: it has no state_dict\n"),
        (["--checkpoint", "{}/countless.ckpt"], "it has no hyper_parameters['counts']\n"),
        (["--checkpoint", "{}/tensor.ckpt"], "of a language model: it has no state_dict\n"),
        (["--checkpoint", "{}/versionless.ckpt"], "model: it has no pytorch-lightning_version\n"),
        (["--checkpoint", "{}/wordy.ckpt"], "it has no tensor state_dict['head.weight']\n"),
        ([*X[:1], "{}/nan.ckpt", "--temperature", "0"], "no most probable word, but nan"),
        (["--checkpoint", "{}/alien.ckpt"], "alien.ckpt holds a model that cannot be built: "),
        (["--checkpoint", "{}/wordless.ckpt"], "wordless.ckpt holds no vocabulary"),
        (["--checkpoint", "{}/text"], "no archive that torch.save wrote"),
        ([*X, "--prompt", ""], "prompt '' is empty: give a word, or leave it out"),
        ([*X, "--prompt", "the", "--prompt", " \t"], "prompt ' \\t' is empty"),
        (
            [*X, "--prompt", "zebra gnu"],
            "prompt 'zebra gnu' has no word that is among the 8 known ones",
        ),
        ([*X, "--prompt", "the \udcff"], "is not UTF-8"),
        ([*X, "--prompt-file", "nowhere"], "No such file or directory: nowhere"),
        ([*X, "--prompt-file", "{}"], "Is a directory: "),
        ([*X, "--prompt-file", "{}/empty"], "empty holds no prompt"),
        (
            [*X, "--prompt-file", "{}/blank"],
            "/blank: line 2 '' is empty: give a word, or leave it out",
        ),
        ([*X, "--prompt-file", "{}/foreign"], "foreign: line 3 'zebra gnu' has no word that is"),
        ([*X, "--prompt-file", "-"], "error: standard input holds no prompt\n"),
        ([*X, "--score", "-"], "error: standard input holds no sentence\n"),
        ([*X, "--prompt", "gnu" * 99_999], f"error: prompt '{'gnu' * 20}...' has no word that"),
        ([*X, "--prompt-file", "{}/latin1"], "latin1: line 2 is not UTF-8"),
        ([*X, "--score", "{}/latin1"], "latin1: line 2 is not UTF-8"),
        ([*X, "--score", "nowhere"], "No such file or directory: nowhere"),
        ([*X, "--score", "{}/empty"], "empty holds no sentence"),
        ([*X, "--num-tokens", "0"], "num_tokens must be at least 1, got 0"),
        ([*X, "--num-tokens", str(2**63)], f"num_tokens must be below 2**63, got {2**63}"),
        ([*X, "--num-tokens", str(2**63), "--beams", "2"], "num_tokens must be below 2**63, got"),
        ([*X, "--num-tokens", "9" * 5000], "argument --num-tokens: invalid int value: ...\n"),
        (
            [*X, "--beams", "99999999", "--num-tokens", "99"],
            "num_beams=99999999 of 1 prompts would",
        ),
        ([*X, "--num-tokens", "x"], "argument --num-tokens: invalid int value: 'x'"),
        ([*X, "--temperature", "-1"], "temperature must be at least 0 (0 is greedy), got -1.0"),
        ([*X, "--temperature", "nan"], "temperature must be at least 0 (0 is greedy), got nan"),
        ([*X, "--top-k", "0"], "top_k must be in [1, vocab_size=8], got 0"),
        ([*X, "--top-k", "9", "--no-unk"], "top_k must be in [1, vocab_size=8], got 9"),
        ([*X, "--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
        ([*X, "--top-p", "1.5"], "top_p must be in (0, 1], got 1.5"),
        ([*X, "--beams", "0"], "num_beams must be at least 1, got 0"),
        ([*X, "--beams", "2", "--n-best", "3"], "num_return must be in [1, num_beams=2], got 3"),
        ([*X, "--beams", "2", "--length-penalty", "1"], "different lengths: add --stop-at-eos"),
        ([*X, "--beams", "2", "--top-k", "3"], "--top-k means nothing with --beams, only with"),
        ([*X, "--beams", "2", "--temperature", "0"], "--temperature means nothing with --beams"),
        ([*X, "--beams", "2", "--seed", "3"], "--seed means nothing with --beams, only with"),
        ([*X, "--n-best", "2"], "--n-best means nothing with sampling, only with --beams"),
        ([*X, "--per-token"], "--per-token means nothing with sampling, only with --score"),
        ([*X, "--score", "-", "--prompt", "a"], "--prompt means nothing with --score, only with"),
        ([*X, "--seed", "-1"], "--seed must be in [0, 2**63), got -1"),
        ([*X, "--device", "tpu"], "--device must be cpu, cuda or cuda:N, got tpu"),
        ([*X, "--device", "cuda:99"], "--device cuda:99: torch sees "),
        ([*X, "--temp", "1"], "unrecognized arguments: --temp 1"),
        (["--checkpoint", "{}/bytes.ckpt", "--no-unk"], "--no-unk: the vocabulary has no <unk>"),
    ],
)
def test_a_wrong_command_ends_in_one_line(words, message, checkpoints):
    for name, content in {
        "text": b"hello",
        "empty": b"",
        "blank": b"the cat\n\nthe dog\n",
        "foreign": b"the cat\r\nthe dog\r\nzebra gnu\r\n",
        "latin1": b"the\n\xe9t\xe9\n",
        "damaged.ckpt": (checkpoints / "lstm.ckpt").read_bytes()[:-3000],
    }.items():
        (checkpoints / name).write_bytes(content)
    torch.save({"state_dict": {}}, checkpoints / "other.ckpt")
    content = torch.load(checkpoints / "lstm.ckpt", weights_only=True)
    hparams = content["hyper_parameters"]
    changed = {
        "wordless": hparams | {"vocab": None},
        "countless": {name: value for name, value in hparams.items() if name != "counts"},
        "alien": hparams | {"head": {"class_path": "my_heads.Mine", "init_args": {}}},
    }
    torch.save({"hyper_parameters": hparams}, checkpoints / "weightless.ckpt")
    torch.save(torch.zeros(2), checkpoints / "tensor.ckpt")
    version = content.pop("pytorch-lightning_version")
    torch.save(content, checkpoints / "versionless.ckpt")
    content["pytorch-lightning_version"] = version
    weights = content["state_dict"]
    torch.save(
        content | {"state_dict": {**weights, "head.weight": "?"}}, checkpoints / "wordy.ckpt"
    )
    weights = {name: value * math.nan for name, value in weights.items()}
    torch.save(content | {"state_dict": weights}, checkpoints / "nan.ckpt")
    for name, parts in changed.items():
        torch.save(content | {"hyper_parameters": parts}, checkpoints / f"{name}.ckpt")
    said = call(*(word.format(checkpoints) for word in words))
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert message in said.err


def test_ctrl_c(checkpoints, monkeypatch):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(LSTMEncoder, "forward", press)
    said = call("--checkpoint", checkpoints / "lstm.ckpt", "--prompt", "the cat")
    assert (said.code, said.out, said.err) == (130, "the cat", "\ninterrupted\n")


def test_a_reader_that_leaves(checkpoints):
    command = [sys.executable, "-m", "lm_softmax.generate", "--num-tokens", "100000"]
    command += ["--checkpoint", str(checkpoints / "lstm.ckpt"), "--prompt", "the cat"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.read(7) == "the cat"  # while it is being made
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (141, "")


def test_no_more_is_kept_than_was_made(checkpoints, monkeypatch):
    """The largest number of tokens costs what is made until a text ends."""
    asked = ["--checkpoint", checkpoints / "lstm.ckpt", "--prompt", "the cat", "--stop-at-eos"]
    asked += ["--temperature", 2]
    few, most = (done(*asked, "--num-tokens", number) for number in (300, 2**63 - 1))
    assert few.out == most.out


def test_a_full_disk_and_closed_streams(checkpoints):
    asked = [sys.executable, "-m", "lm_softmax.generate", "--num-tokens", "3"]
    asked += ["--checkpoint", str(checkpoints / "lstm.ckpt")]
    for stream, code, expected in (
        ("> /dev/full", 2, "error: No space left on device: standard output\n"),
        (">&-", 2, "error: standard output is closed\n"),
        ("2>&-", 0, ""),
    ):
        ended = subprocess.run(
            ["sh", "-c", f'"$@" {stream}', "sh", *asked], capture_output=True, text=True
        )
        assert (ended.returncode, ended.stderr) == (code, expected)
