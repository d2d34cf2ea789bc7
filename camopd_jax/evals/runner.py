"""Runs benchmarks on a loaded model: samples answers, stores and grades them.

Answers are in `FOLDER/MODEL/BENCHMARK.jsonl`, one per line, written after each batch. An interrupted evaluation
continues with the missing answers, and no answer is computed twice. An answer is identified by its prompt's tokens and
the sampling settings; if one of them changes, a new answer is computed.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from etils import epath

from camopd_jax.config.schema import Benchmark, Evaluation, Sampling
from camopd_jax.data import answers, sources, templates
from camopd_jax.data.sources import LocatedRow
from camopd_jax.evals import comparison, tasks
from camopd_jax.evals.answer_file import AnswerFile, AnswerRow, Save, answer_key
from camopd_jax.evals.questions import prompts, read_questions
from camopd_jax.evals.results import Result, summarise
from camopd_jax.evals.task import Grade, Row, Task
from camopd_jax.inference import loading
from camopd_jax.inference.answer import answer
from camopd_jax.inference.loading import Loaded
from camopd_jax.inference.log_probs import score_responses
from camopd_jax.runtime.display import Display
from camopd_jax.runtime.distributed import broadcast
from camopd_jax.runtime.jsonl import read_rows
from camopd_jax.runtime.metrics import MetricsWriter
from camopd_jax.runtime.progress import work

GRADED_AT_ONCE = 64  # answers whose paid grades are written to the file together


def check(evaluation: Evaluation) -> None:
    """Checks before a run that the benchmarks can be graded.

    Raises:
      UserError: for an unknown task, a missing package or setting, and questions that cannot be read or graded.
    """
    for benchmark in evaluation.benchmarks:
        task = tasks.find(benchmark, evaluation.judge)
        task.check()
        read_questions(benchmark, task, limit=1)


def notices(evaluation: Evaluation) -> list[str]:
    """The lines that are to be printed at the start of an evaluation."""
    lines = [tasks.find(benchmark, evaluation.judge).notice() for benchmark in evaluation.benchmarks]
    return [line for line in dict.fromkeys(lines) if line]


def model_key(loaded: Loaded) -> str:
    """The key of a checkpoint's answers, from its files and its compute dtype."""
    return f"{loaded.folder.name}-{loading.fingerprint(loaded.folder)}-{loaded.model.dtype}"


def run_key(config_fingerprint: str, step: int) -> str:
    """The key of the answers of a run's checkpoint."""
    return f"{config_fingerprint}-{step:06d}"


def read_ranks(workdir: epath.Path) -> dict[int, comparison.Rank]:
    """The ranks of a work directory's checkpoints by step."""
    return comparison.ranks(read_rows(workdir / "eval.jsonl"))


def broadcast_ranks(workdir: epath.Path) -> dict[int, comparison.Rank]:
    """The result of `read_ranks` on process 0, on every process."""
    return comparison.ranks(broadcast(lambda: read_rows(workdir / "eval.jsonl")))


def answers_folder(evaluation: Evaluation, workdir: epath.Path) -> epath.Path:
    """The folder of the answers of a run's models."""
    return epath.Path(evaluation.answers) if evaluation.answers else workdir / "answers"


@dataclass(frozen=True)
class Evaluator:
    """Runs a config's benchmarks on models, and writes the results to eval.jsonl."""

    evaluation: Evaluation
    workdir: epath.Path
    writer: MetricsWriter
    display: Display
    printed: set[str] = field(default_factory=set)  # lines: a run's last evaluation may be that of its last step

    def run(
        self, name: str, loaded: Loaded, step: int = 0, key: str | None = None, limit: int | None = None
    ) -> list[Result]:
        """The results of one model on every benchmark.

        Args:
          name: of the model in eval.jsonl.
          step: of the checkpoint, if the model is a checkpoint of a run.
          key: of the model's answers; None: `model_key`.
          limit: use only this many questions of each benchmark, the first ones.
        """
        if not self.evaluation.benchmarks:
            return []
        key = key or model_key(loaded)
        folder = answers_folder(self.evaluation, self.workdir)
        results = []
        for benchmark in self.evaluation.benchmarks:
            with work(f"evaluating {name}"):
                result = run_benchmark(benchmark, loaded, self.evaluation, folder / key, limit)
            row = {"model": name, "step": step, "checkpoint": key} | result
            self.writer.add_evaluation(row, "accuracy", result["accuracy"])
            accuracy = f"{100 * result['accuracy']:.1f} ± {100 * result['standard_error']:.1f} %"
            line = f"{name}{f' at step {step}' if step else ''}: {benchmark.name} {accuracy}"
            if line not in self.printed:
                self.display.print(line)
            self.printed.add(line)
            results.append(result)
        return results


def run_benchmark(
    benchmark: Benchmark,
    loaded: Loaded,
    evaluation: Evaluation,
    folder: epath.Path,
    limit: int | None = None,
) -> Result:
    """The result of one model on one benchmark.

    Args:
      folder: of the model's answers.
      limit: use only this many questions, the first ones.
    """
    task = tasks.find(benchmark, evaluation.judge)
    rows = read_questions(benchmark, task, limit)
    file = AnswerFile(folder / f"{benchmark.name}.jsonl")
    job = _Job(benchmark, task, evaluation, loaded, file)
    answers = job.likelihoods(rows) if task.grades_likelihood else job.answers(rows)
    return broadcast(lambda: job.result(answers, [row for row, _ in rows]))


