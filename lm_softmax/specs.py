"""Classes with options, written as calls: `AdaptiveSoftmax(cutoffs=[2000, 10000])`."""

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spec:
    """A class by its name, and options by name.

    Attributes:
        name: Name of the class.
        options: Keyword arguments, plain values.
        text: How it was written.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""

    def __str__(self) -> str:
        return self.text or self.name

    def find(self, classes: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
        """The class, after a look at the names of the options.

        Raises:
            ValueError: If there is no such class, or it has no such option.
        """
        if self.name not in classes:
            raise ValueError(f"no {self.name} among {', '.join(classes)}")
        cls = classes[self.name]
        known = [
            parameter.name
            for parameter in inspect.signature(cls).parameters.values()
            if parameter.default is not parameter.empty
        ]
        for option in self.options:
            if option not in known:
                raise ValueError(f"{self.name} has no option {option}, but {', '.join(known)}")
        return cls


def parse_spec(text: str) -> Spec:
    """Reads `Name` or `Name(option=literal, ...)`; nothing is evaluated but literals.

    Raises:
        ValueError: If the text is neither.
    """
    wrong = f"expected Name or Name(option=value, ...), got {text!r}"
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return Spec(tree.id)
        if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)) or tree.args:
            raise ValueError(wrong)
        options = {}
        for keyword in tree.keywords:
            if keyword.arg is None:
                raise ValueError(wrong)
            options[keyword.arg] = ast.literal_eval(keyword.value)
        return Spec(tree.func.id, options, ast.unparse(tree))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(wrong) from error
