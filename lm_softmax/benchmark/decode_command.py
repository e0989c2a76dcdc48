"""Options, files and tables of `benchmark decode`."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_softmax.benchmark.command import (
    Report,
    add_command,
    add_memory_and_warmups,
    checked,
    hush,
    positive,
    say,
)
from lm_softmax.benchmark.decode import (
    HEAD,
    MOST,
    NAIVE,
    SIDES,
    Random,
    Result,
    Trial,
    measure,
    weigh,
)
from lm_softmax.benchmark.decode_plot import draw
from lm_softmax.benchmark.line_up import default_specs, outline
from lm_softmax.benchmark.opened import Opened, opened
from lm_softmax.benchmark.problem import DTYPES, Problem
from lm_softmax.benchmark.report import align, as_json, csv_text, show, write, write_text
from lm_softmax.benchmark.results import Spread
from lm_softmax.heads import Agreement, agreement
from lm_softmax.specs import parse_spec

DESCRIPTION = """\
Times topk(hidden, 1), topk(hidden, 10) and sample(hidden) of output heads beside naive code on the
same hidden vectors, log_prob(hidden).topk(k) and a draw by the inverse distribution function of
log_prob(hidden).exp(), in turns, in one process; then the memory of each, in a process of its own.
Counts how many clusters, classes or nodes exact top k opens. Prints tables and writes decode.json,
decode.csv and decoding.png.

Heads have random weights, or are that of a checkpoint, which decodes the hidden vectors that its
own encoder makes of validation text. With --source, how far its words agree with those of another
checkpoint on the same text, one it was compressed from say.

