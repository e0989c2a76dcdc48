"""Encoders: token ids in, one hidden vector a position out."""

from lm_softmax.encoders.base import Cache, Encoder, State
from lm_softmax.encoders.embedding import AdaptiveEmbedding, WordEmbedding
from lm_softmax.encoders.huggingface import HuggingFaceEncoder
from lm_softmax.encoders.lstm import LSTMEncoder
from lm_softmax.encoders.transformer import TransformerEncoder

__all__ = [
    "AdaptiveEmbedding",
    "Cache",
    "Encoder",
    "HuggingFaceEncoder",
    "LSTMEncoder",
    "State",
    "TransformerEncoder",
    "WordEmbedding",
]
