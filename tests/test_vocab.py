"""The vocabulary against `collections.Counter` and a ranking written with `sorted`."""

import pickle
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from lm_softmax.vocab import Counts, SymbolCounter, Vocab, counting, load_tokenizer
from lm_softmax.vocab import symbols as vocab_symbols
from lm_softmax.vocab.huggingface import HuggingFaceTokenizer
from lm_softmax.vocab.symbols import SymbolIndex, hash_symbols

WORDS = load_tokenizer("words")
WHITESPACE = load_tokenizer("whitespace")
quick = settings(deadline=None, max_examples=60)

some_symbols = st.sampled_from(["\n", "<unk>", "a", "b", "c", "d", "é", "z", "😀"])
symbols = st.lists(some_symbols, max_size=40)


def vocab_of(*rows, tokenizer=WHITESPACE, **limits):
    counter = SymbolCounter()
    counter.update(tokenizer.symbols(pa.array(rows, pa.large_string())))
    return Vocab.build(tokenizer, counter, **limits)


def reference(symbols, max_vocab_size, min_count):
    """Tokens and counts: fold what is rare or beyond the limit, then rank."""
    counts = Counter({"<unk>": 0, "<eos>": 0})
    counts.update("<eos>" if s == "\n" else s for s in symbols)
    ordinary = sorted(counts.keys() - {"<unk>", "<eos>"}, key=lambda t: (-counts[t], t))
    kept = [token for token in ordinary if counts[token] >= min_count][: max_vocab_size - 2]
    for token in ordinary:
        if token not in kept:
            counts["<unk>"] += counts.pop(token)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


@quick
@given(symbols, st.integers(3, 12), st.integers(1, 5))
@example(["a", "b", "\n"], 12, 1)  # nothing folded, no unknown word: `<unk>` is there, unseen
@example(["a", "b", "b", "\n"], 3, 1)
@example([], 12, 1)
def test_ranks_and_folding(symbols, max_vocab_size, min_count):
    counter = SymbolCounter()
    counter.update(pa.array(symbols, pa.large_string()))
    vocab = Vocab.build(WHITESPACE, counter, max_vocab_size=max_vocab_size, min_count=min_count)
    expected = reference(symbols, max_vocab_size, min_count)
    assert list(zip(vocab.tokens, vocab.counts.tolist(), strict=True)) == expected
    assert vocab.tokens[vocab.unk_id] == "<unk>"
    assert vocab.tokens[vocab.eos_id] == "<eos>"
    assert vocab.counts.dtype == torch.int64
    assert vocab.counts.sum() == len(symbols)


@quick
@given(symbols, st.randoms())
def test_the_order_of_the_text_does_not_matter(symbols, random):
    def fingerprint():
        counter = SymbolCounter()
        counter.update(pa.array(symbols, pa.large_string()))
        return Vocab.build(WHITESPACE, counter, max_vocab_size=5).fingerprint

    first = fingerprint()
    random.shuffle(symbols)
    assert fingerprint() == first


@pytest.mark.parametrize("merge_at", [0, 5, 2**21])
@quick
@given(batches=st.lists(symbols, max_size=12))
def test_counting_in_batches_is_counting(merge_at, batches):
    before, counting._MERGE_AT = counting._MERGE_AT, merge_at
    try:
        counter = SymbolCounter()
        for batch in batches:
            counter.update(pa.array(batch, pa.large_string()))
        seen, counts, _ = counter.result()
    finally:
        counting._MERGE_AT = before
    expected = Counter(symbol for batch in batches for symbol in batch)
    assert dict(zip(seen.to_pylist(), counts.tolist(), strict=True)) == expected


@pytest.mark.parametrize("spill_at", [0, 3])
@settings(deadline=None, max_examples=8, phases=[Phase.generate])
@given(
    st.lists(st.lists(st.one_of(some_symbols, st.text(max_size=2)), max_size=20), max_size=8),
    st.integers(3, 12),
    st.integers(1, 4),
)
def test_counts_that_go_to_disk_make_the_same_vocabulary(spill_at, batches, most, min_count):
    before, counting._MERGE_AT = counting._MERGE_AT, 2
    try:
        with tempfile.TemporaryDirectory() as folder:
            counters = [SymbolCounter(), SymbolCounter(Path(folder), spill_at)]
            for counter in counters:
                for batch in batches:
                    counter.update(pa.array(batch, pa.large_string()))
            limits = {"max_vocab_size": most, "min_count": min_count}
            one, other = (Vocab.build(WHITESPACE, counter, **limits) for counter in counters)
    finally:
        counting._MERGE_AT = before
    assert one == other


