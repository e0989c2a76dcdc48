"""Factories written down as plain data, `{"class_path": ..., "init_args": {...}}`, and read back.

This is the form of a part of the model in YAML and in a checkpoint. Reading it imports nothing: a
class is found only in a module that is imported already, and only if it has the expected base.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import PurePath
from typing import Any, TypeVar, cast

from torch import Tensor, nn

Spec = dict[str, Any]
T = TypeVar("T")


def describe(factory: object, name: str) -> Spec:
    """Write a factory down.

    Args:
        factory: A class, `functools.partial` of a class with keyword arguments, what jsonargparse
            makes of a class path for a `Callable` type, or a mapping with "class_path" and
            optionally "init_args".
        name: What the factory makes, for the error message.

    Returns:
        `{"class_path": str, "init_args": dict}` of plain values, tensors and nested factories in
        the same form. The path of a class is its shortest one, so that files may move.

    Raises:
        ValueError: If the factory or one of its arguments cannot be written down.
    """
    arguments: Mapping[str, Any]
    if isinstance(factory, Mapping):
        path, arguments = _checked({**factory, "init_args": factory.get("init_args") or {}}, name)
    else:
        cls, arguments = _class_and_arguments(factory, name)
        path = _shortest_path(cls, name)
    init_args = {key: _plain(value, f"{name}.{key}") for key, value in arguments.items()}
    return {"class_path": path, "init_args": init_args}


def build(spec: Spec, base: Callable[..., T], *args: Any, name: str) -> T:
    """Make what a factory makes: `Class(*args, **init_args)`; nested factories make modules.

    Args:
        spec: The factory, written down.
        base: Class that the factory's class has to descend from.
        args: Positional arguments of the class.
        name: What the factory makes, for the error message.

    Raises:
        ValueError: If the written form is damaged, a class is unknown or no subclass of `base`, or
            has no such options, refuses a number as too large, or is one of torch's and fails for
            a value.
    """
    path, init_args = _checked(spec, name)
    cls = find_class(path, base, name)
    options = {
        key: partial(build, value, nn.Module, name=f"{name}.{key}") if is_spec(value) else value
        for key, value in init_args.items()
    }
    try:
        inspect.signature(cls).bind(*args, **options)
    except TypeError as error:
        raise ValueError(f"{name}: {path} {error}") from None
    try:
        return cls(*args, **options)
    except (TypeError, KeyError, OverflowError) as error:
        reason, *_ = str(error.args[0] if error.args else error).split("\n")  # torch adds a stack
        is_torch = cls.__module__.partition(".")[0] == "torch"  # which does not check types
        if not (is_torch or isinstance(error, OverflowError) or "Overflow" in reason):
            raise
        raise ValueError(f"{name}: {path} refuses {init_args}: {reason}") from error


def find_class(path: str, base: Callable[..., T], name: str) -> Callable[..., T]:
    """The class at an import path, looked up among the modules that are imported already.

    Raises:
        ValueError: If there is none, or it is no subclass of `base`.
    """
    module, _, class_name = path.rpartition(".")
    found = _lookup(module, class_name)
    if found is None:
        raise ValueError(
            f"{name}: the imported modules hold no class {path}; import its module first"
        )
    assert isinstance(base, type)
    if not (isinstance(found, type) and issubclass(found, base)) or inspect.isabstract(found):
        raise ValueError(f"{name}: {path} is not a concrete subclass of {base.__name__}")
    return cast("Callable[..., T]", found)


def complete(spec: Spec, base: Callable[..., Any], name: str) -> Spec:
    """The same factory with the default of every keyword option that it leaves open.

    A default that cannot be written down stays out.

    Raises:
        ValueError: If the written form is damaged, or a class is unknown or no concrete subclass of
            its base.
    """
    path, given = _checked(spec, name)
    cls = find_class(path, base, name)
    init_args: dict[str, Any] = {}
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty:
            with suppress(ValueError):
                init_args[parameter.name] = _plain(parameter.default, parameter.name)
    init_args = {
        key: complete(value, nn.Module, f"{name}.{key}") if is_spec(value) else value
        for key, value in (init_args | given).items()
    }
    return {"class_path": _shortest_path(cast(type, cls), name), "init_args": init_args}


def pinned(spec: Spec, part: nn.Module, base: Callable[..., Any], name: str) -> Spec:
    """The same factory with every choice that its product derived from data or left to a default.

    Args:
        spec: The factory, written down.
        part: What it made; its `structure()`, where it has one, are the options to pin.
        base: Class that the factory's class has to descend from.
        name: What the factory makes, for the error message.
    """
    whole = complete(spec, base, name)
    init_args = whole["init_args"]
    for key, value in init_args.items():
        if is_spec(value) and isinstance(child := getattr(part, key, None), nn.Module):
            init_args[key] = pinned(value, child, nn.Module, f"{name}.{key}")
    structure: Callable[[], dict[str, Any]] = getattr(part, "structure", dict)
    return {"class_path": whole["class_path"], "init_args": init_args | structure()}


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Factories by name as `{"head": "AdaptiveSoftmax", "head.cutoffs": [...], ...}`."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if is_spec(value):
            flat[prefix + name] = value["class_path"].rpartition(".")[2]
            flat |= flatten(value["init_args"], f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What differs, as `name is x there, y here`; of a class that differs not its options too."""
    names = [name for name in {**theirs, **ours} if str(theirs.get(name)) != str(ours.get(name))]
    return [
        f"{name} is {theirs.get(name)} there, {ours.get(name)} here"
        for name in names
        if not any(name.startswith(f"{other}.") for other in names)
    ]


