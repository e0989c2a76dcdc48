"""Tokenizers against `str.split`, `re.findall` and the tokenizers library row by row."""

import re
from types import SimpleNamespace

import pyarrow as pa
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from lm_softmax.vocab import hub_reachable, is_hub_id, load_tokenizer, one_line, tokenization
from lm_softmax.vocab.huggingface import HuggingFaceTokenizer

PIECE = re.compile(r"[A-Za-z]+|\d|[^\sA-Za-z\d]")
SPACES = [chr(c) for c in range(0x110000) if chr(c).isspace() and chr(c) != "\n"]
NO_SPACES = ["\u180e", "\u200b", "\u2060", "\ufeff", "\x00", "\x1b"]
CUT = {"whitespace": str.split, "words": PIECE.findall}
kinds = pytest.mark.parametrize("kind", CUT)

texts = st.text(
    st.one_of(
        st.sampled_from([*"ab Z09_,.é٣\n\n", *SPACES, *NO_SPACES]),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=40,
)


def rows_of(texts):
    return pa.array(texts, pa.large_string())


def reference(kind, row):
    """Symbols of a row, line by line; `<eos>` is a line end."""
    symbols = []
    for line in row.removesuffix("\n").split("\n"):
        symbols += [*CUT[kind](line), "\n"]
    return ["\n" if s == "<eos>" and kind == "whitespace" else s for s in symbols]


@kinds
@settings(deadline=None)
@given(rows=st.lists(texts, max_size=5), skipped=st.integers(0, 2))
def test_words_are_those_of_python(kind, rows, skipped):
    expected = [symbol for row in rows[skipped:] for symbol in reference(kind, row)]
    assert load_tokenizer(kind).symbols(rows_of(rows)[skipped:]).to_pylist() == expected


@kinds
@pytest.mark.parametrize(
    "row", ["", "\n", "\n\n", "a", "a\n", "a\n\n", " a \n b", "<eos> x<eos>", "a\r\nb", "  "]
)
def test_a_line_end_is_one_eos_and_a_trailing_one_opens_no_line(kind, row):
    symbols = load_tokenizer(kind).symbols(rows_of([row])).to_pylist()
    assert symbols == reference(kind, row)
    assert symbols[-1] == "\n"


@kinds
def test_all_of_unicode(kind):
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and c != ord("\n")]
    row = "".join(every)
    symbols = load_tokenizer(kind).symbols(rows_of([row])).to_pylist()
    assert symbols == [*CUT[kind](row), "\n"]


@kinds
@pytest.mark.parametrize("space", [*SPACES, *NO_SPACES], ids=ascii)
def test_each_space_separates_and_nothing_else_does(kind, space):
    row = f"{space}ab{space}c{space}{space}d{space}"
    assert load_tokenizer(kind).symbols(rows_of([row])).to_pylist() == reference(kind, row)


@kinds
def test_one_very_long_line(kind):
    row = "word, " * 500_000 + "x" * 3_000_000
    symbols = load_tokenizer(kind).symbols(rows_of([row]))
    assert len(symbols) == (500_000 if kind == "whitespace" else 1_000_000) + 2
    assert symbols[-2].as_py() == "x" * 3_000_000


@kinds
@pytest.mark.parametrize(
    ("text", "expected"),
    [("", []), ("a b", ["a", "b"]), ("a\nb", ["a", "\n", "b"]), ("a\n", ["a", "\n"])],
)
def test_open_text_ends_without_eos(kind, text, expected):
    assert load_tokenizer(kind).open_symbols(text).to_pylist() == expected


@kinds
def test_decoding_puts_blanks_between_words_and_lines_at_eos(kind):
    tokenizer = load_tokenizer(kind)
    assert tokenizer.decode(["a", "b", "\n", "\n", "c", "\n"]) == "a b\n\nc\n"
    assert tokenizer.decode([]) == ""


# Hugging Face


def byte_level(specials=("<|endoftext|>",)):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(alphabet), "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*specials])
    return tokenizer


