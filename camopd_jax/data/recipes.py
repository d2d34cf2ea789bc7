"""The prompt sets of the CaMOPD paper (arXiv 2605.27115, Appendix A): where they come from and how they are put.

A recipe is a list of parts; a part takes `rows` prompts of one dataset. Which ones the paper took is not published:
here they are a seeded sample or, of role-play, the conversations with most turns, as there.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from camopd_jax.data.columns import LETTERS, Row

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Part:
    """A share of a recipe's prompts, from one dataset."""

    name: str
    source: str  # as of a Stream
    rows: int
    put: Callable[[Row], Messages | None]  # a row's prompt; None: it has none
    split: str = "train"
    # Only so many times `rows` usable rows are looked at, from the first on: a large dataset is not read whole
    window: int | None = None
    rank: Callable[[Row], int] | None = None  # the highest are taken; None: a random sample


@dataclass(frozen=True)
class Recipe:
    file: str
    parts: tuple[Part, ...]
    rest: str | None = None  # file of the conversations that were not taken, whole, for the fine-tune before


# ----------------------------------------------------------------------------------------- medicine

MEDICAL_SYSTEM = (
    "You are a careful medical reasoning assistant. Provide educational medical information, mention "
    "uncertainty when relevant, and recommend professional medical care for diagnosis or treatment decisions."
)
_CHOICE = "Please reason step by step and give the final answer choice at the end."
_OPEN = (
    "Please reason step by step and answer clearly. Do not present the answer as a substitute for professional "
    "medical advice."
)


def medical(row: Row) -> Messages | None:
    """The paper's prompt for a question with options, or for an open one."""
    options = row.get("options")
    if options and isinstance(options, list):
        listed = " ".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))
        text = f"{row['question']} {listed} {_CHOICE}"
    else:
        asked = request(row)
        if asked is None:
            return None
        text = asked[-1]["content"].strip()
        text = f"{text} {_CHOICE if has_options(text) else _OPEN}"
    return [{"role": "system", "content": MEDICAL_SYSTEM}, {"role": "user", "content": text}]


def has_options(text: str) -> bool:
    """Whether a question ends on lines of options: at least A and B."""
    return re.search(r"^\s*\(?A[.):].*\n\s*\(?B[.):]", text, re.MULTILINE) is not None


# ---------------------------------------------------------------------------------- conversations


def request(row: Row) -> Messages | None:
    """A conversation up to its last request."""
    if "messages" not in row:
        return [{"role": "user", "content": row["prompt"]}] if row.get("prompt") else None
    messages = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    return messages if messages and messages[-1]["content"].strip() else None


def all_but_the_last_turn(row: Row) -> Messages | None:
    """The first n-1 turns of a conversation of n, where the last is a reply."""
    messages = row.get("messages") or []
    return request(row) if len(messages) > 1 and [m["role"] for m in messages[-2:]] == ["user", "assistant"] else None


def turns(row: Row) -> int:
    return sum(message["role"] != "system" for message in row["messages"])


# ------------------------------------------------------------------------------------------ recipes

_NEMOTRON = "nvidia/Nemotron-Post-Training-Dataset-v1"

RECIPES = {
    "medical": Recipe(
        "medical.jsonl",
        (
            Part("medmcqa", "openlifescienceai/medmcqa", 4000, medical),
            Part("medreason", "UCSC-VLAA/MedReason", 3000, medical),
            Part("r1_distill", "FreedomIntelligence/Medical-R1-Distill-Data", 2000, medical),
            Part("m23k", "UCSC-VLAA/m23k-tokenized", 1000, medical),
        ),
    ),
    "roleplay": Recipe(
        "roleplay.jsonl",
        (Part("coser", "Neph0s/CoSER", 10_000, all_but_the_last_turn, rank=turns),),
        rest="roleplay_sft.jsonl",
    ),
    # In proportion to its 746,622 + 1,896,395 + 2,044,407 + 20,662,167 + 310,051 rows
    "general": Recipe(
        "general.jsonl",
        tuple(
            Part(split, _NEMOTRON, rows, request, split, window=4)
            for split, rows in (("chat", 291), ("code", 739), ("math", 797), ("stem", 8052), ("tool_calling", 121))
        ),
    ),
    "jsonl": Recipe("prompts.jsonl", (Part("rows", "", 10_000, request),)),
}
