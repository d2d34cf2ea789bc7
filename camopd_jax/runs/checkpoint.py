"""The checkpoints of a work directory, by Orbax."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from camopd_jax.config import schema
from camopd_jax.errors import UserError
from camopd_jax.runs.array_handler import state_handler
from camopd_jax.runtime.termination import means_lost_process
from camopd_jax.types import TrainState

policies = ocp.checkpoint_managers.preservation_policy


class CheckpointStore:
    """`workdir/checkpoints`: a folder for each step, written in the background, complete or not at all.

    It keeps the last `keep_last` steps, and the `keep_best` best of the steps in `ranks`.
    """

    def __init__(self, workdir: str, config: schema.Checkpoints, ranks: Mapping[int, Any]) -> None:
        """
        Args:
          ranks: of evaluated steps, by step; the greater is the better one. Read again at every save.

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
        """All steps that have a complete checkpoint, rising."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The best of the steps that were evaluated; of equals, the last."""
        evaluated = [step for step in self.steps() if step in self._ranks]
        return max(reversed(evaluated), key=self._ranks.__getitem__, default=None)

    def save(self, step: int, state: TrainState, positions: dict[str, Any], provenance: dict[str, Any]) -> None:
        """Starts to write a checkpoint; `wait` returns when it is written. An existing one is left as it is.

        Args:
          positions: of the data streams, as JSON values.
          provenance: of the run's models, as JSON values.

        Raises:
          UserError: if this checkpoint, or the one before in the background, cannot be written.
        """
        if step in self.steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            positions=ocp.args.JsonSave(positions),
            provenance=ocp.args.JsonSave(provenance),
        )
        with self._write_errors():
            self._manager.save(step, args=items, force=True)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
        """State, positions and provenance of a checkpoint, bit for bit.

        Args:
          like: a state whose shardings the restored one takes; its shapes and dtypes must be the stored ones.

        Raises:
          UserError: if the checkpoint cannot be read, or holds the state of another model.
        """
        wanted = jax.tree.map(ocp.tree.to_shape_dtype_struct, like)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(wanted, ocp.checkpoint_utils.construct_restore_args(wanted)),
            positions=ocp.args.JsonRestore(),
            provenance=ocp.args.JsonRestore(),
        )
        with self._read_errors(step):
            stored = self._manager.item_metadata(step)["state"].tree
        self._check_shapes(step, _shapes(stored), _shapes(wanted))
        with self._read_errors(step):
            restored = self._manager.restore(step, args=items)
        return restored["state"], restored["positions"], restored["provenance"]

    def check_complete(self, step: int, item: str, values: Any, names: Iterable[str]) -> None:
        """Checks the values of an item that `restore` returned.

        Args:
          item: "positions" or "provenance".
          names: of the values that have to be there.

        Raises:
          UserError: if one is not there: the file of the item is damaged.
        """
        lacking = [name for name in names if not isinstance(values, dict) or name not in values]
        if lacking:
            raise UserError(
                f"{self._folder / str(step) / item}: this file of the checkpoint is damaged ({lacking[0]} is not "
                f"there); delete the folder {step}, and the run goes on from the checkpoint before"
            )

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
        """Makes a UserError of what Orbax raises for a damaged checkpoint."""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds
            if means_lost_process(error):
                raise
            raise UserError(
                f"{self._folder / str(step)}: this checkpoint cannot be read ({_reason(error)}); delete the folder, "
                "and the run goes on from the one before"
            ) from error

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Makes a UserError of what Orbax raises for a checkpoint that cannot be written."""
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore raises a full disk as a ValueError
            if means_lost_process(error):
                raise
            raise UserError(
                f"{self._folder}: a checkpoint cannot be written ({_reason(error)}); free disk space and start the "
                "same command again, the checkpoints before it are complete"
            ) from error


class _BestN:
    """Orbax's policy that keeps the `n` best of the evaluated steps; of equals, the last."""

    def __init__(self, n: int, ranks: Mapping[int, Any]) -> None:
        self._n, self._ranks = n, ranks

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        evaluated = [checkpoint.step for checkpoint in checkpoints if checkpoint.step in self._ranks]
        best = sorted(evaluated, key=lambda step: (self._ranks[step], step))[len(evaluated) - self._n :]
        return [checkpoint.step in best for checkpoint in checkpoints]


def checkpoints_folder(workdir: str) -> epath.Path:
    """Where the checkpoints of a work directory lie: an absolute path, as Orbax asks for, or a gs:// one."""
    folder = epath.Path(workdir) / "checkpoints"
    return folder if "://" in workdir else folder.resolve()  # epath would resolve gs:// to a local folder


def _shapes(tree: Any) -> dict[str, str]:
    """The arrays of a tree by name, as in "float32[5, 7]"."""
    return {name: f"{a.dtype}{list(a.shape)}" for name, a in ocp.tree.to_flat_dict(tree, sep="/").items()}


def _reason(error: Exception) -> str:
    """What went wrong: the end of the chain that TensorStore prints, without the specification after it."""
    return str(error).split(" [tensorstore_spec")[0].split('": ')[-1].splitlines()[0] or type(error).__name__
