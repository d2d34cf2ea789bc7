"""ZebraLogic: a grid of houses as JSON. A puzzle is right if every cell is right; right cells are also counted."""

import json
from typing import Any

from camopd_jax.errors import UserError
from camopd_jax.evals.task import Grade, Row, Task


def solution(answer: str) -> dict[str, Any] | None:
    """The grid of the last JSON object with a field "solution"; None if there is none.

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
    """1 if every cell of the answer's grid matches the row's "answer", else 0; the part "cells" counts right cells."""
    cells = [(house, name, text) for house, columns in row["answer"].items() for name, text in columns.items()]
    grid = solution(answer)

    def is_right(house: str, name: str, text: str) -> bool:
        columns = (grid or {}).get(house)
        return isinstance(columns, dict) and str(columns.get(name, "")).strip().lower() == text.strip().lower()

    right = sum(is_right(*cell) for cell in cells)
    return Grade(float(right == len(cells)), grid is not None, {"cells": (right, len(cells))})


def _check_row(row: Row) -> None:
    houses = row["answer"].values() if isinstance(row["answer"], dict) else [None]
    if not all(isinstance(house, dict) and all(isinstance(text, str) for text in house.values()) for house in houses):
        raise UserError(f'"answer" must be a grid as {{"House 1": {{"Name": ...}}}}, this is {row["answer"]!r:.80}')


TASK = Task(grade, check_row=_check_row, dataset="allenai/ZebraLogicBench:grid_mode")
