"""The command: its options, which of them go together, and errors of one line."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lm_softmax.allocator import keep_pages
from lm_softmax.checkpoint import Checkpoint
from lm_softmax.generate.scores import write_scores
from lm_softmax.generate.texts import Prompt, encode_prompts, write_best, write_text
from lm_softmax.module import LanguageModel
from lm_softmax.terminal import READER_LEFT, Parser, check_streams, drop_output

PROGRAM = "python -m lm_softmax.generate"
DEFAULTS: dict[str, Any] = {"num_tokens": 64, "seed": 0, "temperature": 0.8, "n_best": 1}
COMMON = {"checkpoint", "device"}
TEXT = {"prompt", "prompt_file", "num_tokens", "stop_at_eos", "no_unk", "no_cache"}
# What each way to use the command has options for.
MODES = {
    "--score": COMMON | {"score", "per_token"},
    "--beams": COMMON | TEXT | {"beams", "length_penalty", "n_best"},
    "sampling": COMMON | TEXT | {"temperature", "top_k", "top_p", "seed"},
}


def main(args: Sequence[str] | None = None) -> int:
    """Writes texts or scores to standard output; returns the exit code.

    Args:
        args: Words of the command line; those of the process if not given.
    """
    parser = _make_parser()
    options = parser.parse_args(args)
    check_streams(parser)
    keep_pages()
    try:
        _check_mode(options)
        _run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130
    except BrokenPipeError:  # whoever read has enough
        drop_output()
        return READER_LEFT
    except OSError as error:
        if error.filename is None:
            drop_output()
        name = "standard output" if error.filename is None else error.filename
        parser.error(f"{error.strerror or error}: {name}")
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        parser.error(f"out of memory: {str(error).splitlines()[0]}")
    return 0


def _run(options: argparse.Namespace) -> None:
    device = _device(options.device)
    prompts = [Prompt(text, "prompt") for text in options.prompt or []]
    if options.prompt_file is not None:
        prompts += _read_prompts(options.prompt_file)
    model = _load(options.checkpoint).to(device)
    begin = time.perf_counter()
    if options.score is not None:
        lines = _read_lines(options.score)
        report = write_scores(model, lines, _name(options.score), per_token=options.per_token)
    else:
        report = _write_texts(model, prompts, options)
    sys.stderr.write(f"{report(time.perf_counter() - begin)}\n")


def _write_texts(
    model: LanguageModel, prompts: Sequence[Prompt], options: argparse.Namespace
) -> Callable[[float], str]:
    """Continues each prompt, one after the other."""
    assert model.vocab is not None
    encoded = encode_prompts(model.vocab, prompts)
    if options.no_unk and model.vocab.unk_id is None:
        raise ValueError("--no-unk: the vocabulary has no <unk>")
    common = {
        "eos_id": model.vocab.eos_id if options.stop_at_eos else None,
        "suppress": [model.vocab.unk_id] if options.no_unk else [],
        "use_cache": not options.no_cache,
    }
    num_tokens = _or_default(options, "num_tokens")
    generator = torch.Generator(model.device).manual_seed(_or_default(options, "seed"))
    total = 0
    for number, prompt in enumerate(encoded):
        if options.beams is not None:
            penalty = options.length_penalty
            total += write_best(
                model,
                prompt,
                num_tokens,
                num_beams=options.beams,
                num_return=_or_default(options, "n_best"),
                **({} if penalty is None else {"length_penalty": penalty}),
                **common,
            )
            continue
        if number:
            sys.stdout.write("\n")
        total += write_text(
            model,
            prompt,
            num_tokens,
            temperature=_or_default(options, "temperature"),
            top_k=options.top_k,
            top_p=options.top_p,
            generator=generator,
            **common,
        )
    return lambda seconds: f"{total} tokens in {seconds:.2f} s, {total / seconds:,.0f} tokens/s"


def _load(path: Path) -> LanguageModel:
    """The model of a checkpoint, which is ours or a ValueError of one line."""
    checkpoint = Checkpoint(path)
    if checkpoint.hparams["vocab"] is None:
        raise ValueError(f"{path} holds no vocabulary: its model was made without one")
    return checkpoint.model()


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and (kind == "cpu" or not number.isdecimal())):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name}")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs")
    return torch.device(name)


def _read_lines(source: str) -> Iterator[str]:
    """Lines of a file, or of standard input for `-`, without their ends."""
    stdin = source == "-"
    if stdin and sys.stdin is None:
        raise ValueError("standard input is closed")
    with nullcontext(sys.stdin.buffer) if stdin else open(source, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8" if number > 1 else "utf-8-sig")  # a byte order mark
                yield text.rstrip("\r\n")
            except UnicodeDecodeError:
                raise ValueError(f"{_name(source)}: line {number} is not UTF-8") from None


def _read_prompts(source: str) -> list[Prompt]:
    found = [
        Prompt(line, f"{_name(source)}: line {number}")
        for number, line in enumerate(_read_lines(source), start=1)
    ]
    if not found:
        raise ValueError(f"{_name(source)} holds no prompt")
    return found


def _name(source: str) -> str:
    return "standard input" if source == "-" else source


def _or_default(options: argparse.Namespace, name: str) -> Any:
    value = getattr(options, name)
    return DEFAULTS[name] if value is None else value


def _check_mode(options: argparse.Namespace) -> None:
    """Refuses options that would be ignored.

    Raises:
        ValueError: Names the option, and what it belongs to.
    """
    mode = "sampling" if options.beams is None else "--beams"
    mode = mode if options.score is None else "--score"
    values = vars(options).items()
    given = {name for name, value in values if value is not None and value is not False}  # 0 is
    for name in sorted(given - MODES[mode]):
        homes = [other for other in MODES if name in MODES[other]]
        raise ValueError(
            f"--{name.replace('_', '-')} means nothing with {mode}, only with {' or '.join(homes)}"
        )
    if options.length_penalty is not None and not options.stop_at_eos:
        raise ValueError(
            "--length-penalty is for texts of different lengths: add --stop-at-eos, or leave it out"
        )
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed must be in [0, 2**63), got {options.seed}")


def _make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Continues prompts with the model of a checkpoint, which is all it needs, or"
        " tells how probable it finds given sentences. Without a prompt a text begins where a"
        " document does. Texts go to standard output, tokens/s to standard error.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, metavar="FILE", help="of train.py")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated")
    add("--prompt-file", metavar="FILE", help="a prompt a line; - for standard input")
    add("--num-tokens", type=int, metavar="N", help="tokens to add (default: 64)")
    add("--stop-at-eos", action="store_true", help="end a text at its first <eos>, a line's end")
    add("--no-unk", action="store_true", help="exclude <unk>, the other words normalised again")
    add("--no-cache", action="store_true", help="compute all tokens again at each step; as a check")

    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add(
        "--temperature",
        type=float,
        metavar="T",
        help="exponent 1/T of the probabilities; 0 takes the likeliest word (default: 0.8)",
    )
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest words")
    add("--top-p", type=float, metavar="P", help="draw among the likeliest that hold P together")
    add("--seed", type=int, metavar="N", help="of the random numbers (default: 0)")

    group = parser.add_argument_group("beam search", "writes a line of JSON for each text")
    add = group.add_argument
    add("--beams", type=int, metavar="N", help="hypotheses that stay open")
    add(
        "--length-penalty",
        type=float,
        metavar="A",
        help="rank by log-probability / length**A (default: 1)",
    )
    add("--n-best", type=int, metavar="N", help="texts for each prompt (default: 1)")

    group = parser.add_argument_group("scoring", "writes a line of JSON for each sentence")
    add = group.add_argument
    add("--score", metavar="FILE", help="a sentence a line, its <eos> counts; - for standard input")
    add("--per-token", action="store_true", help="the log-probability of each token as well")
    return parser