Nothing is timed whose values differ from naive code by more than the dtype explains.
"""
COLUMNS = (
    *("head", "batch", "what", "ms a token", "naive ms a token", "times faster"),
    *("extra MiB", "naive MiB"),
)
OPENED_COLUMNS = ("head", "k", "what", "not excluded by its mass", "opened", "needed")
CSV_COLUMNS = (
    *("vocab_size", "head", "batch_size", "task", "measure", "unit", "min", "median", "max"),
)


def add_parser(commands: Any, add_common_options: Callable[..., None]) -> None:
    """Adds the subcommand."""
    parser = add_command(
        commands,
        "decode",
        "milliseconds a token of top k and sampling, beside naive code",
        DESCRIPTION,
        run=_run,
    )
    group = parser.add_argument_group("heads with random weights")
    group.add_argument(
        "--vocab-sizes", type=positive, nargs="+", metavar="V", help="default: 100000"
    )
    group.add_argument("--hidden-size", type=positive, metavar="D", help="default: 256")
    group.add_argument(
        "--heads",
        type=checked(parse_spec),
        nargs="+",
        metavar="HEAD",
        help='names, or calls as in "AdaptiveSoftmax(cutoffs=[2000, 10000])"'
        " (default: every head of lm_softmax.heads with its options as by default)",
    )
    group = parser.add_argument_group("a trained head instead")
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="of a language model")
    group.add_argument(
        "--source", type=Path, metavar="FILE", help="checkpoint to agree with; it is timed as well"
    )
    group.add_argument(
        "--data-path",
        metavar="PATH",
        help="corpus, instead of path, name and data_files of the run (default: the run's)",
    )
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--batch-sizes",
        type=positive,
        nargs="+",
        default=[1, 8, 64],
        metavar="B",
        help="rows of a call (default: 1 8 64)",
    )
    group.add_argument(
        "--num-vectors",
        type=positive,
        default=1024,
        metavar="N",
        help="hidden vectors; rounds take turns with them, what is opened is counted on all"
        " (default: 1024)",
    )
    group.add_argument("--dtype", choices=list(DTYPES), default="float32", help="default: float32")
    add_memory_and_warmups(group)
    add_common_options(parser)


class _Found(NamedTuple):
    """What is measured together: heads of one vocabulary size, and how they agree."""

    results: list[Result]
    opened: list[Opened]
    agreement: Agreement | None


def _run(options: argparse.Namespace, report: Report) -> None:
    options.batch_sizes = sorted(set(options.batch_sizes))
    _check(options)
    groups = _trained(options) if options.checkpoint else _random(options)
    found = [_measure(trials, options) for trials in groups]
    results = [result for one in found for result in one.results]
    counts = [count for one in found for count in one.opened]
    agrees = next((one.agreement for one in found if one.agreement), None)
    body = {
        "results": [result.as_dict() for result in results],
        "opened": [count.as_dict() for count in counts],
        "agreement": None if agrees is None else agrees._asdict(),
    }
    setting = _setting(options)
    caption = [setting, report.machine_line(), report.command]
    figure = draw(results, options.rounds, caption)
    files = [
        write_text(options.output, "decode.json", as_json(report.header(), body)),
        write_text(
            options.output, "decode.csv", csv_text(CSV_COLUMNS, list(_csv_rows(results, counts)))
        ),
        write(
            options.output,
            "decoding.png",
            lambda path: figure.savefig(path, format="png", dpi=130),
        ),
    ]
    hush()
    lines = [
        setting,
        report.machine_line(),
        f"Figures are median (min - max) of {options.rounds} rounds.",
        *_tables(results, counts),
        *_agreement_lines(agrees, options),
        *(f"written: {path}" for path in files),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _check(options: argparse.Namespace) -> None:
    """What can be wrong before anything is read."""
    if options.checkpoint is None:
        for name in ("source", "data_path"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} goes with --checkpoint: add it")
    else:
        for name in ("vocab_sizes", "hidden_size", "heads"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} is for random weights, --checkpoint has its own:"
                    " leave one of them out"
                )
    if (few := min(options.vocab_sizes or [MOST])) < MOST:
        raise ValueError(f"--vocab-sizes must be at least {MOST}, for a top {MOST}, got {few}")
    if (most := options.batch_sizes[-1]) > options.num_vectors:
        raise ValueError(
            f"--num-vectors {options.num_vectors} do not fill a batch of {most}: raise it"
        )


def _random(options: argparse.Namespace) -> Iterator[list[Trial]]:
    """Heads of each vocabulary size; all options are checked before the first is built."""
    specs = options.heads or default_specs()
    problems = [
        Problem(
            vocab_size,
            options.num_vectors,
            options.hidden_size or 256,
            options.dtype,
            options.device,
            seed=options.seed,
        )
        for vocab_size in sorted(set(options.vocab_sizes or [100_000]))
    ]
    for problem in problems:
        for spec in specs:
            outline(spec, problem, problem.counts(), bias=True)
    return (
        [
            Trial(str(spec), source, source.head(), problem.inputs()[0].detach())
            for spec, source in ((spec, Random(problem, spec)) for spec in specs)
        ]
        for problem in problems
    )


def _trained(options: argparse.Namespace) -> Iterator[list[Trial]]:
    """The head of the checkpoint, and that of its source."""
    from lm_softmax.benchmark import trained
    from lm_softmax.validation import hidden_vectors, validation_text

    dtype = DTYPES[options.dtype]
    checkpoint, model = trained.load(options.checkpoint)
    models = {options.checkpoint: model}
    if options.source is not None:
        models[options.source] = trained.load(options.source)[1]
        trained.check_source(*models.values())
    if model.head.vocab_size < MOST:
        raise ValueError(f"{options.checkpoint} has {model.head.vocab_size} words, too few")
    data = validation_text(checkpoint, options.data_path)
    trials = []
    for path, own in models.items():
        say(f"{path}: hidden vectors")
        hidden = hidden_vectors(own, data, options.num_vectors)
        if len(hidden) < options.num_vectors:
            raise ValueError(
                f"the validation split has {len(hidden)} positions,"
                f" --num-vectors {options.num_vectors} are asked for"
            )
        head = own.head.to(options.device, dtype)
        label = type(head).__name__ + (" (source)" if path == options.source else "")
        source = trained.Trained(path, options.device, dtype)
        trials.append(Trial(label, source, head, hidden.to(options.device, dtype)))
    return iter([trials])


def _measure(trials: list[Trial], options: argparse.Namespace) -> _Found:
    results = measure(trials, options.batch_sizes, options.rounds, options.warmups, say)
    counts: list[Opened] = []
    for trial in trials:
        say(f"counting what {trial.name} opens")
        counts += opened(trial)
    agrees = None
    if options.source is not None:
        exact, own = (trial.head.topk(trial.hidden, MOST) for trial in reversed(trials))
        agrees = agreement(exact, own)
    if options.memory:
        for trial in trials:
            say(f"memory of {trial.name}")
            weigh(results, trial)
    return _Found(results, counts, agrees)


def _tables(results: Sequence[Result], counts: Sequence[Opened]) -> Iterator[str]:
    for size in dict.fromkeys(result.vocab_size for result in results):
        own = [result for result in results if result.vocab_size == size]
        yield f"\nvocabulary {size:,}"
        yield align([COLUMNS, *map(_cells, own)])
        for head, problem in dict.fromkeys((r.head, r.problem) for r in own if r.problem):
            yield f"{head}: {problem}"
        if parts := [count for count in counts if count.vocab_size == size]:
            yield "\nshare of positions, or of classes or nodes"
            yield align([OPENED_COLUMNS, *map(_opened_cells, parts)])
    yield ""


def _agreement_lines(agrees: Agreement | None, options: argparse.Namespace) -> Iterator[str]:
    if agrees is not None:
        yield (
            f"The best word is that of {options.source} at {agrees.top_1:.2%} of"
            f" {options.num_vectors:,} positions; of its ten best words {agrees.top_k:.2%} are"
            " among the ten best.\n"
        )


def _cells(result: Result) -> tuple[str, ...]:
    memory = [result.memory.get(side) for side in SIDES]
    return (
        result.head,
        str(result.batch_size),
        result.task,
        *(show(result.spread(side), ",.3f") for side in SIDES),
        show(result.times_faster()),
        *("-" if held is None else f"{held:,.1f}" for held in memory),
    )


def _opened_cells(count: Opened) -> tuple[str, ...]:
    shares = (count.by_mass, count.opened, count.needed)
    cells = ("-" if share is None else f"{share:.1%}" for share in shares)
    return (count.head, str(count.k), count.part, *cells)


def _csv_rows(results: Sequence[Result], counts: Sequence[Opened]) -> Iterator[Mapping[str, Any]]:
    """A row for each figure; what was not measured has none."""
    for result in results:
        key = {
            "vocab_size": result.vocab_size,
            "head": result.head,
            "batch_size": result.batch_size,
            "task": result.task,
        }
        spreads: list[tuple[str, str, Spread | None]] = [
            ("time", "ms a token", result.spread(HEAD)),
            ("time of naive code", "ms a token", result.spread(NAIVE)),
            ("times faster", "times", result.times_faster()),
        ]
        for measure_, unit, spread in spreads:
            if spread is not None:
                yield {**key, "measure": measure_, "unit": unit, **spread._asdict()}
        for side, held in result.memory.items():
            yield {**key, "measure": f"extra memory, {side}", "unit": "MiB", "median": held}
    for count in counts:
        for name in ("by_mass", "opened", "needed"):
            if (share := getattr(count, name)) is not None:
                yield {
                    "vocab_size": count.vocab_size,
                    "head": count.head,
                    "task": f"top-{count.k}",
                    "measure": f"{name}: {count.part}",
                    "unit": "share",
                    "median": share,
                }


def _setting(options: argparse.Namespace) -> str:
    what = f"random weights, d={options.hidden_size or 256:,}, normal hidden vectors"
    if options.checkpoint is not None:
        what = f"{options.checkpoint}, hidden vectors of its validation text"
    return f"{what}, {options.num_vectors:,} of them, {options.dtype}, {options.device}."
