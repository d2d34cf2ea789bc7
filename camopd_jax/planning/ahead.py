"""Compiles a run's programs while its models are loaded, so that the first step does not wait for them.

The programs are those of `planning.programs`: known from the config and the models' config.json. Of what `lower()` and
`compile()` made, JAX 0.10 keeps in memory what is a jit of the same function; the run's first call of another jit, such
as one of a partial, reads it from the cache on disk. A program that the run then needs with other shapes (a batch of
short prompts, say) is compiled when it is called, as always.
"""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

import jax

from camopd_jax.config.schema import AUTO, TrainConfig
from camopd_jax.data import templates
from camopd_jax.method import schedule
from camopd_jax.method.branches import find_models
from camopd_jax.planning.arrays import plan, read_folders
from camopd_jax.planning.programs import Program, programs_of_start
from camopd_jax.runtime.distributed import is_distributed
from camopd_jax.runtime.progress import console, printed, work

WORKERS = 4  # programs compiled at a time; XLA uses further threads for each
Programs = Callable[[], Sequence[Program]]


def is_on(config: TrainConfig) -> bool:
    """Whether a run compiles ahead. "auto": on a GPU or TPU; a CPU loads models with the cores that would compile.

    Several processes never do: compilers of several GPUs wait for each other, and so need one order of programs.
    """
    wanted = config.compute.compile_ahead
    return not is_distributed() and (jax.default_backend() != "cpu" if wanted == AUTO else wanted == "on")


def known_programs(config: TrainConfig) -> list[Program]:
    """The programs of a run's steps at their largest shapes, each once, in the order in which steps call them."""
    folders = find_models(config)
    student = folders["specialised"]
    shared = templates.shared_vocabulary(student, [folder for folder in folders.values() if folder != student])
    models = read_folders(config, folders, config.rollout.max_prompt_tokens + config.rollout.max_response_tokens)
    ends = templates.eos_ids(student, templates.load_tokenizer(student))
    models = replace(models, eos_ids=ends, shared_vocab=shared.size)
    several: dict[Hashable, Program] = {}
    for part in schedule.parts(config):
        for program in programs_of_start(plan(part, models, None)):
            several.setdefault(program.key, program)
    return list(several.values())


@contextlib.contextmanager
def compiling(programs: Programs) -> Iterator[Callable[[], None]]:
    """Compiles programs in threads, from now until the block ends; those that have not begun by then are left out.

    Whatever fails costs nothing but this time: the run compiles the program itself when it calls it.

    Args:
      programs: lists them; called in a thread.

    Yields:
      A function that waits until all are compiled, and prints what failed.
    """
    failed: list[str] = []
    ended = threading.Event()
    threads = ThreadPoolExecutor(WORKERS, "compile-ahead")

    def compile_one(program: Program) -> None:
        try:
            if not ended.is_set():
                program.lower().compile()
        except Exception as error:
            failed.append(_failure(program.name, error))

    def compile_all() -> None:
        several = programs()
        with work("compiling while models are loaded", len(several), "programs") as progress:
            for _ in as_completed([threads.submit(compile_one, program) for program in several]):
                progress.add()

    first = ThreadPoolExecutor(1, "compile-ahead")
    every = first.submit(compile_all)

    def wait() -> None:
        try:
            every.result()
        except Exception as error:
            failed.append(_failure("programs", error))
        for line in failed:
            console().print(line)
            printed()
        failed.clear()

    try:
        yield wait
    finally:
        ended.set()
        for executor in (first, threads):
            executor.shutdown(wait=False)  # an error is printed at once; what compiles now ends before the process


def _failure(name: str, error: Exception) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return f"warning: {name} not compiled while the models were loaded: {type(error).__name__}: {text}"
