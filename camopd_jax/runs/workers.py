"""Worker processes that run one job at a time; on a CPU, each has its own cores."""

import concurrent.futures
import multiprocessing
import os
import threading
from multiprocessing.queues import Queue

import jax

from camopd_jax.runtime.start import start

Cores = list[int] | None  # None: assigned by the system


def default_workers() -> int:
    """One worker per core, or one if there is an accelerator; a separate process checks, so as not to occupy it."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        if pool.submit(jax.default_backend).result() != "cpu":
            return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerPool(concurrent.futures.ProcessPoolExecutor):
    """A pool of `count` workers. If its `with` block fails, it does not wait for running jobs."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        cores: Queue[Cores] = context.Queue()
        for of_one in _split_cores(count):
            cores.put(of_one)
        super().__init__(count, mp_context=context, initializer=_start_worker, initargs=(cores,))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.shutdown(wait=kind is None, cancel_futures=True)


def _split_cores(count: int) -> list[Cores]:
    """The cores of each worker."""
    if not hasattr(os, "sched_getaffinity"):
        return [None] * count
    own = sorted(os.sched_getaffinity(0))
    return [own[i::count] or own for i in range(count)]


def _start_worker(cores: "Queue[Cores]") -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    own = cores.get()
    if own is not None:
        os.sched_setaffinity(0, own)  # before XLA creates its threads
    start()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # all jobs compile the same small programs


def _exit_with_parent() -> None:
    """Ends this worker when the command is killed, so that it does not write to folders of the next start's workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