@dataclass(frozen=True)
class _Job:
    """One benchmark on one model."""

    benchmark: Benchmark
    task: Task
    evaluation: Evaluation
    loaded: Loaded
    file: AnswerFile

    def answers(self, rows: Sequence[LocatedRow]) -> list[AnswerRow]:
        """The model's answers: the first sample for all questions, then the second sample for all questions, ..."""
        tokens = prompts(self.benchmark, self.task, self.loaded.reader, rows)
        return [row for sample in range(self.benchmark.samples) for row in self._sample(tokens, sample)]

    def _sample(self, tokens: Sequence[Sequence[int]], sample: int) -> list[AnswerRow]:
        """One answer to each prompt; `sample` is its number."""
        benchmark, evaluation = self.benchmark, self.evaluation
        sampling = Sampling.of(benchmark)
        sampled = sampling.temperature > 0
        way = [repr(sampling), benchmark.max_response_tokens, self.loaded.eos_ids, sample]
        way += [evaluation.seed] if sampled else []
        keys = [answer_key(list(prompt), way) for prompt in tokens]
        if sampled:  # equal questions get different answers
            keys = [f"{key}-{i}" for i, key in enumerate(keys)]

        def compute(missing: list[int], save: Save) -> None:
            answer(
                self.loaded,
                [tokens[i] for i in missing],
                max_new=benchmark.max_response_tokens,
                batch_size=evaluation.batch_size,
                sampling=sampling,
                seed=evaluation.seed,
                draw=sample,
                rows=missing,
                on_batch=lambda new: save(
                    {
                        i: {"sample": sample, "response": one.text, "length": len(one.ids), "stopped": one.stopped}
                        for i, one in new.items()
                    }
                ),
            )

        several = f", answer {sample + 1} of {benchmark.samples}" if benchmark.samples > 1 else ""
        title = f"{benchmark.name}{several}"
        with work(title, len(keys), "questions") as answering:
            return self.file.complete(keys, compute, answering)

    def likelihoods(self, rows: Sequence[LocatedRow]) -> list[AnswerRow]:
        """Rows whose "response" is the mean log-probability of the given answer's tokens, as text."""
        benchmark, batch_size = self.benchmark, self.evaluation.batch_size
        pairs = []
        for row, where in rows:
            text = templates.fill(benchmark.answer, row, where)
            with sources.naming(where):
                prompt, response = answers.answer_ids(self.loaded.reader, row, text, benchmark.template)
            pairs.append((prompt, response[: benchmark.max_response_tokens]))
        keys = [answer_key(prompt, response) for prompt, response in pairs]

        def compute(missing: list[int], save: Save) -> None:
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                prompts, responses = zip(*(pairs[i] for i in batch), strict=True)
                log_probs = score_responses(self.loaded, prompts, responses, batch_size=batch_size)
                save(
                    {
                        i: {"sample": 0, "response": repr(float(values.mean())), "length": len(values), "stopped": True}
                        for i, values in zip(batch, log_probs, strict=True)
                    }
                )

        with work(benchmark.name, len(keys), "answers scored") as scoring:
            return self.file.complete(keys, compute, scoring)

    def result(self, answers: Sequence[AnswerRow], rows: Sequence[Row]) -> Result:
        """Grades the answers to the questions `rows`; returns the result."""
        grades = self._grade(answers, rows)
        by_question = [grades[i :: len(rows)] for i in range(len(rows))]
        lengths, stopped = ([row[name] for row in answers] for name in ("length", "stopped"))
        # A hash of the questions and sampling settings. Only results with the same "asked" are compared.
        identity = hashlib.sha256("".join(row["key"] for row in answers).encode()).hexdigest()[:16]
        return {"asked": identity} | summarise(self.benchmark, by_question, lengths, stopped)

    def _grade(self, answers: Sequence[AnswerRow], rows: Sequence[Row]) -> list[Grade]:
        """Grades each answer and stores the grades in the file. A paid grade in the file is reused."""

        def grade(number: int) -> Grade:
            row = answers[number]
            if self.task.grader and row.get("grader") == self.task.grader:
                return Grade(row["score"], row["marked"], row["parts"])
            return self.task.grade(row["response"], rows[number % len(rows)])

        grades: list[Grade] = []
        at_once = GRADED_AT_ONCE if self.task.grader else max(1, len(answers))
        title = f"{self.benchmark.name}: grading"
        with ThreadPoolExecutor(self.task.threads) as pool, work(title, len(answers), "answers") as grading:
            for start in range(0, len(answers), at_once):
                numbers = range(start, min(start + at_once, len(answers)))
                new = []
                for one in pool.map(grade, numbers):
                    new.append(one)
                    grading.add()
                self.file.save_grades([answers[i] for i in numbers], new, self.task.grader)
                grades += new
        return grades
