"""Runs commands of the package like a user, without repeating the imports.

A fork server does the imports. Every command runs in a fork of it, with its own flags, devices and exit code.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Skips LLVM's optimisation: most of a test's time is the compilation of programs that run once.
QUICKLY_COMPILED = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["camopd_jax.train", "camopd_jax.sft", "transformers", "tokenizers", "tensorboardX"])


@dataclass
class Ended:
    code: int
    out: str
    err: str


class Running:
    """A started command; its output is in `out` and `err`."""

    def __init__(self, folder: Path, module: str, *args: str, devices: int = 1, env: dict[str, str] | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.err = folder / "stdout", folder / "stderr"
        environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICKLY_COMPILED}",
                       "XDG_CACHE_HOME": str(folder.parent / "cache"), **(env or {})}  # fmt: skip
        arguments = (module, [str(a) for a in args], environment, str(self.out), str(self.err))
        self._process = _server.Process(target=_main, args=arguments)
        self._process.start()

    def wait(self, seconds: float = 240) -> Ended:
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            raise TimeoutError(self.out.read_text() + self.err.read_text())
        return Ended(self._process.exitcode, self.out.read_text(), self.err.read_text())

    def kill(self) -> None:
        """Kills it, if it has not ended."""
        self._process.kill()
        self._process.join()

    def send(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def when(self, condition, number: signal.Signals, seconds: float = 240) -> Ended:
        """Sends a signal as soon as `condition()` is true, and waits for the end."""
        end = time.monotonic() + seconds
        while not condition():
            assert self._process.is_alive() and time.monotonic() < end, self.out.read_text() + self.err.read_text()
            time.sleep(0.002)
        self.send(number)
        return self.wait()


class Pair:
    """A command started as two processes."""

    def __init__(self, command, module, *args, of_each=((), ()), devices=4, **options):
        with socket.create_server(("", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = [f"--coordinator_address={address}", "--num_processes=2"]
        self.processes = [
            command.start(module, *args, *own, *flags, f"--process_id={i}", devices=devices, **options)
            for i, own in enumerate(of_each)
        ]

    def wait(self, seconds=240):
        try:
            return [process.wait(seconds) for process in self.processes]
        finally:
            self.kill()

    def kill(self):
        for process in self.processes:
            process.kill()


def _main(module: str, args: list[str], environment: dict[str, str], out: str, err: str) -> None:
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    sys.argv = [module, *args]
    sys.modules.pop(module, None)  # runpy warns of a module that was imported before it is run
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which a forked process would end without