def word_level(*tokens, unk="[UNK]"):
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(texts, min_size=1, max_size=4))
def test_ids_are_those_of_the_library_with_one_eos_a_row(rows):
    theirs = byte_level()
    tokenizer = HuggingFaceTokenizer(theirs.to_str())
    eos = theirs.token_to_id("<|endoftext|>")
    expected = [i for row in rows for i in [*theirs.encode(row).ids, eos]]
    assert tokenizer.symbols(rows_of(rows)).to_pylist() == expected
    assert tokenizer.open_symbols(rows[0]).to_pylist() == theirs.encode(rows[0]).ids


def test_truncation_padding_and_templates_of_the_file_are_off():
    theirs = byte_level()
    plain = theirs.encode("the the theatre").ids
    theirs.enable_truncation(2)
    theirs.enable_padding(length=9)
    theirs.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = HuggingFaceTokenizer(theirs.to_str())
    assert tokenizer.symbols(rows_of(["the the theatre"])).to_pylist() == [*plain, 0]
    assert tokenizer.open_symbols("the the theatre").to_pylist() == plain


def test_decoding_is_the_library_s_with_eos_as_a_line_end():
    tokenizer = HuggingFaceTokenizer(byte_level().to_str())
    rows = ["the thé", "", "a\nb"]
    assert tokenizer.decode(tokenizer.symbols(rows_of(rows)).to_pylist()) == "the thé\n\na\nb\n"


def test_eos_is_the_tokenizer_s_own_or_added(tmp_path):
    def eos_of(tokenizer, eos=None):
        loaded = HuggingFaceTokenizer(tokenizer.to_str(), eos)
        return loaded.eos, loaded.symbols(rows_of(["a"])).to_pylist()

    assert eos_of(word_level("[UNK]", "a", "</s>")) == ("</s>", [1, 2])
    assert eos_of(word_level("[UNK]", "a", "</s>", "[SEP]"), "[SEP]") == ("[SEP]", [1, 3])
    assert eos_of(word_level("[UNK]", "a")) == ("<eos>", [1, -1])
    assert eos_of(word_level("[UNK]", "a"), "absent") == ("<eos>", [1, -1])


def test_unknown_token_is_the_one_of_the_model():
    unigram = Tokenizer(models.Unigram([("<x>", 0.0), ("a", -1.0)], unk_id=0))
    assert HuggingFaceTokenizer(unigram.to_str()).unk == "<x>"
    assert HuggingFaceTokenizer(word_level("[UNK]", "a").to_str()).unk == "[UNK]"
    assert HuggingFaceTokenizer(word_level("<unk>", "a", unk="absent").to_str()).unk == "<unk>"
    assert HuggingFaceTokenizer(byte_level().to_str()).unk is None


def test_an_unknown_token_that_ends_rows_is_none():
    assert HuggingFaceTokenizer(word_level("</s>", "a", unk="</s>").to_str()).unk is None
    both = word_level("</s>", "a", "<unk>", unk="</s>")
    assert HuggingFaceTokenizer(both.to_str()).unk == "<unk>"


def test_text_that_a_tokenizer_has_no_token_for_is_one_line():
    tokenizer = HuggingFaceTokenizer(word_level("a", unk="absent").to_str())
    assert tokenizer.open_symbols("a").to_pylist() == [0]
    for call in (lambda: tokenizer.symbols(rows_of(["a b"])), lambda: tokenizer.open_symbols("b")):
        with pytest.raises(ValueError, match="unknown token must be in its vocabulary") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("eos_token", ['"[SEP]"', '{"content": "[SEP]"}'])
def test_loading_a_file_or_its_folder_with_the_eos_of_its_config(tmp_path, eos_token):
    word_level("[UNK]", "a", "</s>", "[SEP]").save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).eos == "</s>"
    (tmp_path / "tokenizer_config.json").write_text(f'{{"eos_token": {eos_token}}}')
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(str(path))
        assert tokenizer.eos == "[SEP]"
        again = tokenization.from_state_dict(tokenizer.state_dict())
        assert again.symbols(rows_of(["a b"])).to_pylist() == [1, 0, 3]


@kinds
def test_word_tokenizers_come_back_from_their_state(kind):
    again = tokenization.from_state_dict(load_tokenizer(kind).state_dict())
    assert again.symbols(rows_of(["a,b"])).to_pylist() == reference(kind, "a,b")