def test_counts_go_to_disk_when_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "_MERGE_AT", 2)
    counter = SymbolCounter(tmp_path, spill_at=3)
    for words in ("a b c", "c d e", "f g h", "c c a"):
        counter.update(pa.array(words.split(), pa.large_string()))
    assert len([*tmp_path.iterdir()]) == 2
    counter.update(pa.array(["b"], pa.large_string()))  # stays in memory
    seen, counts, left_out = counter.result()
    assert left_out == 0
    assert dict(zip(seen.to_pylist(), counts.tolist(), strict=True)) == Counter("abccdefghccab")
    assert len(counter.result()[0]) == 0  # it is empty then
    again = SymbolCounter(tmp_path / "none", spill_at=3)
    assert again.result()[2] == 0


def test_ids_that_go_to_disk_are_all_kept(tmp_path):
    tokenizer = hugging_face("</s>", *"abcdefgh", unk="absent")
    counters = [SymbolCounter(), SymbolCounter(tmp_path, 2)]
    for counter in counters:
        counter.update(tokenizer.symbols(pa.array(["a b b c d e f", "g h"], pa.large_string())))
    one, other = (Vocab.build(tokenizer, counter, max_vocab_size=4) for counter in counters)
    assert [*tmp_path.iterdir()]
    assert one == other


names = st.lists(st.text(max_size=5), unique=True, max_size=30)


@quick
@given(names, st.lists(st.text(max_size=5), max_size=30), st.integers(0, 3))
def test_an_index_is_a_dictionary(known, others, cut):
    wanted = pa.array([*others, *known], pa.large_string())[cut:]
    index = SymbolIndex(pa.array(known, pa.large_string()))
    expected = {symbol: place for place, symbol in enumerate(known)}
    assert index.find(wanted).tolist() == [expected.get(s, -1) for s in wanted.to_pylist()]


def test_symbols_that_meet_in_a_hash_are_told_apart(monkeypatch):
    hashed = []

    def by_length(strings, seed=0):
        hashed.append(seed)
        letters = [s if seed else s[:1] for s in strings.to_pylist()]
        return np.array([sum(map(ord, s)) for s in letters], np.uint64)

    monkeypatch.setattr(vocab_symbols, "hash_symbols", by_length)
    index = SymbolIndex(pa.array(["ab", "ac", "b"], pa.large_string()))
    assert hashed == [0, 1]
    wanted = pa.array(["ac", "ba", "ab", "b", "c"], pa.large_string())  # "ba" meets "ab"
    assert index.find(wanted).tolist() == [1, -1, 0, 2, -1]


def test_hashes_go_by_every_byte():
    near, far = "x" * 100, "x" * 70_000
    strings = ["", "\0", "\0\0", "ab", "ba", near, f"{near}x", far, f"{far}x", f"{far[:-1]}y"]
    strings += [f"y{far[1:]}", f"{far[:65_536]}y{far[65_537:]}"]
    for seed in (0, 1):
        hashes = hash_symbols(pa.array(strings, pa.large_string()), seed)
        assert len({*hashes.tolist()}) == len(strings)
        again = hash_symbols(pa.array(["padding", *strings], pa.large_string())[1:], seed)
        assert again.tolist() == hashes.tolist()
    assert len({*hash_symbols(pa.array([*range(-9, 9)])).tolist()}) == 18


@quick
@given(st.lists(st.lists(st.sampled_from(["a", "bc", "<unk>", "é"]), max_size=4), max_size=4))
def test_decoding_undoes_encoding(lines):
    text = "\n".join(" ".join(line) for line in lines)
    vocab = vocab_of("a bc é <unk>")
    assert vocab.decode(vocab.encode(text)) == text
    assert vocab.decode(vocab.encode(text + "\n")) == text + "\n"


