"""Sends the figures of a run to experiment trackers: TensorBoard, Weights & Biases, Trackio and MLflow.

Every tracker gets the same names. Keys and addresses come from the environment of each library (`WANDB_API_KEY`,
`WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`, ...), never from the config. Only process 0 opens trackers.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from etils import epath

from camopd_jax.errors import UserError

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
PROJECT = "camopd"  # unless the library's own environment variable names another
_IDS = "trackers.json"  # in the work directory: the id of its run at each tracker


class Tracker(Protocol):
    """One run at a tracker."""

    address: str  # where a user finds the run

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Adds the figures of a step by name, such as "recovery/loss"."""

    def add_file(self, file: Path) -> None:
        """Uploads a local file, where the tracker takes files."""

    def close(self) -> None: ...


def check(names: Sequence[str]) -> None:
    """Raises UserError unless the packages of these trackers are installed, and for a name that appears twice."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"config.log.trackers has {name!r}, but the package {PACKAGES[name]} is not installed; "
                f"pip install 'camopd_jax[{name}]', or remove it from config.log.trackers"
            )
    if len(set(names)) < len(names):
        raise UserError(f"config.log.trackers is {tuple(names)!r}; give each tracker once")


class Trackers:
    """The trackers of a run. One that fails after its start is left out from then on: the run goes on without it."""

    def __init__(self, opened: Mapping[str, Tracker], warn: Callable[[str], None]) -> None:
        self._opened, self._warn = dict(opened), warn

    @property
    def addresses(self) -> dict[str, str]:
        return {name: tracker.address for name, tracker in self._opened.items()}

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(figures, step))

    def add_file(self, file: Path) -> None:
        self._each(lambda tracker: tracker.add_file(file))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._opened.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._opened.items()):
            try:
                act(tracker)
            except Exception as error:
                del self._opened[name]
                reason = _one_line(error)
                self._warn(f"warning: {name} gets no more figures, they are in metrics.jsonl: {reason}")


def open_trackers(
    names: Sequence[str], workdir: epath.Path, config: Mapping[str, Any], warn: Callable[[str], None]
) -> Trackers:
    """Opens the run of a work directory at each tracker: the same run again, if it has been opened before.

    Args:
      config: the resolved config as JSON values, which trackers show beside the run.
      warn: prints a line about a tracker that failed during the run.

    Raises:
      UserError: if a tracker cannot be opened, such as for a missing key.
    """
    ids = _read_ids(workdir)
    opened: dict[str, Tracker] = {}
    for name in names:
        try:
            opened[name] = _OPEN[name](workdir, ids, config)
        except Exception as error:
            Trackers(opened, warn).close()
            raise UserError(
                f"config.log.trackers: {name} cannot be opened ({_one_line(error)}); {_ADVICE[name]}, or "
                "remove it from config.log.trackers"
            ) from error
    if ids:
        (workdir / _IDS).write_text(json.dumps(ids, indent=2) + "\n")
    return Trackers(opened, warn)


def _read_ids(workdir: epath.Path) -> dict[str, str]:
    file = workdir / _IDS
    try:
        ids = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        ids = None
    if not isinstance(ids, dict):
        raise UserError(f"{file}: not JSON; remove it to begin new runs at the trackers")
    return ids


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]


def _run_name(workdir: epath.Path) -> str:
    """The last parts of the work directory's path, such as runs-medqa."""
    return "-".join(part for part in workdir.parts[-3:] if part.strip("/:"))


class _TensorBoard:
    def __init__(self, workdir: epath.Path) -> None:
        from tensorboardX import SummaryWriter  # slow to import

        self.address = str(workdir / "tensorboard")
        self._events = SummaryWriter(self.address, flush_secs=10)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def add_file(self, file: Path) -> None:
        """Event files hold no files."""

    def close(self) -> None:
        self._events.close()


class _Wandb:
    def __init__(self, workdir: epath.Path, ids: dict[str, str], config: Mapping[str, Any]) -> None:
        import wandb

        folder = None if "://" in str(workdir) else str(workdir)
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", _run_name(workdir)),
            id=ids.setdefault("wandb", secrets.token_hex(8)),
            resume="allow",
            dir=folder,
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # A resumed run repeats steps after its checkpoint, which W&B's own step counter would refuse
        self._run.define_metric("*", step_metric="step")
        self.address = self._run.url or str(self._run.dir)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log({**figures, "step": step})

    def add_file(self, file: Path) -> None:
        artifact = self._wandb.Artifact(f"{file.stem}-{self._run.id}", type=file.stem)
        artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, workdir: epath.Path, ids: dict[str, str], config: Mapping[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        name = ids.setdefault("trackio", f"{_run_name(workdir)}-{secrets.token_hex(4)}")
        with _quiet():
            self._run = trackio.init(
                project=project,
                name=name,
                resume="allow",
                config=dict(config),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self.address = f"trackio show --project {project}"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def add_file(self, file: Path) -> None:
        with _quiet():
            self._trackio.log_artifact(str(file), name=f"{file.stem}-{self._run.name}", type=file.stem)

    def close(self) -> None:
        with _quiet():
            self._run.finish()


class _Mlflow:
    def __init__(self, workdir: epath.Path, ids: dict[str, str], config: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 refuses folders without it
        import mlflow

        uri = os.environ.get("MLFLOW_TRACKING_URI") or (Path(str(workdir)).absolute() / "mlruns").as_uri()
        self._client = mlflow.MlflowClient(uri)
        self._entities = mlflow.entities
        self._run_id = ids.get("mlflow") or self._create(_run_name(workdir), config)
        ids["mlflow"] = self._run_id
        self._client.update_run(self._run_id, status="RUNNING")
        self.address = f"{uri}, run {self._run_id}"

    def _create(self, name: str, config: Mapping[str, Any]) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        stored = self._client.get_experiment_by_name(experiment)
        number = stored.experiment_id if stored else self._client.create_experiment(experiment)
        run_id = self._client.create_run(number, run_name=name).info.run_id
        self._client.log_dict(run_id, dict(config), "config.json")
        return run_id

    def log(self, figures: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)  # milliseconds
        metrics = [self._entities.Metric(name, value, now, step) for name, value in figures.items()]
        for first in range(0, len(metrics), 1000):  # the most that a server takes at a time
            self._client.log_batch(self._run_id, metrics[first : first + 1000])

    def add_file(self, file: Path) -> None:
        self._client.log_artifact(self._run_id, str(file))

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what a library prints about itself."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


_OPEN: dict[str, Callable[[epath.Path, dict[str, str], Mapping[str, Any]], Tracker]] = {
    "tensorboard": lambda workdir, *_: _TensorBoard(workdir),
    "wandb": _Wandb,
    "trackio": _Trackio,
    "mlflow": _Mlflow,
}
_ADVICE = {
    "tensorboard": "give a --workdir that can be written",
    "wandb": "set WANDB_API_KEY, or WANDB_MODE=offline",
    "trackio": "set TRACKIO_DIR to a folder that can be written",
    "mlflow": "set MLFLOW_TRACKING_URI to a server or a folder",
}
