"""Answers of the student early and late in a run."""

from collections.abc import Sequence

from camopd_jax.reporting.runs import FileRow
from camopd_jax.reporting.styles import Styles

LIMITS = (0.05, 0.25, 1.0, 3.0)  # gaps in nats from which a token's colour is stronger
SHOWN = 2  # pairs of answers for each branch
AnswerPair = tuple[str, str, FileRow, FileRow]  # group, branch, an early and a late row of samples.jsonl


def answer_pairs(styles: Styles) -> list[AnswerPair]:
    """Pairs for each branch, from the first run of each lead group."""
    return [
        (group.name, branch, *pair)
        for group in styles.leads
        for branch in styles.parts
        for pair in early_and_late([row for row in group.run.samples if row["phase"] == branch])
    ]


def early_and_late(rows: Sequence[FileRow]) -> list[tuple[FileRow, FileRow]]:
    """Pairs of rows from the first and the last quarter: of the same prompt, else those with the largest gaps."""
    if not rows or rows[0]["step"] == rows[-1]["step"]:
        return []
    first, last = rows[0]["step"], rows[-1]["step"]
    early = [row for row in rows if row["step"] <= first + (last - first) / 4]
    late = [row for row in rows if row["step"] >= last - (last - first) / 4]
    again = {row["prompt"]: row for row in late}
    early, late = (sorted(part, key=_mean_size, reverse=True) for part in (early, late))
    same = [(row, again[row["prompt"]]) for row in early if row["prompt"] in again]
    by_prompt: dict[str, tuple[FileRow, FileRow]] = {}
    for pair in [*same, *zip(early, late, strict=False)]:
        by_prompt.setdefault(pair[0]["prompt"], pair)
    return list(by_prompt.values())[:SHOWN]


def _mean_size(row: FileRow) -> float:
    """The mean absolute gap of an answer."""
    sizes = [abs(gap) for gap in row["gaps"] if gap is not None]
    return sum(sizes) / max(1, len(sizes))


def gap_class(gap: float | None) -> str:
    """A CSS class: `more-N` if a token is more likely for the teacher, `less-N` if it is less likely; "" near 0."""
    level = sum(abs(gap or 0.0) >= limit for limit in LIMITS)
    return f"{'more' if gap and gap > 0 else 'less'}-{level}" if level else ""
