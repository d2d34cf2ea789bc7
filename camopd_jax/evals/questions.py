"""Reads the questions of a benchmark and converts them to tokens."""

from collections.abc import Sequence

from camopd_jax.config.schema import Benchmark
from camopd_jax.data import sources, templates
from camopd_jax.data.sources import LocatedRow
from camopd_jax.data.templates import Reader
from camopd_jax.errors import UserError
from camopd_jax.evals.task import Row, Task


def location(benchmark: Benchmark, task: Task) -> tuple[str, str]:
    """Source and split of a benchmark's questions; an empty source if there is none."""
    return benchmark.source or task.dataset, benchmark.split or task.split


def read_questions(benchmark: Benchmark, task: Task, limit: int | None = None) -> list[LocatedRow]:
    """The rows of a benchmark with file and line, each with the fields that its task needs.

    Args:
      limit: read only this many rows, the first ones.

    Raises:
      UserError: for a benchmark without questions, and for a row without a field that its task needs, or with one that
        cannot be graded against.
    """
    where = f"config.evaluation.benchmarks {benchmark.name}"
    source, split = location(benchmark, task)
    if not source:
        raise UserError(f"{where}: task {benchmark.task} has no dataset of its own; give its source")
    limits = [n for n in (limit, benchmark.limit) if n is not None]
    rows = sources.read_located(source, split, min(limits, default=None), f"{where}.source")
    for row, place in rows:
        with sources.naming(place):
            _check(row, benchmark, task)
        if task.grades_likelihood:
            templates.fill(benchmark.answer, row, place)
    return rows


def _check(row: Row, benchmark: Benchmark, task: Task) -> None:
    missing = [name for name in task.needs if name not in row or str(row[name]).strip() == ""]
    if missing:
        raise UserError(f'no "{missing[0]}" to grade against, which task {benchmark.task} needs; add it to every row')
    task.check_row(row)


def prompts(benchmark: Benchmark, task: Task, reader: Reader, rows: Sequence[LocatedRow]) -> list[list[int]]:
    """The token ids of each question with the benchmark's instruction, or else with its task's."""
    instruction = task.instruction if benchmark.instruction is None else benchmark.instruction
    return reader.prompts([(with_instruction(row, instruction), where) for row, where in rows], benchmark.template)


def with_instruction(row: Row, instruction: str) -> Row:
    """A copy of the row with an instruction after its last request.

    >>> with_instruction({"prompt": "2 + 2?"}, "Be brief.")
    {'prompt': '2 + 2?\\n\\nBe brief.'}
    """
    if instruction and "messages" in row:
        messages = [dict(message) for message in row["messages"]]
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=len(messages) - 1)
        messages[last]["content"] += f"\n\n{instruction}"
        return row | {"messages": messages}
    if instruction and "prompt" in row:
        return row | {"prompt": f"{row['prompt']}\n\n{instruction}"}
    return row