def test_what_is_no_tokenizer_is_one_line(tmp_path):
    def complaint(name):
        with pytest.raises(ValueError, match=re.escape(str(name))) as caught:
            load_tokenizer(str(name))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no file" in complaint(tmp_path)  # a folder without a tokenizer.json
    assert "there is no file" in complaint(tmp_path / "a" / "b" / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{'model'")
    assert "not a tokenizer.json" in complaint(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    assert "cannot read" in complaint(tmp_path)
    word_level("[UNK]", "a").save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"
    for content, said in {
        "[]": "holds a list, not an object",
        '{"eos_token": {"id": 3}}': 'eos_token {"id": 3} of tokenizer_config.json names no token',
        '{"eos_token": 3}': "eos_token 3 of",
        "{": "tokenizer.json",
    }.items():
        config.write_text(content)
        assert said in complaint(tmp_path)
    assert "could not be reached" in complaint("nobody/nothing")
    assert "neither 'whitespace' nor 'words'" in complaint("whitespaces")


def answer(status):
    return SimpleNamespace(headers={}, request=None, status_code=status)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GatedRepoError("ask\nfirst", response=answer(403)), "ask first; .*hf auth login"),
        (HfHubHTTPError("busy", response=answer(503)), "busy"),
        (OSError("disk full"), "disk full$"),
    ],
)
@pytest.mark.parametrize("refused", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_cannot_be_fetched_is_one_line(
    refused, error, said, tmp_path, monkeypatch
):
    def download(repo_id, name, *, local_files_only):
        if name == refused:
            raise error
        return str(tmp_path / name)

    monkeypatch.setattr(tokenization, "hub_reachable", lambda repo_id, kind: True)
    monkeypatch.setattr(tokenization, "hf_hub_download", download)
    with pytest.raises(ValueError, match=f"'some/thing'.*: {said}") as caught:
        load_tokenizer("some/thing")
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_fetched_with_its_config(tmp_path, monkeypatch):
    word_level("[UNK]", "a", "[SEP]").save(str(tmp_path / "tokenizer.json"))

    def download(repo_id, name, *, local_files_only):
        asked.append((repo_id, name, local_files_only))
        if not (tmp_path / name).exists():
            raise LocalEntryNotFoundError(name)
        return str(tmp_path / name)

    asked = []
    monkeypatch.setattr(tokenization, "hub_reachable", lambda repo_id, kind: kind == "model")
    monkeypatch.setattr(tokenization, "hf_hub_download", download)
    assert load_tokenizer("somebody/something").eos == "<eos>"
    assert asked == [
        ("somebody/something", "tokenizer.json", False),
        ("somebody/something", "tokenizer_config.json", False),
    ]
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"'somebody/something'.* has no tokenizer\.json"):
        load_tokenizer("somebody/something")


@pytest.mark.parametrize(
    "error",
    [
        OfflineModeIsEnabled("off"),
        TimeoutError("slow"),
        HfHubHTTPError("busy", response=answer(503)),
    ],
)
def test_an_unreachable_hub_is_no_error_by_itself(error, monkeypatch):
    def info(self, repo_id, *, repo_type, timeout):
        assert timeout <= 10
        raise error

    monkeypatch.setattr(HfApi, "repo_info", info)
    assert not hub_reachable("a/b", "dataset")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError("no", response=answer(404)), "no dataset 'a/b' on the Hugging"),
        (HfHubHTTPError("gone\nfar away", response=answer(410)), "refused dataset 'a/b': gone far"),
    ],
)
def test_a_hub_that_refuses_is_one_line(error, message, monkeypatch):
    def info(self, repo_id, *, repo_type, timeout):
        raise error

    monkeypatch.setattr(HfApi, "repo_info", info)
    with pytest.raises(ValueError, match=message) as caught:
        hub_reachable("a/b", "dataset")
    assert "\n" not in str(caught.value)


def test_a_reachable_hub(monkeypatch):
    monkeypatch.setattr(HfApi, "repo_info", lambda self, repo_id, *, repo_type, timeout: object())
    assert hub_reachable("a/b", "dataset")


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "a/b.c_d-e"])
def test_hub_ids(name):
    assert is_hub_id(name)


@pytest.mark.parametrize("name", ["", ".", "./a", "/a", "a/b/c", "a b", "-a", "a//b", "..", "a/"])
def test_no_hub_ids(name):
    assert not is_hub_id(name)


def test_errors_on_one_line():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 1000))) == 300
