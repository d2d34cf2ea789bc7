"""Answers of the student early and late in a run, side by side, each token tinted by its gap."""

from collections.abc import Sequence

from camopd_jax.method.loop import BRANCHES
from camopd_jax.reporting.blocks import Answer, Pair, Token
from camopd_jax.reporting.cast import Cast
from camopd_jax.reporting.runs import Row

LIMITS = (0.05, 0.25, 1.0, 3.0)  # nats, from which a token's tint is stronger
LONGEST = 300  # tokens of an answer that are shown
LONGEST_PROMPT = 1500  # characters
PAIRS = 2  # of each branch


def pairs(cast: Cast) -> list[Pair]:
    """Of each lead group's first run, and each branch."""
    return [
        Pair(group.name, branch, _answer(early), _answer(late))
        for group in cast.leads
        for branch in BRANCHES
        for early, late in _early_and_late([row for row in group.run.samples if row["phase"] == branch])
    ]


def _early_and_late(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Answers to one prompt that came again; else those of the first and the last quarter with the largest gaps."""
    if not rows or rows[0]["step"] == rows[-1]["step"]:
        return []
    first, last = rows[0]["step"], rows[-1]["step"]
    early = [row for row in rows if row["step"] <= first + (last - first) / 4]
    late = [row for row in rows if row["step"] >= last - (last - first) / 4]
    again = {row["prompt"]: row for row in late}
    same = [(row, again[row["prompt"]]) for row in early if row["prompt"] in again]
    by_gap = [sorted(part, key=_size, reverse=True) for part in (early, late)]
    same.sort(key=lambda pair: _size(pair[0]), reverse=True)
    found: dict[str, tuple[Row, Row]] = {}
    for pair in [*same, *zip(*by_gap, strict=False)]:
        found.setdefault(pair[0]["prompt"], pair)
    return list(found.values())[:PAIRS]


def _size(row: Row) -> float:
    """Mean size of an answer's gaps."""
    found = [abs(gap) for gap in row["gaps"] if gap is not None]
    return sum(found) / max(1, len(found))


def _answer(row: Row) -> Answer:
    pieces = list(zip(row["tokens"], row["gaps"], strict=False))
    prompt = row["prompt"]
    if len(prompt) > LONGEST_PROMPT:
        prompt = f"{prompt[:LONGEST_PROMPT]} … ({len(prompt) - LONGEST_PROMPT} more characters)"
    facts = ["selected" if row["selected"] else "not selected"]
    if row["finish_reason"] == "length":
        facts.append("cut at the longest length")
    tokens = [Token(text, tint(gap), "" if gap is None else f"gap {gap:+.4f}") for text, gap in pieces[:LONGEST]]
    return Answer(row["step"], prompt, tokens, max(0, len(pieces) - LONGEST), ", ".join(facts))


def tint(gap: float | None) -> str:
    """`up-N` where the teacher holds a token likelier than the student, `down-N` where less likely; "" near 0."""
    level = 0 if gap is None else sum(abs(gap) >= limit for limit in LIMITS)
    return f"{'up' if gap > 0 else 'down'}-{level}" if level else ""