def test_encoding_is_the_rank_or_unk():
    vocab = vocab_of("b b b a a", "c")
    assert vocab.tokens == ["b", "<eos>", "a", "c", "<unk>"]
    assert vocab.encode("a b\nc never") == [2, 0, 1, 3, 4]
    assert vocab.encode("") == []
    rows = pa.array(["a\n", "", "c c"], pa.large_string())
    assert vocab.encode_rows(rows).tolist() == [2, 1, 1, 3, 3, 1]
    assert vocab.decode([2, 4, 1, 0]) == "a <unk>\nb"
    assert vocab.decode([]) == ""


def test_literal_specials_are_the_specials_where_words_are_whole():
    vocab = vocab_of("<unk> <unk> <eos> a")
    assert dict(zip(vocab.tokens, vocab.counts.tolist(), strict=True)) == {
        **{"<unk>": 2, "<eos>": 2, "a": 1}
    }
    pieces = vocab_of("<unk>", tokenizer=WORDS)
    assert sorted(pieces.tokens) == ["<", "<eos>", "<unk>", ">", "unk"]
    assert pieces.counts[pieces.unk_id] == 0


def test_limits_that_no_vocabulary_can_have():
    with pytest.raises(ValueError, match="max_vocab_size=2 leaves no room"):
        vocab_of("a", max_vocab_size=2)
    with pytest.raises(ValueError, match="min_count=0"):
        vocab_of("a", min_count=0)


def hugging_face(*tokens, unk):
    model = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=unk)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return HuggingFaceTokenizer(tokenizer.to_str())


def test_ids_of_a_hugging_face_tokenizer_are_ranked_anew():
    tokenizer = hugging_face("[UNK]", "never", "</s>", "a", "b", unk="[UNK]")
    vocab = vocab_of("b b a x b", "a", tokenizer=tokenizer)
    assert vocab.tokens == ["b", "</s>", "a", "[UNK]", "never"]
    assert vocab.counts.tolist() == [3, 2, 2, 1, 0]
    assert vocab.original_ids.tolist() == [4, 2, 3, 0, 1]
    assert (vocab.unk_id, vocab.eos_id) == (3, 1)
    assert vocab.encode("a never x") == [2, 4, 3]
    assert vocab.decode([2, 4, 3, 1, 0]) == "a never [UNK]\nb"


def test_specials_that_a_hugging_face_tokenizer_lacks_have_no_original_id():
    tokenizer = hugging_face("a", "b", "c", unk="absent")
    whole = vocab_of("a a b", tokenizer=tokenizer)
    assert whole.tokens == ["a", "<eos>", "b", "c"]
    assert whole.original_ids.tolist() == [0, -1, 1, 2]
    assert whole.unk_id is None
    folded = vocab_of("a a b b c", tokenizer=tokenizer, max_vocab_size=3)
    assert folded.tokens == ["<unk>", "a", "<eos>"]
    assert folded.counts.tolist() == [3, 2, 1]
    assert (folded.original_ids < 0).tolist() == [True, False, True]
    assert folded.encode("c a") == [0, 1]
    assert folded.decode([0, 2, 1]) == "<unk>\na"
    assert vocab_of("a a b", tokenizer=tokenizer, min_count=2).tokens == ["a", "<eos>", "<unk>"]


def test_folded_words_of_a_hugging_face_tokenizer_are_no_line_ends():
    tokenizer = hugging_face("</s>", "a", "b", "c", unk="</s>")
    folded = vocab_of("a a b b c", tokenizer=tokenizer, max_vocab_size=3)
    assert folded.tokens == ["<unk>", "a", "</s>"]
    assert folded.unk_id != folded.eos_id
    assert folded.counts.tolist() == [3, 2, 1]
    assert folded.decode(folded.encode("c")) == "<unk>"


VOCABS = {
    "words": lambda: vocab_of("for é in x:", "\tpass", tokenizer=WORDS),
    "whitespace": lambda: vocab_of("a\x00b c c", max_vocab_size=3),
    "hugging face": lambda: vocab_of("a\nb", tokenizer=hugging_face("a", "\n", "é", unk="é")),
}
vocabs = pytest.mark.parametrize("vocab", VOCABS.values(), ids=VOCABS)


