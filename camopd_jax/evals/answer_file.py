"""Stores the answers of one model to one benchmark in a JSONL file, so that no answer or paid grade is computed twice.

A row has "key" (a hash of the prompt's tokens and the sampling settings), "question", "sample", "response", "length",
"stopped" and, after grading, "score", "marked", "parts" and "grader".
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from camopd_jax.evals.task import Grade
from camopd_jax.runtime.distributed import broadcast, is_primary
from camopd_jax.runtime.jsonl import append_rows, read_rows, write_rows

_FIELDS = {"key", "response", "length", "stopped"}  # that every answer has
AnswerRow = dict[str, Any]
Save = Callable[[dict[int, AnswerRow]], None]  # saves new rows, by the index of their key


def answer_key(*parts: Any) -> str:
    """A hash (16 hexadecimal digits) of JSON values that identify an answer."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class AnswerFile:
    """A file of answers, written after each batch: an interrupted evaluation continues with the missing answers.

    Only process 0 reads and writes the file; all processes compute.
    """

    def __init__(self, path: epath.Path):
        self.path = path

    def complete(
        self,
        keys: Sequence[str],
        compute: Callable[[list[int], Save], None],
        progress: Callable[[int], None],
    ) -> list[AnswerRow]:
        """The rows of these keys; computes those that the file does not have. Processes other than 0 return no rows.

        Args:
          compute: called with the indices of the missing keys and a function that saves new rows by index, which adds
            "key" and "question" to them.
          progress: called with the number of finished rows, after each save.
        """
        rows: dict[str, AnswerRow] = {}

        def missing_numbers() -> list[int]:
            rows.update({row["key"]: row for row in read_rows(self.path) if row.keys() >= _FIELDS})
            if rows:
                write_rows(self.path, rows.values())  # drops lines that are cut or damaged: those are computed again
            return [i for i, key in enumerate(keys) if key not in rows]

        missing = broadcast(missing_numbers)
        done = len(keys) - len(missing)

        def save(new: dict[int, AnswerRow]) -> None:
            nonlocal done
            added = [{"key": keys[i], "question": i, **row} for i, row in new.items()]
            rows.update({row["key"]: row for row in added})
            if is_primary():
                append_rows(self.path, added)
            done += len(added)
            progress(done)

        if missing:
            compute(missing, save)
        return [rows[key] for key in keys] if is_primary() else []

    def save_grades(self, answers: Sequence[AnswerRow], grades: Sequence[Grade], grader: str) -> None:
        """Writes each answer's grade, and the name of the grader, into the answer's row."""
        by_key = {
            answer["key"]: {"score": grade.value, "marked": grade.marked, "parts": grade.parts, "grader": grader}
            for answer, grade in zip(answers, grades, strict=True)
        }
        write_rows(self.path, [row | by_key.get(row["key"], {}) for row in read_rows(self.path)])
