"""The prompt sets of the CaMOPD paper (arXiv 2605.27115, Appendix A): their datasets and the form of their prompts.

A recipe is a list of parts, and a part has `rows` prompts of one dataset. The paper does not say which rows it used.
Here they are a seeded sample; for role-play they are the conversations with the most turns, as in the paper.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from camopd_jax.data.columns import Row, lettered
from camopd_jax.data.templates import Messages
from camopd_jax.errors import UserError


@dataclass(frozen=True)
class Part:
    """The prompts that a recipe takes from one dataset."""

    name: str
    source: str  # as in `Stream`
    rows: int  # prompts
    prompt: Callable[[Row], Messages | None]  # the prompt of a row; None: the row has none
    split: str = "train"
    # Reading stops after `window` times `rows` usable rows, so that a large dataset is not read completely; None: read
    # all rows
    window: int | None = None
    rank: Callable[[Row], int] | None = None  # the rows with the highest rank are selected; None: a random sample


@dataclass(frozen=True)
class Recipe:
    """A prompt set, and the names of its files."""

    file: str
    parts: tuple[Part, ...]
    # File of the conversations that were not selected, with their last turn, for fine-tuning a specialised model
    rest: str | None = None


def resized(recipe: Recipe, rows: int | None) -> Recipe:
    """The recipe with `rows` prompts in total, in the same proportions (largest remainders); None: unchanged."""
    if rows is None:
        return recipe
    total = sum(part.rows for part in recipe.parts)
    exact = [part.rows * rows / total for part in recipe.parts]
    counts = [int(count) for count in exact]
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: rows - sum(counts)]:
        counts[i] += 1
    parts = [replace(part, rows=count) for part, count in zip(recipe.parts, counts, strict=True) if count]
    return replace(recipe, parts=tuple(parts))


def with_sources(recipe: Recipe, sources: Sequence[str]) -> Recipe:
    """The recipe with other sources for its parts.

    Args:
      sources: values of --source, each "PART=SOURCE".

    Raises:
      UserError: for a value in another form, and if a part has no source.
    """
    by_part = {}
    for text in sources:
        name, _, source = text.partition("=")
        if name not in {part.name for part in recipe.parts} or not source:
            names = " or ".join(part.name for part in recipe.parts)
            raise UserError(f"--source={text}: give PART=FILE, where PART is {names}")
        by_part[name] = source
    parts = [replace(part, source=by_part.get(part.name, part.source)) for part in recipe.parts]
    for part in parts:
        if not part.source:
            raise UserError(f"--source is missing; give --source={part.name}=FILE.jsonl")
    return replace(recipe, parts=tuple(parts))


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
    """The paper's prompt for a question with or without options."""
    options = row.get("options")
    if options and isinstance(options, list) and "question" in row:
        text = f"{row['question']} {lettered(options, ' ')} {_CHOICE}"
    else:
        messages = request(row)
        if messages is None:
            return None
        text = messages[-1]["content"].strip()
        text = f"{text} {_CHOICE if has_options(text) else _OPEN}"
    return [{"role": "system", "content": MEDICAL_SYSTEM}, {"role": "user", "content": text}]


def has_options(text: str) -> bool:
    """Whether a question has lines of options, at least A and B."""
    return re.search(r"^\s*\(?A[.):].*\n\s*\(?B[.):]", text, re.MULTILINE) is not None


# ---------------------------------------------------------------------------------- conversations


_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name")  # of a message, that chat templates read


def request(row: Row) -> Messages | None:
    """A conversation up to the user's last turn; None if there is none."""
    if "messages" not in row:
        return [{"role": "user", "content": row["prompt"]}] if row.get("prompt") else None
    messages = [{name: m[name] for name in _FIELDS if name in m} for m in row["messages"]]
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    return messages if messages and messages[-1]["content"].strip() else None


def all_but_the_last_turn(row: Row) -> Messages | None:
    """The first n - 1 turns of a conversation of n turns; None if the last turn is not a reply."""
    messages = row.get("messages") or []
    return request(row) if len(messages) > 1 and [m["role"] for m in messages[-2:]] == ["user", "assistant"] else None


def turns(row: Row) -> int:
    """The number of turns of a conversation, without its system prompt."""
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
