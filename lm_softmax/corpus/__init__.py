"""From a corpus to token files on disk."""

from lm_softmax.corpus.source import Source
from lm_softmax.corpus.stream import Stream
from lm_softmax.corpus.token_file import TokenFile, TokenWriter
from lm_softmax.corpus.token_files import Corpus, SplitStats

__all__ = ["Corpus", "Source", "SplitStats", "Stream", "TokenFile", "TokenWriter"]
