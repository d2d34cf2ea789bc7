"""Detects whether two rows have the same question, so that no evaluation question is used for training."""

import re
from typing import Any

from camopd_jax.data.columns import Row

SHORT = 8  # words; a shorter question without its options may match a different question


def normalised(text: str) -> str:
    """The words and numbers of a text in lower case, which are the same in two copies of a question.

    >>> normalised("What is 2 + 2?  (Hint: EVEN)")
    'what is 2 2 hint even'
    """
    return " ".join(re.findall(r"\w+", text.lower()))


def question_keys(row: Row) -> set[str]:
    """Keys of a row's question: all its words, and the words before the options. Equal keys mean the same question.

    A row without text has the key "".
    """
    texts = [_request(row["messages"]) if "messages" in row else row.get("prompt", "")]
    texts += [row["question"]] if isinstance(row.get("question"), str) else []
    stems = [normalised(re.split(r"\n\s*\(?A[.):]", text)[0]) for text in texts]
    return {normalised(texts[0])} | {stem for stem in stems if stem.count(" ") >= SHORT - 1}


def _request(messages: list[dict[str, Any]]) -> str:
    """The last turn that is not the assistant's: an answer behind a question does not make it another one."""
    return next((m["content"] for m in reversed(messages) if m["role"] != "assistant"), messages[-1]["content"])
