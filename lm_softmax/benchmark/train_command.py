"""Options, files and table of `benchmark train`."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from lm_softmax.benchmark.command import (
    Report,
    add_command,
    add_memory_and_warmups,
    checked,
    hush,
    positive,
    say,
)
from lm_softmax.benchmark.line_up import default_specs
from lm_softmax.benchmark.plot import caption, draw
from lm_softmax.benchmark.problem import DTYPES, ZIPF, Problem
from lm_softmax.benchmark.report import as_csv, as_json, table, write, write_text
from lm_softmax.benchmark.results import compare
from lm_softmax.benchmark.train import Plan, run
from lm_softmax.specs import Spec, parse_spec

DESCRIPTION = """\
Times forward pass, backward pass and optimizer step of output heads and of their peers on the same
hidden vectors and targets, contestant after contestant, round after round, in one process or, with
--apart, in one each; then the memory of a step of each, in a process of its own. Prints a table and
writes train.json, train.csv and softmax_comparison.png.

A peer has the weights of the head that it is compared with, and is timed only if its loss is that
of naive code in float64, within what its dtype explains. Hidden vectors and parameters have the one
dtype that is asked for; there is no autocast. The optimizer runs with a learning rate of 0, so that
all rounds are alike. "products alone" is the floor: the same matrix products into buffers allocated
before.
"""


def add_parser(commands: Any, add_common_options: Callable[..., None]) -> None:
    """Adds the subcommand."""
    parser = add_command(
        commands,
        "train",
        "time and memory of a training step, by vocabulary size",
        DESCRIPTION,
        run=_run,
    )
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--vocab-sizes",
        type=positive,
        nargs="+",
        default=[10_000, 30_000, 100_000],
        metavar="V",
        help="default: 10000 30000 100000",
    )
    group.add_argument(
        "--tokens", type=positive, default=1024, metavar="N", help="targets (default: 1024)"
    )
    group.add_argument(
        "--hidden-size", type=positive, default=512, metavar="D", help="default: 512"
    )
    group.add_argument("--dtype", choices=list(DTYPES), default="float32", help="default: float32")
    group.add_argument(
        "--targets",
        default=ZIPF,
        metavar="zipf|FILE",
        help="drawn from Zipf's law with exponent 1, or the first ids of a .npy file of token ids"
        " ranked by frequency (default: zipf)",
    )
    group.add_argument(
        "--heads",
        type=checked(parse_spec),
        nargs="+",
        metavar="HEAD",
        help='names, or calls as in "AdaptiveSoftmax(cutoffs=[2000, 10000])"'
        " (default: every head of lm_softmax.heads with its options as by default)",
    )
    group.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="WORD",
        help="leave out contestants with one of these in their name, slow peers say",
    )
    group.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="NAME",
        help="compare every head with these contestants too",
    )
    group.add_argument(
        "--bias",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether softmaxes have biases (default: yes, as the heads do)",
    )
    group.add_argument(
        "--optimizer",
        type=checked(parse_spec),
        default=Spec("AdamW", {"fused": True}, "AdamW(fused=True)"),
        metavar="OPTIMIZER",
        help='of torch.optim (default: "AdamW(fused=True)")',
    )
    group.add_argument(
        "--no-optimizer",
        dest="optimizer",
        action="store_const",
        const=None,
        help="leave its step out; its state then takes no memory",
    )
    group.add_argument(
        "--apart",
        action="store_true",
        help="time each contestant in a process of its own, as trainings are: what others allocate"
        " decides on a CPU how many pages one gets anew (default: all in one process)",
    )
    add_memory_and_warmups(group)
    add_common_options(parser)


def _run(options: argparse.Namespace, report: Report) -> None:
    sizes = sorted(set(options.vocab_sizes))
    problem = Problem(
        vocab_size=sizes[0],
        num_tokens=options.tokens,
        hidden_size=options.hidden_size,
        dtype=options.dtype,
        device=options.device,
        targets=options.targets,
        seed=options.seed,
    )
    plan = Plan(
        problem,
        sizes,
        options.heads or default_specs(),
        bias=options.bias,
        without=options.without,
        num_rounds=options.rounds,
        num_warmups=options.warmups,
        optimizer=options.optimizer,
        memory=options.memory,
        against=options.against,
        apart=options.apart,
        keep_pages=options.keep_pages,
    )
    results, absent = run(plan, say)
    comparisons = list(compare(results, options.against))
    body = {
        "contestants": [result.as_dict() for result in results],
        "comparisons": [pair.as_dict() for pair in comparisons],
        "absent": absent,
    }
    setting = _setting(plan)
    figure = draw(results, caption(options.rounds, setting, report.machine_line(), report.command))
    files = [
        write_text(options.output, "train.json", as_json(report.header(), body)),
        write_text(options.output, "train.csv", as_csv(results, comparisons)),
        write(
            options.output,
            "softmax_comparison.png",
            lambda path: figure.savefig(path, format="png", dpi=130),
        ),
    ]
    hush()
    lines = [
        setting,
        report.machine_line(),
        f"Figures are median (min - max) of {options.rounds} rounds.",
        "",
        table(results, comparisons),
        *(f"absent: {name}: {why}" for name, why in absent.items()),
        *(f"written: {path}" for path in files),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _setting(plan: Plan) -> str:
    problem = plan.problem
    targets = "Zipf" if problem.targets == ZIPF else problem.targets
    optimizer = "no optimizer" if plan.optimizer is None else f"optimizer {plan.optimizer}"
    return (
        f"N={problem.num_tokens:,} tokens, d={problem.hidden_size:,}, {problem.dtype},"
        f" {problem.device}, {targets} targets, {'with' if plan.bias else 'without'} biases,"
        f" {optimizer}, {'a process each' if plan.apart else 'one process'}."
    )
