"""ZebraLogic: a grid of houses as JSON. A puzzle counts when every cell is right; cells are counted beside."""

import json
from typing import Any

from camopd_jax.evals.task import Grade, Row, Task


def solution(answer: str) -> dict[str, Any] | None:
    """The grid of the last JSON object that has a "solution"; None without one.

    >>> solution('So: {"solution": {"House 1": {"Name": "Eric"}}}')
    {'House 1': {'Name': 'Eric'}}
    """
    decoder, at = json.JSONDecoder(), len(answer)
    while (at := answer.rfind("{", 0, at)) >= 0:
        try:
            value, _ = decoder.raw_decode(answer, at)
        except ValueError:
            continue
        if isinstance(value.get("solution"), dict):
            return value["solution"]
    return None


def grade(answer: str, row: Row) -> Grade:
    cells = [(house, name, text) for house, row_ in row["answer"].items() for name, text in row_.items()]
    grid = solution(answer)

    def right(house: str, name: str, text: str) -> bool:
        given = (grid or {}).get(house)
        return isinstance(given, dict) and str(given.get(name, "")).strip().lower() == text.strip().lower()

    hits = sum(right(*cell) for cell in cells)
    return Grade(float(hits == len(cells)), grid is not None, {"cells": (hits, len(cells))})


TASK = Task(grade, dataset="allenai/ZebraLogicBench:grid_mode")
