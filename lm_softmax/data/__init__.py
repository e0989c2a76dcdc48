"""Batches of tokens for Lightning."""

from lm_softmax.corpus import SplitStats
from lm_softmax.data.batching import TokenBatch
from lm_softmax.data.datamodule import TextDataModule

__all__ = ["SplitStats", "TextDataModule", "TokenBatch"]
