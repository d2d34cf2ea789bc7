"""Conversations in the forms in which datasets have them, as messages with a text "role" and a text "content"."""

import json
import re
from typing import Any

from camopd_jax.errors import UserError

# Roles of ShareGPT and its relatives, in lower case. Others, such as "tool", are as the chat template has them
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),  # whose content is the call, as JSON
    **dict.fromkeys(("observation", "function_response", "tool_response", "function", "tool"), "tool"),
    "system": "system",
}
_CALLS = ("function_call", "tool_call")


def conversation(turns: Any, name: str) -> list[dict[str, Any]]:
    """The messages of a conversation, each with all its fields but null ones and an empty list of tool calls.

    >>> conversation([{"from": "human", "value": "Hi", "name": None}], "conversations")
    [{'role': 'user', 'content': 'Hi'}]

    Args:
      turns: objects with "role" and "content", or in ShareGPT's form with "from" and "value". A content may be text, or
        a list of parts {"type": "text", "text": ...}, which are joined. The list may be JSON text.
      name: of the field that holds them, for error messages.

    Raises:
      UserError: for anything else.
    """
    turns = listed(turns)
    if not isinstance(turns, list) or not turns:
        raise UserError(f'"{name}" must be a list of at least one message')
    return [_message(turn, name) for turn in turns]


def listed(value: Any) -> Any:
    """The list or object that a text holds as JSON, as tables have them in their cells; any other value unchanged.

    Raises:
      UserError: for a list of objects in Python's notation, which pandas writes.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        if re.fullmatch(r"\s*\[\s*\{\s*'(role|content|from|value)':.*\]\s*", value, re.DOTALL):
            raise UserError(f"{value!r:.60} is a list in Python's notation; write it as JSON (json.dumps)") from None
        return value


def _message(turn: Any, name: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise UserError(f'"{name}": every message needs a text "role" and a text "content", this is {turn!r:.80}')
    message = {field: value for field, value in turn.items() if value is not None}
    if message.get("tool_calls") == []:  # templates that look for the field refuse an empty list
        del message["tool_calls"]
    if "from" in message and "role" not in message:
        message = {"role": message.pop("from"), "content": message.pop("value", None), **message}
        if not isinstance(message["role"], str) or message["role"].lower() not in _ROLES:
            raise UserError(
                f'"{name}": a turn is "from" {message["role"]!r:.80}; it must be one of {", ".join(_ROLES)}'
            )
    role, called = message.get("role"), message.pop("function_call", None)
    if isinstance(role, str):
        message["role"] = _ROLES.get(role.lower(), role)
        called = message.get("content") if role.lower() in _CALLS and "tool_calls" not in message else called
    if called is not None:
        message |= {"content": "", "tool_calls": _calls(called, name)}
    if message.get("content") is None and "tool_calls" in message:
        message["content"] = ""  # as chat templates write none
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_part(part, name) for part in message["content"])
    if not all(isinstance(message.get(field), str) for field in ("role", "content")):
        raise UserError(f'"{name}": every message needs a text "role" and a text "content"')
    return message


def _calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Function calls as `tool_calls` has them, from one call or several, {"name": ..., "arguments": ...}."""
    calls = listed(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise UserError(f'"{name}": a function call must be JSON with "name" and "arguments", this is {value!r:.80}')
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": listed(call.get("arguments", {}))}}
        for call in calls
    ]


def _part(part: Any, name: str) -> str:
    """The text of a part of a message's content."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise UserError(f'"{name}": a content has a part of type {kind!r:.80}; only parts {{"type": "text"}} are read')
    return part["text"]
