"""Classes chosen by name in a config field, with options in parentheses: objectives and token weights."""

import ast
from collections.abc import Mapping
from typing import TypeVar

from camopd_jax.errors import UserError

T = TypeVar("T")


def named(text: str, field: str, classes: Mapping[str, type[T]], kind: str, example: str) -> T:
    """An instance of the class that a text names, with the options in the text.

    Args:
      kind: what the classes are, in the plural. example: a text with options, both for messages.

    Raises:
      UserError: naming `field`, for an unknown name or option.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise SyntaxError
        name, options = call.func.id, {option.arg or "": ast.literal_eval(option.value) for option in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{field} is {text!r}; give a name, with options as in {example}") from error
    if name not in classes:
        raise UserError(f"{field} is {text!r}; the {kind} are {', '.join(classes)}")
    try:
        return classes[name](**options)
    except (TypeError, UserError) as error:
        raise UserError(f"{field} is {text!r}: {error}") from error
