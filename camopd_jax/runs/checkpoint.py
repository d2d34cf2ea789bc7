"""Saves and restores the checkpoints of a work directory, with Orbax."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from camopd_jax.config import schema
from camopd_jax.errors import UserError
from camopd_jax.runs.array_handler import state_handler
from camopd_jax.runs.digests import digests
from camopd_jax.runtime.distributed import barrier, is_primary
from camopd_jax.runtime.termination import means_lost_process
from camopd_jax.types import TrainState

_TRANSIENT = (PermissionError, MemoryError, jax.errors.JaxRuntimeError)  # of reading: the files may be sound
policies = ocp.checkpoint_managers.preservation_policy


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be read, or is not what was saved."""


class CheckpointStore:
    """`workdir/checkpoints`: a folder for each step, written in the background and never incomplete.

    It keeps the last `keep_last` steps, and the `keep_best` steps with the highest ranks.
    """

    def __init__(self, workdir: str, config: schema.Checkpoints, ranks: Mapping[int, Any]) -> None:
        """
        Args:
          ranks: of the evaluated steps; the greater rank is better. Entries added later are used too.

        Raises:
          UserError: if the folder cannot be read.
        """
        self._ranks = ranks
        self._folder = checkpoints_folder(workdir)
        kept = [policies.LatestN(config.keep_last), _BestN(config.keep_best, ranks)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept), enable_async_checkpointing=True
        )
        handlers = {
            "state": state_handler(),
            "positions": ocp.JsonCheckpointHandler(),
            "provenance": ocp.JsonCheckpointHandler(),
            "digests": ocp.JsonCheckpointHandler(),
        }
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._folder}: the checkpoints cannot be read ({_reason(error)}); delete the damaged files, or "
                "give a new --workdir"
            ) from error

    def latest(self) -> int | None:
        """The last step that has a complete checkpoint."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All steps that have a complete checkpoint, in ascending order."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step with the highest rank; the last one if ranks are equal."""
        evaluated = [step for step in self.steps() if step in self._ranks]
        return max(reversed(evaluated), key=self._ranks.__getitem__, default=None)

    def save(self, step: int, state: TrainState, positions: dict[str, Any], provenance: dict[str, Any]) -> None:
        """Starts to write a checkpoint; `wait` returns when it is written. An existing one is not changed.

        Args:
          positions: of the data streams, as JSON values.
          provenance: of the run's models, as JSON values.

        Raises:
          UserError: if this checkpoint, or the previous one in the background, cannot be written.
        """
        if step in self.steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            positions=ocp.args.JsonSave(positions),
            provenance=ocp.args.JsonSave(provenance),
            digests=ocp.args.JsonSave(digests(state, positions, provenance)),
        )
        with self._write_errors():
            self._manager.save(step, args=items, force=True)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
        """Restores state, positions and provenance, with identical bits.

        Args:
          like: a state with the wanted shardings; its shapes and dtypes must match the checkpoint.

        Raises:
          DamagedCheckpoint: if it cannot be read, or differs from what was saved.
          UserError: if it holds the state of another model, or cannot be read for now.
        """
        with self._read_errors(step):
            stored = self._manager.item_metadata(step)["state"].tree
        fields = {field.name: getattr(like, field.name) for field in dataclasses.fields(like)}
        if "objectives" not in stored and not like.objectives:  # written before the field existed
            del fields["objectives"]
        wanted = jax.tree.map(ocp.tree.to_shape_dtype_struct, fields)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(wanted, ocp.checkpoint_utils.construct_restore_args(wanted)),
            positions=ocp.args.JsonRestore(),
            provenance=ocp.args.JsonRestore(),
            digests=ocp.args.JsonRestore(),
        )
        self._check_shapes(step, _shapes(stored), _shapes(wanted))
        with self._read_errors(step):
            restored = self._manager.restore(step, args=items)
        parts = TrainState(**restored["state"]), restored["positions"], restored["provenance"]
        read, saved = digests(*parts), restored["digests"]
        different = [name for name in read if not isinstance(saved, dict) or read[name] != saved.get(name)]
        if different:
            raise DamagedCheckpoint(f"{self._folder / str(step)}: damaged on disk, first in {min(different)}")
        return parts

    def set_aside(self, step: int) -> str:
        """Moves a checkpoint out of the way; returns its new folder. Every process has to call it."""
        damaged = self._folder.parent / f"damaged_checkpoint_{step}"
        if is_primary():
            if damaged.exists():
                damaged.rmtree()
            (self._folder / str(step)).rename(damaged)
        barrier("set aside")
        self._manager.reload()
        return str(damaged)

    def wait(self) -> None:
        """Returns when all checkpoints are on disk.

        Raises:
          UserError: if one cannot be written.
        """
        with self._write_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _check_shapes(self, step: int, stored: dict[str, str], wanted: dict[str, str]) -> None:
        different = [name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name)]
        if different:
            name = min(different)
            raise UserError(
                f"{self._folder / str(step)}: the state of another model ({name} is {stored.get(name, 'not there')}, "
                f"here {wanted.get(name, 'not there')}); give the model that the run began with, or a new --workdir"
            )

    @contextlib.contextmanager
    def _read_errors(self, step: int) -> Iterator[None]:
        """Converts Orbax's errors for a damaged checkpoint to a UserError."""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds
            if means_lost_process(error):
                raise
            kind = UserError if isinstance(error, _TRANSIENT) else DamagedCheckpoint
            raise kind(f"{self._folder / str(step)}: this checkpoint cannot be read ({_reason(error)})") from error

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Converts Orbax's errors for a checkpoint that cannot be written to a UserError."""
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore raises a ValueError for a full disk
            if means_lost_process(error):
                raise
            raise UserError(
                f"{self._folder}: a checkpoint cannot be written ({_reason(error)}); free disk space and start the "
                "same command again, the checkpoints before it are complete"
            ) from error


class _BestN:
    """An Orbax policy that keeps the `n` evaluated steps with the highest ranks; later ones if ranks are equal."""

    def __init__(self, n: int, ranks: Mapping[int, Any]) -> None:
        self._n, self._ranks = n, ranks

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        evaluated = [checkpoint.step for checkpoint in checkpoints if checkpoint.step in self._ranks]
        best = sorted(evaluated, key=lambda step: (self._ranks[step], step))[len(evaluated) - self._n :]
        return [checkpoint.step in best for checkpoint in checkpoints]


def checkpoints_folder(workdir: str) -> epath.Path:
    """The folder of a work directory's checkpoints: an absolute path, which Orbax needs, or a gs:// path."""
    folder = epath.Path(workdir) / "checkpoints"
    return folder if "://" in workdir else folder.resolve()  # epath would resolve gs:// to a local folder


def _shapes(tree: Any) -> dict[str, str]:
    """Dtype and shape of a tree's arrays by name, such as "float32[5, 7]"."""
    return {name: f"{a.dtype}{list(a.shape)}" for name, a in ocp.tree.to_flat_dict(tree, sep="/").items()}


def _reason(error: Exception) -> str:
    """The cause in an error message: the last part of TensorStore's chain, without the specification after it."""
    return str(error).split(" [tensorstore_spec")[0].split('": ')[-1].splitlines()[0] or type(error).__name__