def is_spec(value: object) -> bool:
    """Whether a value is a factory in its written form."""
    return isinstance(value, Mapping) and isinstance(value.get("class_path"), str)


def _lookup(module: str, name: str) -> object:
    """A module's attribute, without running a module-level `__getattr__`, which may import."""
    return getattr(sys.modules.get(module), "__dict__", {}).get(name)


def _checked(spec: Any, name: str) -> tuple[str, dict[str, Any]]:
    """Class path and options of a written form, which may come from a damaged file."""
    if not isinstance(spec, Mapping):
        raise ValueError(f"{name}: expected class_path and init_args, got a {type(spec).__name__}")
    path, init_args = spec.get("class_path"), spec.get("init_args")
    if not isinstance(path, str) or not isinstance(init_args, Mapping) or len(spec) > 2:
        kinds = {key: type(value).__name__ for key, value in spec.items()}
        raise ValueError(
            f"{name}: expected class_path and init_args, a word and options by name, got {kinds}"
        )
    return path, dict(init_args)


def _class_and_arguments(factory: object, name: str) -> tuple[type, Mapping[str, Any]]:
    if isinstance(factory, type):
        return factory, {}
    if isinstance(factory, partial):
        if isinstance(factory.func, type) and not factory.args:
            return factory.func, factory.keywords
        # jsonargparse hands over partial(its_instantiator, ..., Class, **init_args).
        by_jsonargparse = getattr(factory.func, "__module__", "").startswith("jsonargparse")
        if by_jsonargparse and factory.args and isinstance(factory.args[-1], type):
            return factory.args[-1], factory.keywords
    raise ValueError(
        f"{name}: {factory!r} cannot be written into a checkpoint; "
        f"give a class or functools.partial(Class, option=value)"
    )


def _shortest_path(cls: type, name: str) -> str:
    parts = cls.__module__.split(".")
    for end in range(1, len(parts) + 1):
        module = ".".join(parts[:end])
        if _lookup(module, cls.__name__) is cls:
            return f"{module}.{cls.__name__}"
    raise ValueError(
        f"{name}: {cls.__module__}.{cls.__qualname__} cannot be written into a checkpoint; "
        f"define the class at the top level of a module"
    )


def _plain(value: Any, name: str) -> Any:
    """A value as a checkpoint may hold it."""
    if value is None or type(value) in (bool, int, float, str) or isinstance(value, Tensor):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, type | partial) or is_spec(value):
        return describe(value, name)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, name) for key, item in value.items()}
    raise ValueError(
        f"{name}: {value!r} cannot be written into a checkpoint; "
        f"give numbers, words, lists or a class with its options"
    )
