"""Continuing and scoring texts with an encoder and an output head."""

from lm_softmax.decoding.beam import Hypothesis, beam_search
from lm_softmax.decoding.generation import generate, stream
from lm_softmax.decoding.scoring import score
from lm_softmax.decoding.without_words import WithoutWords

__all__ = ["Hypothesis", "WithoutWords", "beam_search", "generate", "score", "stream"]
