"""Rows of prompts for tests."""


def ask(text, *more):
    """A row whose conversation is one question, or alternates from there."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate([text, *more])]}
