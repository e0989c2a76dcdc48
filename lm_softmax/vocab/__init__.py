"""From text to ranked token ids and back."""

from lm_softmax.vocab.archive import load_archive
from lm_softmax.vocab.counting import Counts, SymbolCounter
from lm_softmax.vocab.hub import hub_reachable, is_hub_id, one_line
from lm_softmax.vocab.tokenization import load_tokenizer
from lm_softmax.vocab.tokenizer import Tokenizer
from lm_softmax.vocab.vocabulary import Vocab, check_folding

__all__ = [
    "Counts",
    "SymbolCounter",
    "Tokenizer",
    "Vocab",
    "check_folding",
    "hub_reachable",
    "is_hub_id",
    "load_archive",
    "load_tokenizer",
    "one_line",
]
