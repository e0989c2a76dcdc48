"""Who takes part in a benchmark: heads, the peers that are there, and their floors."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import lm_softmax.heads
from lm_softmax.benchmark.contestants import Entry, of_head
from lm_softmax.benchmark.floors import floor_entry
from lm_softmax.benchmark.peers import FULL, adaptive_peers, full_peers
from lm_softmax.benchmark.problem import Problem
from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax, OutputHead
from lm_softmax.specs import Spec


def line_up(
    problem: Problem, specs: Sequence[Spec], *, bias: bool = True
) -> tuple[list[Entry], dict[str, str]]:
    """All who take part: the standard, the peers that are there, the heads, and their floors.

    Peers are those of the full softmax and of each adaptive softmax among the heads.

    Args:
        problem: Sizes, device and dtype.
        specs: The heads.
        bias: Whether softmaxes have biases where the spec of a head does not say.

    Returns:
        Entries in the order in which they are shown, and by name why a peer is not among them.

    Raises:
        ValueError: If a head refuses its options.
    """
    counts = problem.counts()

    def weights(spec: Spec) -> Callable[[], OutputHead]:
        return lambda: make_head(spec, problem, counts, bias)

    full = weights(FULL)
    peers, absent = full_peers(problem, full, bias=bias)
    entries: dict[str, Entry] = {entry.name: entry for entry in peers}
    floors: dict[str, Entry] = {}
    for spec in specs:
        sketch = outline(spec, problem, counts, bias)
        group = group_of(sketch, spec, bias)
        name, what = str(spec), f"{spec}.loss"
        entries[name] = Entry(name, "head", group, what, spec, weights(spec), of_head)
        if isinstance(sketch, AdaptiveSoftmax) and group != str(spec):
            for entry in adaptive_peers(sketch, group, spec, weights(spec)):
                entries.setdefault(entry.name, entry)
        if type(sketch) in (FullSoftmax, AdaptiveSoftmax):
            floor = floor_entry(sketch, group, spec, weights(spec))
            floors.setdefault(floor.name, floor)
    return [*entries.values(), *floors.values()], absent


def find_entry(problem: Problem, name: str, spec: Spec, *, bias: bool) -> Entry:
    """The contestant of a name, given the head that it comes from, as another process makes it."""
    entries, _ = line_up(problem, [spec], bias=bias)
    (found,) = (entry for entry in entries if entry.name == name)
    return found


def head_classes() -> dict[str, type[OutputHead]]:
    """The heads that `lm_softmax.heads` exports, by name."""
    exported = {name: getattr(lm_softmax.heads, name) for name in lm_softmax.heads.__all__}
    return {
        name: cls
        for name, cls in exported.items()
        if isinstance(cls, type) and issubclass(cls, OutputHead) and not inspect.isabstract(cls)
    }


def default_specs() -> list[Spec]:
    """Every head with its options as by default."""
    return [Spec(name) for name in head_classes()]


def make_head(spec: Spec, problem: Problem, counts: Tensor, bias: bool) -> OutputHead:
    """A head with the seed's weights, on the problem's device and in its dtype.

    Args:
        spec: Class and options.
        problem: Sizes, device, dtype and seed.
        counts: Training-set frequencies.
        bias: The option of this name, where the head has it and the spec does not give it.

    Raises:
        ValueError: If there is no such head, or it refuses its options.
    """
    cls = spec.find(head_classes())
    options = dict(spec.options)
    if not bias and "bias" in inspect.signature(cls).parameters:
        options.setdefault("bias", False)
    torch.manual_seed(problem.seed)
    try:
        head: OutputHead = cls(problem.hidden_size, problem.vocab_size, counts, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{spec} with {problem.vocab_size} words: {error}") from error
    for own in getattr(head, "tail_biases", None) or ():
        own.data.zero_()  # torch's adaptive softmax has none: the two are the same function so
    return head.to(problem.device, problem.torch_dtype)


def group_of(head: OutputHead, spec: Spec, bias: bool) -> str:
    """Heads of one group compute one function of the same weights.

    A head that a peer could be compared with is in the group of its structure; any other is alone,
    under its own name.
    """
    if spec.options.get("bias", bias) == bias:
        others = set(spec.options) - {"bias"}
        if type(head) is FullSoftmax and not others:
            return "full"
        structure = {"cutoffs", "div_value", "min_tail_size", "tail_sizes"}
        if type(head) is AdaptiveSoftmax and head.cutoffs and others <= structure:
            return f"adaptive {head.cutoffs} {head.tail_sizes}"
    return str(spec)


def outline(spec: Spec, problem: Problem, counts: Tensor, bias: bool) -> OutputHead:
    """The head, without memory for its weights if it can be; shows what is wrong with its options.

    Raises:
        ValueError: If the head refuses its options.
    """
    try:
        with torch.device("meta"):
            return make_head(spec, replace(problem, device="meta"), counts, bias)
    except RuntimeError:  # a structure that needs values; then with memory after all
        return make_head(spec, replace(problem, device="cpu"), counts, bias)
