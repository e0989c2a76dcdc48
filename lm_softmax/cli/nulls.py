"""Options that are null and must not be: jsonargparse takes null for an option not given."""

import inspect
from collections.abc import Mapping
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from lm_softmax.factory import find_class, is_spec


def check_nulls(options: Mapping[str, Any], cls: type, name: str) -> None:
    """Refuse null for options that take none, at any depth.

    Args:
        options: As the parser gives them, by name.
        cls: Whose constructor takes them; an option without a type, or with None as its default,
            takes null.
        name: What the constructor makes, for the error message.

    Raises:
        ValueError: For the first such option.
    """
    for option, value in options.items():
        if value is None and (kind := _type_without_null(cls, option)) is not None:
            raise ValueError(f"{name}.{option}: expected {kind}, got null")
        for each in value if isinstance(value, list) else [value]:
            if is_spec(each):
                part = f"{name}.{option}"
                check_nulls(each.get("init_args") or {}, _class(each["class_path"], part), part)


def _class(path: str, name: str) -> type:
    try:
        found = find_class(path, object, name)
    except ValueError:  # a function that makes it, or a class within another one
        return object
    return found if isinstance(found, type) else object


def _type_without_null(cls: type, option: str) -> str | None:
    """The type of an option as a message tells it; None where it takes null."""
    for base in cls.__mro__:
        constructor = vars(base).get("__init__")
        if constructor is None or base is object:
            continue
        parameter = inspect.signature(constructor).parameters.get(option)
        if parameter is None:
            continue
        kind = get_type_hints(constructor).get(option, Any)
        any_kind = kind in (Any, object, NoneType) or isinstance(kind, TypeVar)
        if any_kind or NoneType in get_args(kind) or parameter.default is None:
            return None
        return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    return None
