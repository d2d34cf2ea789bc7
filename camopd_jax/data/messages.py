"""Conversations in the forms in which datasets have them, as messages with a text "role" and a text "content"."""

from typing import Any

from camopd_jax.errors import UserError

_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def conversation(turns: Any, name: str) -> list[dict[str, Any]]:
    """The messages of a conversation, each with all its fields but null ones and an empty list of tool calls.

    >>> conversation([{"from": "human", "value": "Hi", "name": None}], "conversations")
    [{'role': 'user', 'content': 'Hi'}]

    Args:
      turns: objects with "role" and "content", or in ShareGPT's form with "from" and "value". A content may be text, or
        a list of parts {"type": "text", "text": ...}, which are joined.
      name: of the field that holds them, for error messages.

    Raises:
      UserError: for anything else.
    """
    if not isinstance(turns, list) or not turns:
        raise UserError(f'"{name}" must be a list of at least one message')
    return [_message(turn, name) for turn in turns]


def _message(turn: Any, name: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise UserError(f'"{name}": every message needs a text "role" and a text "content", this is {turn!r:.80}')
    message = {field: value for field, value in turn.items() if value is not None}
    if message.get("tool_calls") == []:  # templates that look for the field refuse an empty list
        del message["tool_calls"]
    if "from" in message and "role" not in message:
        said_by = message.pop("from")
        if said_by not in list(_SHAREGPT):  # of a list: `said_by` may be anything
            raise UserError(f'"{name}": a turn is "from" {said_by!r:.80}; it must be one of {", ".join(_SHAREGPT)}')
        message = {"role": _SHAREGPT[said_by], "content": message.pop("value", None), **message}
    if message.get("content") is None and "tool_calls" in message:
        message["content"] = ""  # as chat templates write none
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_part(part, name) for part in message["content"])
    if not all(isinstance(message.get(field), str) for field in ("role", "content")):
        raise UserError(f'"{name}": every message needs a text "role" and a text "content"')
    return message


def _part(part: Any, name: str) -> str:
    """The text of a part of a message's content."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise UserError(f'"{name}": a content has a part of type {kind!r:.80}; only parts {{"type": "text"}} are read')
    return part["text"]
