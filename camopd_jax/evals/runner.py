"""Benchmarks on a model in memory: asks, keeps every answer, grades.

Answers lie in `FOLDER/MODEL/BENCHMARK.jsonl`, a line each, written as they come: an evaluation that was killed goes on
with the questions that are open, and a model's score is computed once. A row belongs to its prompt's tokens and the way
it was sampled; what was asked otherwise is asked again.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from camopd_jax.config.schema import Benchmark, Evaluation, Sampling, Template
from camopd_jax.data import sources, templates
from camopd_jax.errors import UserError
from camopd_jax.evals import scores, tasks
from camopd_jax.evals.scores import Standing
from camopd_jax.evals.task import Grade, Row, Task
from camopd_jax.inference import engine
from camopd_jax.inference.engine import Answer, Loaded
from camopd_jax.models import hf
from camopd_jax.runtime.display import Display
from camopd_jax.runtime.distributed import broadcast, is_primary
from camopd_jax.runtime.jsonl import append_rows, read_rows, write_rows
from camopd_jax.runtime.metrics import MetricsWriter

Say = Callable[[str], None]
Kept = dict[str, Any]  # an answer's row in its file
GRADED_AT_ONCE = 64  # answers, between two writes of grades that cost


def check(evaluation: Evaluation) -> None:
    """Finds out before a run what grading would miss after it.

    Raises:
      UserError: naming the package or setting, or the questions' file and field.
    """
    for benchmark in evaluation.benchmarks:
        task = tasks.find(benchmark.task, evaluation.judge)
        task.check()
        questions(benchmark, task, limit=1)


def model_key(loaded: Loaded) -> str:
    """What tells a checkpoint's answers from all others': its contents and the precision it runs at."""
    return f"{loaded.folder.name}-{hf.fingerprint(loaded.folder)}-{loaded.model.dtype}"


def run_key(config_fingerprint: str, step: int) -> str:
    """The same of a run's checkpoint."""
    return f"{config_fingerprint}-{step:06d}"


def standing_row(step: int, standing: Standing, comparison: dict[str, Any]) -> dict[str, Any]:
    """The line of eval.jsonl that tells how a checkpoint stands."""
    return {"step": step, "model": "student", "benchmark": "standing", **vars(standing), **comparison}


def read_standings(workdir: epath.Path) -> dict[int, Standing]:
    """How the checkpoints of a work directory stand, by step, from its eval.jsonl."""
    return _standings(read_rows(workdir / "eval.jsonl"))


def shared_standings(workdir: epath.Path) -> dict[int, Standing]:
    """The same, as the first of many processes reads them."""
    return _standings(broadcast(lambda: read_rows(workdir / "eval.jsonl")))


def _standings(rows: Sequence[Row]) -> dict[int, Standing]:
    return {row["step"]: Standing(row["keeps"], row["merit"]) for row in rows if row["benchmark"] == "standing"}


def questions(benchmark: Benchmark, task: Task, limit: int | None = None) -> list[Row]:
    """The rows of a benchmark, checked to hold what its task grades by."""
    where = f"config.evaluation.benchmarks {benchmark.name}"
    source, split = benchmark.source or task.dataset, benchmark.split or task.split
    if not source:
        raise UserError(f"{where}: task {benchmark.task} has no dataset of its own; name its source")
    limits = [n for n in (limit, benchmark.limit) if n is not None]
    rows = sources.read(source, split, min(limits, default=None), f"{where}.source")
    for i, row in enumerate(rows, 1):
        missing = [name for name in task.needs if name not in row]
        if missing:
            raise UserError(f'{source} row {i}: no "{missing[0]}" to grade against, which task {benchmark.task} needs')
    return rows


def run_all(
    evaluation: Evaluation,
    loaded: Loaded,
    workdir: epath.Path,
    writer: MetricsWriter,
    display: Display,
    model: str,
    step: int = 0,
    key: str | None = None,
    limit: int | None = None,
) -> list[scores.Result]:
    """Every benchmark of a config, on one model; eval.jsonl gets a row of each.

    Args:
      workdir: its `answers` folder keeps the answers, if the config names no other.
      model: what the model is called in eval.jsonl.
      key: what its answers are kept under; None: `model_key`.
      limit: only the first questions of each benchmark.
    """
    if not evaluation.benchmarks:
        return []
    key = key or model_key(loaded)
    answers = epath.Path(evaluation.answers) if evaluation.answers else workdir / "answers"
    results = []
    for benchmark in evaluation.benchmarks:
        row = run(benchmark, loaded, evaluation, answers / key, limit, display.progress)
        writer.add_evaluation({"model": model, "step": step, "checkpoint": key} | row, "accuracy", row["accuracy"])
        figures = f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f} %"
        display.say(f"{model}{f' at step {step}' if step else ''}: {benchmark.name} {figures}")
        results.append(row)
    return results


