"""Errors of the user as one line, with the nearest names for a wrong one."""

import argparse
import difflib
import inspect
import re
import traceback
from collections.abc import Iterable, Iterator
from types import TracebackType

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lm_softmax import encoders, heads

BASES = (encoders.Encoder, heads.OutputHead, Optimizer, LRScheduler, Callback)
PACKAGE = __name__.partition(".")[0]
LONGEST = 500


def user_error(error: BaseException) -> str | None:
    """What to tell the user about an error, or None if it is no error of the user's.

    It is one if the command line or a configuration is wrong, a file cannot be read or written, or
    this package raised it on purpose: a `ValueError` from its own lines, or from a part that it
    was building from the user's options.

    Args:
        error: What was caught.
    """
    if isinstance(error, argparse.ArgumentError):
        return option_error(str(error))
    if isinstance(error, MisconfigurationException):
        return one_line(str(error))
    if isinstance(error, UnicodeDecodeError):
        return f"a configuration file is not UTF-8: {one_line(str(error))}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, RecursionError) and _while_reading(error.__traceback__):
        return "an option is a list nested too deep to be read: give deep trees as a tensor"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate" in str(error):
        return f"not enough memory: {one_line(str(error)) or 'make the model or the batch smaller'}"
    if isinstance(error, ValueError | OSError | ImportError) and _on_purpose(error.__traceback__):
        return one_line(str(error))
    return None


def option_error(message: str, options: Iterable[str] = ()) -> str:
    """One line for what jsonargparse says about an option.

    Args:
        message: What it says.
        options: Dotted names of the options there are.
    """
    message = " ".join(message.split())
    if found := re.search(r"unrecognized arguments: (.*)", message):
        return "; ".join(_unknown_option(name, options) for name in _names(found[1]))
    if found := re.search(r"does not accept option '([^']+)'", message):
        return _unknown_option(found[1].removesuffix(".class_path"), options)
    if found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
        choices = re.findall(r"[\w-]+", found[2])
        return f"no subcommand {found[1]!r}; nearest: {_nearest(found[1], choices)}"
    if found := re.search(r'"subcommand" to be one of \{(.*)\}', message):
        return f"missing: a subcommand, one of {found[1].replace(',', ', ')}"
    if found := re.search(r"arguments are required: (.*)", message):
        names = [name.strip().partition(".")[2] for name in found[1].split(",")]
        return f"missing: {', '.join(f'--{name}' for name in names)}; a --config may hold it"
    return one_line(_wrong_value(message))


def _wrong_value(message: str) -> str:
    """What is wrong with the value of an option that exists."""
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    if found := re.search(r"Option '([^']+)' is not accepted", message):
        paths = re.findall(r"class_path[=':\s]+'([\w.]+)'", message)
        return f"{key}: {_unknown_option_of(found[1], paths)}"
    if found := re.search(r"Expected a (?:dot import path string:|path but) ([\w.]+)", message):
        name = found[1].rstrip(".")
        return f"{key}: no class {name}; nearest: {_nearest(name, _classes())}"
    kinds = re.findall(r"Expected an? (<class '[^']+'>|[\w.]+\[[^\]]*\])", message)
    given = re.search(r"G(?:iven|ot) value: (.*?)\.?(?: Got value: .*)?$", message)
    if kinds and given:
        wanted = " or ".join(dict.fromkeys(re.sub(r"<class '|'>|typing\.", "", k) for k in kinds))
        return f"{key}: expected {wanted.replace('NoneType', 'null')}, got {given[1]}"
    return re.sub(r'^Parser key "([^"]+)":', r"\1:", message)


def one_line(message: str) -> str:
    """The message without line breaks, cut where it is very long."""
    message = " ".join(message.split())
    return message if len(message) <= LONGEST else f"{message[:LONGEST]}..."


def _on_purpose(trace: TracebackType | None) -> bool:
    """Whether this package raised an error itself, or it comes from a part of the user's choice.

    The last lines of this package on the way to the error tell: the very last lines of all, or
    those that build the parts of a model, or those of the command that set a trainer to work.
    """
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(trace)]
    ours = [module for module in modules if module.split(".")[0] == PACKAGE]
    return bool(ours) and (
        modules[-1] == ours[-1] or ours[-1].startswith((f"{PACKAGE}.factory", f"{PACKAGE}.cli"))
    )


def _while_reading(trace: TracebackType | None) -> bool:
    """Whether an error comes from those that read options and write them down."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(trace)]
    readers = ("argparse", "copy", "jsonargparse", "yaml", f"{PACKAGE}.factory")
    prefixes = tuple(f"{reader}." for reader in readers)
    return any(f"{module}.".startswith(prefixes) for module in modules[-9:])


def _names(arguments: str) -> list[str]:
    """The options among words that no parser knows, or the words if there is none."""
    words = arguments.split()
    return [word.lstrip("-").partition("=")[0] for word in words if word[0] == "-"] or words


def _unknown_option(name: str, options: Iterable[str]) -> str:
    known = {re.sub(r"\.(class_path|init_args)\b", "", option) for option in options}
    return f"no option --{name}; nearest: {_nearest(name, known, '--')}"


def _unknown_option_of(name: str, class_paths: Iterable[str]) -> str:
    """A wrong option of one of some nested classes, with the nearest of theirs."""
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in class_paths))
    classes = _classes()
    options = [option for each in names if each in classes for option in _options(classes[each])]
    return f"no option {name!r} of {' or '.join(names)}; nearest: {_nearest(name, options)}"


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The three known names that look most like a wrong one, as a whole or by their last part."""

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], other.rpartition(".")[2])
        return max(whole, last.ratio() * 0.95)

    best = sorted(set(known), key=lambda other: (-likeness(other), other))[:3]
    return ", ".join(prefix + other for other in best)


def _classes() -> dict[str, type]:
    """What a class path may name by the class's name alone."""
    found = [cls for base in BASES for cls in _subclasses(base)]
    found += [thing for module in (encoders, heads) for thing in vars(module).values()]
    return {cls.__name__: cls for cls in found if isinstance(cls, type)}


def _subclasses(cls: type) -> Iterator[type]:
    children: list[type] = cls.__subclasses__()
    for child in children:
        if not child.__name__.startswith("_"):
            yield child
        yield from _subclasses(child)


def _options(cls: type) -> list[str]:
    return [
        parameter.name
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.default is not parameter.empty and parameter.name != "counts"
    ]
