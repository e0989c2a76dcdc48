"""Lightning callbacks: speed, memory, perplexity, sample text and the summary of a run."""

from lm_softmax.callbacks.memory import MemoryMonitor
from lm_softmax.callbacks.perplexity import PerplexityMonitor
from lm_softmax.callbacks.run_summary import RunSummary
from lm_softmax.callbacks.sample_text import SampleText
from lm_softmax.callbacks.step_time import StepTimeMonitor

__all__ = ["MemoryMonitor", "PerplexityMonitor", "RunSummary", "SampleText", "StepTimeMonitor"]