@vocabs
def test_a_state_holds_all_and_loads_without_pickled_code(vocab, tmp_path):
    vocab = vocab()
    torch.save(vocab.state_dict(), tmp_path / "state.pt")
    again = Vocab.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again == vocab
    assert again.tokens == vocab.tokens
    assert again.counts.tolist() == vocab.counts.tolist()
    assert again.encode("a x é\nb") == vocab.encode("a x é\nb")
    assert pickle.loads(pickle.dumps(vocab)) == vocab


@vocabs
def test_files_and_checkpoints(vocab, tmp_path):
    vocab = vocab()
    vocab.save(tmp_path / "vocab.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["vocab.pt"]
    assert Vocab.load(tmp_path / "vocab.pt") == vocab
    checkpoint = {"state_dict": {}, "hyper_parameters": {"vocab": vocab.state_dict()}}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    loaded = Vocab.load(str(tmp_path / "last.ckpt"))
    (tmp_path / "last.ckpt").write_bytes(b"")  # the loaded one does not read it any more
    assert loaded == vocab


def test_a_vocabulary_does_not_change():
    with pytest.raises(AttributeError):
        vocab_of("a").tokens = ["b"]


def test_what_holds_no_vocabulary_is_one_line(tmp_path):
    def complaint(path):
        with pytest.raises(ValueError, match=path.name) as caught:
            Vocab.load(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    path = tmp_path / "file"
    assert "no vocabulary or checkpoint file" in complaint(path)
    path.write_text("text")
    assert "cannot read" in complaint(path)
    states = [{"weight": torch.ones(2)}, [1]]
    for state in (*states, *({"hyper_parameters": h} for h in ({}, None, [1], {"vocab": 3}))):
        torch.save(state, path)
        assert "holds no vocabulary" in complaint(path)
    for key in ("unk_id", "eos_id", "tokenizer", "original_ids"):
        state = vocab_of("a").state_dict()
        del state[key]
        torch.save(state, path)
        assert f"is not whole: {key} is missing" in complaint(path)
    torch.save(vocab_of("a").state_dict() | {"format": 99}, path)
    with pytest.raises(ValueError, match="format 99"):
        Vocab.load(path)


def test_fingerprints_tell_vocabularies_apart():
    same = [vocab_of("a b b"), vocab_of("b a b")]
    others = [vocab_of("a b"), vocab_of("a c c"), vocab_of("a b b", tokenizer=WORDS)]
    assert len({vocab.fingerprint for vocab in same}) == 1
    assert len({vocab.fingerprint for vocab in [*same, *others]}) == 4
    assert same[0] == same[1]
    assert len({*same}) == 1
    assert same[0] != others[0]
    assert same[0] != "a b b"


def test_fingerprints_are_the_same_in_every_process():
    assert vocab_of("a b b").fingerprint == "faace41918f9f8993d66ee7f496a4c44"


def test_counts_of_many_batches_are_exact():
    counter = SymbolCounter()
    for _ in range(3):
        counter.update(pa.array(np.arange(1000) % 7))
    seen, counts, _ = counter.result()
    assert seen.to_pylist() == [*range(7)]
    assert counts.tolist() == [429] * 6 + [426]
    assert len(counter.result()[0]) == 0  # it is empty then


def test_counts_are_merged_a_few_times(monkeypatch):
    """The work is linear in the text, whatever number of batches it comes in."""
    merged, merge = [], Counts.merged
    monkeypatch.setattr(Counts, "merged", lambda several: merged.append(several) or merge(several))
    monkeypatch.setattr(counting, "_MERGE_AT", 0)
    counter = SymbolCounter()
    for number in range(200):
        counter.update(pa.array([number, number + 1]))
    assert counter.result()[1].sum() == 400
    assert sum(len(own.counts) for several in merged for own in several) < 5 * 400


def test_it_says_how_large_it_is():
    assert repr(vocab_of("a b b")) == "Vocab(4 tokens of 4 counted)"
    assert len(vocab_of("a b b")) == 4
