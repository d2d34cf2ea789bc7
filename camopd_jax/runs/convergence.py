"""Whether a run has ended too early: a branch's gap still falls at the last step."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

PARTS = 5  # the last fifth of a branch's steps is compared with the fifth before it
FEWEST = 4  # steps in a fifth
ERRORS = 2.0  # standard errors that the mean gap must have fallen by


def not_converged(metrics: Sequence[dict[str, Any]], branches: Sequence[str]) -> list[str]:
    """A line for each branch whose mean |gap| fell in the last fifth of its on-policy steps.

    Args:
      metrics: the rows of metrics.jsonl.
    """
    lines = []
    for name in branches:
        blocks = [row if row["phase"] == name else row.get(name) or {} for row in metrics]
        gaps = [block["gap_abs_mean"] for block in blocks if block.get("gap_abs_mean") is not None]
        if fall := _fall(gaps):
            lines.append(
                f"not converged: mean |gap| of {name} fell {100 * fall:.0f} % over the last fifth of its steps; raise "
                "config.steps"
            )
    return lines


def _fall(gaps: Sequence[float]) -> float | None:
    """The fall of the mean from the fifth before the last one to the last one, as a share; None if it is not clear."""
    n = len(gaps) // PARTS
    if n < FEWEST:
        return None
    before, last = np.asarray(gaps[-2 * n : -n]), np.asarray(gaps[-n:])
    fall = before.mean() - last.mean()
    error = math.sqrt((before.var(ddof=1) + last.var(ddof=1)) / n)
    return float(fall / before.mean()) if fall > max(ERRORS * error, 0) else None
