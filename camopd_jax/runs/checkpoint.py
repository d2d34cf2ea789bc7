"""Checkpoints by Orbax, and the work directory they belong to."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from camopd_jax.config.identity import different_fields, fingerprint, to_json
from camopd_jax.config.schema import Checkpoints as CheckpointsConfig
from camopd_jax.config.schema import Config as RunConfig
from camopd_jax.errors import UserError
from camopd_jax.runtime.distributed import broadcast, run_on_all
from camopd_jax.runtime.termination import means_lost_process
from camopd_jax.types import TrainState

policies = ocp.checkpoint_managers.preservation_policy


class Checkpoints:
    """`workdir/checkpoints`: one folder a step, written in the background, whole or not at all.

    Kept are the last `keep_last` steps, and of the steps in `standings` the `keep_best` best.
    """

    def __init__(self, workdir: str, config: CheckpointsConfig, standings: Mapping[int, Any]):
        """
        Args:
          standings: of the steps that were evaluated, by step: what compares greater is better. Looked at anew
            whenever a checkpoint is written.
        """
        self._standings = standings
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(config.keep_last), _Best(config.keep_best, standings)]
            ),
            enable_async_checkpointing=True,
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "positions": ocp.JsonCheckpointHandler(),
            "provenance": ocp.JsonCheckpointHandler(),
        }
        self._folder = checkpoints_folder(workdir)
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._folder}: the checkpoints cannot be read ({_reason(error)}); delete what is broken there, or "
                "give a new --workdir"
            ) from error

    def latest(self) -> int | None:
        """The last whole checkpoint's step."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The best step that is there, of those that were evaluated; of equals, the last."""
        measured = [step for step in self.steps() if step in self._standings]
        return max(reversed(measured), key=self._standings.__getitem__, default=None)

    def save(
        self,
        step: int,
        state: TrainState,
        positions: dict[str, Any],
        provenance: dict[str, Any],
    ) -> None:
        """Starts writing a checkpoint; `wait` waits for it. A step that is there already is left as it is.

        Args:
          positions: of the data streams, as JSON values.
          provenance: of the run's models, as JSON values.

        Raises:
          UserError: if this checkpoint, or the one before in the background, cannot be written.
        """
        if step in self.steps():
            return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            positions=ocp.args.JsonSave(positions),
            provenance=ocp.args.JsonSave(provenance),
        )
        with self._writing():
            self._manager.save(step, args=arguments, force=True)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
        """State, positions and provenance of a checkpoint, bit for bit.

        Args:
          like: a state whose shardings the restored one takes; its shapes and dtypes must be the stored ones.

        Raises:
          UserError: if the checkpoint cannot be read, or holds another model's state.
        """
        abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, like)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract),
            positions=ocp.args.JsonRestore(),
            provenance=ocp.args.JsonRestore(),
        )
        try:
            with _one_error():
                stored = _shapes(self._manager.item_metadata(step)["state"].tree)
                wanted = _shapes(abstract)
                found = self._manager.restore(step, args=arguments) if stored == wanted else None
        except Exception as error:  # Orbax and TensorStore raise many kinds
            if means_lost_process(error):
                raise
            raise UserError(
                f"{self._folder / str(step)}: this checkpoint cannot be read ({_reason(error)}); delete the folder, "
                "and the run goes on from the one before"
            ) from error
        if found is None:
            name = min(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
            raise UserError(
                f"{self._folder / str(step)}: the state of another model ({name} is {stored.get(name, 'not there')}, "
                f"here {wanted.get(name, 'not there')}); give the model that the run began with, or a new --workdir"
            )
        return found["state"], found["positions"], found["provenance"]

    def wait(self) -> None:
        """Returns when all checkpoints are on disk.

        Raises:
          UserError: if one cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore raises a full disk as a ValueError
            if means_lost_process(error):
                raise
            raise UserError(
                f"{self._folder}: a checkpoint cannot be written ({_reason(error)}); free some room and start the "
                "same command again, the checkpoints before it are whole"
            ) from error


class _Best:
    """Preserves the `n` checkpoints that stand best."""

    def __init__(self, n: int, standings: Mapping[int, Any]):
        self._n, self._standings = n, standings

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        measured = [c.step for c in checkpoints if c.step in self._standings]
        best = sorted(measured, key=lambda step: (self._standings[step], step))[len(measured) - self._n :]
        return [c.step in best for c in checkpoints]


def checkpoints_folder(workdir: str) -> epath.Path:
    """Where a work directory's checkpoints lie: an absolute path, as Orbax asks for, or a gs:// one."""
    folder = epath.Path(workdir) / "checkpoints"
    return folder if "://" in workdir else folder.resolve()  # epath would resolve gs:// to a local folder


def _shapes(tree: Any) -> dict[str, str]:
    """The arrays of a tree by name, as in "float32[5, 7]"."""
    return {name: f"{a.dtype}{list(a.shape)}" for name, a in ocp.tree.to_flat_dict(tree, sep="/").items()}


def _reason(error: Exception) -> str:
    """What went wrong: the end of the chain that TensorStore prints, without the specification after it."""
    return str(error).split(" [tensorstore_spec")[0].split('": ')[-1].splitlines()[0] or type(error).__name__


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Of many reads that fail at once Orbax raises one; Python's hooks would print the others' tracebacks."""
    hooks = sys.unraisablehook, sys.excepthook
    sys.unraisablehook = sys.excepthook = lambda *_: None
    try:
        yield
    except Exception:
        time.sleep(0.5)  # the others are failing still, in threads of TensorStore
        raise
    finally:
        sys.unraisablehook, sys.excepthook = hooks


def claim_workdir(workdir: epath.Path, config: RunConfig) -> None:
    """Writes workdir/config.json, or checks that the one there is of the same run; of many processes, the first does.

    Fields that do not touch a run's numbers (`resolved.fingerprint`) may change between its starts.

    Raises:
      UserError: naming the fields in which the run that owns the directory differs, or in which this process differs
        from the first; and if the directory is not the same on all hosts.
    """
    owner = broadcast(lambda: _claim(workdir, config))
    run_on_all(lambda: _check_shared(workdir, config, owner))


def _check_shared(workdir: epath.Path, config: RunConfig, owner: dict[str, Any]) -> None:
    """Raises UserError unless this process has the first one's config and work directory."""
    if fields := ", ".join(different_fields(owner, to_json(config), every=True)):
        raise UserError(f"its config is not that of process 0 ({fields}); give the same command on every host")
    if not (workdir / "config.json").exists():
        raise UserError(
            f"{workdir}: what process 0 wrote there is not to be seen here; give a --workdir that all hosts share, on "
            "a network file system or gs://"
        )


def check_owner(workdir: epath.Path, config: RunConfig) -> bool:
    """Whether a run of this config owns a work directory already; False: nobody does.

    Raises:
      UserError: if another run does, naming the fields in which it differs.
    """
    file = workdir / "config.json"
    if not file.exists():
        return False
    try:
        owner, kind = json.loads(file.read_text()), type(config).__name__
        if owner["kind"] != kind:
            raise UserError(
                f"{workdir}: it belongs to a run of a {owner['kind']}, not of a {kind}; give a new --workdir"
            )
        if owner["fingerprint"] != fingerprint(config):
            fields = ", ".join(different_fields(owner["config"], to_json(config))) or "of another version"
            raise UserError(
                f"{workdir}: it belongs to a run with another config ({fields}); give that config, or a new --workdir"
            )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not the config.json of a run; move it away, or give a new --workdir") from error
    return True


def _claim(workdir: epath.Path, config: RunConfig) -> dict[str, Any]:
    """Writes or checks config.json; returns the config."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        check_owner(workdir, config)
        part = workdir / "config.json.part"
        record = {"kind": type(config).__name__, "fingerprint": fingerprint(config), "config": to_json(config)}
        part.write_text(json.dumps(record, indent=2) + "\n")
        part.replace(workdir / "config.json")
        return to_json(config)
    except ImportError as error:  # the file system of a bucket is a package of its own
        raise UserError(f"{workdir}: {error}, or give a local --workdir") from error
    except OSError as error:
        raise UserError(f"{workdir}: cannot write there ({error.strerror}); give another --workdir") from error
