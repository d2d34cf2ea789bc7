"""Stores the answers of one model to one benchmark in a JSONL file, so that no answer or paid grade is computed twice.

A row has "key" (a hash of the prompt's tokens and the sampling settings), "question", "sample", "response", "length",
"stopped" and, after grading, "score", "marked", "parts" and "grader"; and "digest", a hash of all these. A row that
does not match its digest was damaged or edited, and is computed again.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from camopd_jax.evals.task import Grade
from camopd_jax.runtime.distributed import broadcast, is_primary
from camopd_jax.runtime.jsonl import append_rows, read_rows, to_line, write_rows
from camopd_jax.runtime.progress import Work

AnswerRow = dict[str, Any]
Save = Callable[[dict[int, AnswerRow]], None]  # saves new rows, by the index of their key


def answer_key(*parts: Any) -> str:
    """A hash (16 hexadecimal digits) of JSON values that identify an answer."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _with_digest(row: AnswerRow) -> AnswerRow:
    """The row with the digest of its values as they are read from a file."""
    row = json.loads(to_line({name: value for name, value in row.items() if name != "digest"}))
    return row | {"digest": answer_key(sorted(row.items()))}


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
        answering: Work,
    ) -> list[AnswerRow]:
        """The rows of these keys; computes those that the file does not have. Processes other than 0 return no rows.

        Args:
          compute: called with the indices of the missing keys and a function that saves new rows by index, which adds
            "key" and "question" to them.
          answering: gets the number of finished rows.
        """
        rows: dict[str, AnswerRow] = {}

        def missing_numbers() -> list[int]:
            rows.update({row["key"]: row for row in self._undamaged_rows()})
            if rows:
                write_rows(self.path, rows.values())  # drops lines that are cut or damaged: those are computed again
            return [i for i, key in enumerate(keys) if key not in rows]

        missing = broadcast(missing_numbers)
        answering.start_with(len(keys) - len(missing))

        def save(new: dict[int, AnswerRow]) -> None:
            added = [_with_digest({"key": keys[i], "question": i, **row}) for i, row in new.items()]
            rows.update({row["key"]: row for row in added})
            if is_primary():
                append_rows(self.path, added)
            answering.add(len(added))

        if missing:
            compute(missing, save)
        return [rows[key] for key in keys] if is_primary() else []

    def save_grades(self, answers: Sequence[AnswerRow], grades: Sequence[Grade], grader: str) -> None:
        """Writes each answer's grade, and the name of the grader, into the answer's row."""
        by_key = {
            answer["key"]: {"score": grade.value, "marked": grade.marked, "parts": grade.parts, "grader": grader}
            for answer, grade in zip(answers, grades, strict=True)
        }
        write_rows(self.path, [_with_digest(row | by_key.get(row["key"], {})) for row in self._undamaged_rows()])

    def _undamaged_rows(self) -> list[AnswerRow]:
        return [row for row in read_rows(self.path) if row == _with_digest(row)]