def run(
    benchmark: Benchmark,
    loaded: Loaded,
    evaluation: Evaluation,
    folder: epath.Path,
    limit: int | None = None,
    say: Say = lambda text: None,
) -> scores.Result:
    """Asks one model one benchmark's questions and grades the answers.

    Args:
      folder: of this model's answers.
      limit: only the first questions.
      say: told of the progress.
    """
    task = tasks.find(benchmark.task, evaluation.judge)
    rows = questions(benchmark, task, limit)
    file = folder / f"{benchmark.name}.jsonl"
    if task.given:
        answers = [weigh(benchmark, loaded, evaluation, file, rows, say)]
    else:
        asked = prompts(benchmark, task, loaded.tokenizer, rows)
        answers = [
            collect(benchmark, loaded, evaluation, file, asked, sample, say) for sample in range(benchmark.samples)
        ]

    return broadcast(lambda: graded(benchmark, task, answers, rows, file, say))


def graded(
    benchmark: Benchmark, task: Task, answers: Sequence[Sequence[Kept]], rows: Sequence[Row], file: epath.Path, say: Say
) -> scores.Result:
    """The result of every sample's answers to the questions `rows`."""
    flat = [answer for given in answers for answer in given]
    grades = grade_all(task, flat, rows * len(answers), file, lambda n: say(f"{benchmark.name}: {n} answers graded"))
    of_question = [grades[i :: len(rows)] for i in range(len(rows))]
    keys = hashlib.sha256("".join(answer["key"] for answer in flat).encode()).hexdigest()[:16]
    return {"asked": keys} | scores.result(
        benchmark, of_question, [answer["length"] for answer in flat], [answer["stopped"] for answer in flat]
    )


def prompts(benchmark: Benchmark, task: Task, tokenizer: Any, rows: Sequence[Row]) -> list[list[int]]:
    """The tokens that each question of a benchmark is asked in."""
    instruction = task.instruction if benchmark.instruction is None else benchmark.instruction
    return [ask(tokenizer, row, instruction, benchmark.template) for row in rows]


def ask(tokenizer: Any, row: Row, instruction: str, template: Template) -> list[int]:
    """A question's tokens, with the instruction behind its last request."""
    if instruction and "messages" in row:
        messages = [dict(message) for message in row["messages"]]
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=len(messages) - 1)
        messages[last]["content"] += f"\n\n{instruction}"
        row = row | {"messages": messages}
    elif instruction and "prompt" in row:
        row = row | {"prompt": f"{row['prompt']}\n\n{instruction}"}
    return templates.prompt_ids(tokenizer, row, template)


def collect(
    benchmark: Benchmark,
    loaded: Loaded,
    evaluation: Evaluation,
    file: epath.Path,
    prompts: Sequence[Sequence[int]],
    sample: int,
    say: Say,
) -> list[dict[str, Any]]:
    """One answer to each prompt: those in the file, and the missing ones from the model."""
    sampling = Sampling.of(benchmark)
    how = (repr(sampling), benchmark.max_response_tokens, loaded.eos_ids, sample)
    how = how if sampling.temperature == 0 else (*how, evaluation.seed)
    keys = [hashlib.sha256(json.dumps([list(p), how]).encode()).hexdigest()[:16] for p in prompts]
    if sampling.temperature > 0:  # two questions with the same words have answers of their own
        keys = [f"{key}-{i}" for i, key in enumerate(keys)]

    def answer(missing: list[int], keep: Callable[[dict[int, Kept]], None]) -> None:
        engine.answer(
            loaded,
            [prompts[i] for i in missing],
            max_new=benchmark.max_response_tokens,
            batch_size=evaluation.batch_size,
            sampling=sampling,
            seed=evaluation.seed,
            draw=sample,
            rows=missing,
            on_batch=lambda answers: keep({i: _kept(answer, sample) for i, answer in answers.items()}),
        )

    of = f"{benchmark.name}, answer {sample + 1} of {benchmark.samples}" if benchmark.samples > 1 else benchmark.name
    return resume(file, keys, answer, lambda done: say(f"{of}: {done} of {len(keys)} questions"))


def weigh(
    benchmark: Benchmark, loaded: Loaded, evaluation: Evaluation, file: epath.Path, rows: Sequence[Row], say: Say
) -> list[dict[str, Any]]:
    """The mean log-probability of each row's given answer: what was found before, and the missing ones anew."""
    pairs = []
    for number, row in enumerate(rows, 1):
        given = templates.fill(benchmark.answer, row, f"config.evaluation.benchmarks {benchmark.name} row {number}")
        prompt, answer = templates.answer_ids(loaded.tokenizer, row, given, benchmark.template)
        pairs.append((prompt, answer[: benchmark.max_response_tokens]))
    keys = [hashlib.sha256(json.dumps(pair).encode()).hexdigest()[:16] for pair in pairs]

    def score(missing: list[int], keep: Callable[[dict[int, Kept]], None]) -> None:
        for start in range(0, len(missing), evaluation.batch_size):
            part = missing[start : start + evaluation.batch_size]
            prompts, answers = zip(*(pairs[i] for i in part), strict=True)
            found = engine.score_responses(loaded, prompts, answers, batch_size=evaluation.batch_size)
            keep({i: {"sample": 0, "response": repr(float(log_probs.mean())), "length": len(log_probs), "stopped": True}
                  for i, log_probs in zip(part, found, strict=True)})  # fmt: skip

    return resume(file, keys, score, lambda done: say(f"{benchmark.name}: {done} of {len(keys)} answers weighed"))


def resume(
    file: epath.Path,
    keys: Sequence[str],
    work: Callable[[list[int], Callable[[dict[int, Kept]], None]], None],
    say: Callable[[int], None],
) -> list[Kept]:
    """The rows of a file by their keys; those it lacks come from `work(missing, keep)`, kept as they come.

    Of many processes the first one reads and keeps them, and all work; the others get no rows.
    """
    known: dict[str, Kept] = {}

    def open_questions() -> list[int]:
        known.update({row["key"]: row for row in read_rows(file)})
        if known:
            write_rows(file, known.values())  # a line cut by a kill must not join the next
        return [i for i, key in enumerate(keys) if key not in known]

    missing = broadcast(open_questions)
    done = len(keys) - len(missing)

    def keep(results: dict[int, Kept]) -> None:
        nonlocal done
        new = [{"key": keys[i], "question": i, **result} for i, result in results.items()]
        known.update({row["key"]: row for row in new})
        if is_primary():
            append_rows(file, new)
        done += len(new)
        say(done)

    if missing:
        work(missing, keep)
    return [known[key] for key in keys] if is_primary() else []


def _kept(answer: Answer, sample: int) -> Kept:
    return {"sample": sample, "response": answer.text, "length": len(answer.ids), "stopped": answer.stopped}


def grade_all(
    task: Task, answers: Sequence[Kept], rows: Sequence[Row], file: epath.Path, say: Callable[[int], None]
) -> list[Grade]:
    """What each answer is worth. Grades are kept beside the answers as they come; what costs is not graded twice."""

    def grade(answer: Kept, row: Row) -> Grade:
        if task.grader and answer.get("grader") == task.grader:
            return Grade(answer["score"], answer["marked"], answer["parts"])
        return task.grade(answer["response"], row)

    grades: list[Grade] = []
    at_once = GRADED_AT_ONCE if task.grader else max(1, len(answers))
    with ThreadPoolExecutor(task.threads) as pool:
        for start in range(0, len(answers), at_once):
            part = answers[start : start + at_once]
            found = list(pool.map(grade, part, rows[start : start + at_once]))
            keep_grades(file, part, found, task.grader)
            grades += found
            if task.grader:
                say(len(grades))
    return grades


def keep_grades(file: epath.Path, answers: Sequence[Kept], grades: Sequence[Grade], grader: str) -> None:
    """Writes what each answer was worth beside it, and who said so, for people to read."""
    marks = {
        answer["key"]: {"score": grade.score, "marked": grade.marked, "parts": grade.parts, "grader": grader}
        for answer, grade in zip(answers, grades, strict=True)
    }
    write_rows(file, [row | marks.get(row["key"], {}) for row in read_rows(file)])
