"""Checkpoints by Orbax, and the work directory they belong to."""

import json
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from camopd_jax.config import Checkpoints as CheckpointsConfig
from camopd_jax.config import Config as RunConfig
from camopd_jax.config import different_fields, fingerprint, to_json
from camopd_jax.errors import UserError
from camopd_jax.types import TrainState


class Checkpoints:
    """`workdir/checkpoints`: one folder a step, written in the background, whole or not at all."""

    def __init__(self, workdir: str, config: CheckpointsConfig):
        policies = ocp.checkpoint_managers.preservation_policy
        kept = [policies.LatestN(config.keep_last)]
        if config.keep_best:
            kept.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["accuracy"],
                    n=config.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept), enable_async_checkpointing=True
        )
        self._folder = epath.Path(workdir).resolve() / "checkpoints"
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        """The last whole checkpoint's step."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step with the highest accuracy, of those that were measured."""
        return self._manager.best_step()

    def save(
        self,
        step: int,
        state: TrainState,
        positions: dict[str, Any],
        provenance: dict[str, Any],
        accuracy: float | None,
    ) -> None:
        """Starts writing a checkpoint; `wait` waits for it. A step that is there already is left as it is.

        Args:
          positions: of the data streams, as JSON values.
          provenance: of the run's models, as JSON values.
          accuracy: what keep_best goes by, if it was measured.
        """
        if step in self.steps():
            return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            positions=ocp.args.JsonSave(positions),
            provenance=ocp.args.JsonSave(provenance),
        )
        metrics = None if accuracy is None else {"accuracy": accuracy}
        self._manager.save(step, args=arguments, metrics=metrics, force=True)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
        """State, positions and provenance of a checkpoint.

        Args:
          like: a state whose shapes, dtypes and shardings the restored one takes.

        Raises:
          UserError: if the checkpoint cannot be read, or holds another model's state.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract),
            positions=ocp.args.JsonRestore(),
            provenance=ocp.args.JsonRestore(),
        )
        try:
            found = self._manager.restore(step, args=arguments)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            reason = str(error).splitlines()[0] if str(error) else ""
            raise UserError(
                f"{self._folder / str(step)}: this checkpoint cannot be read ({type(error).__name__}: {reason}); "
                "delete the folder, and the run goes on from the one before"
            ) from error
        return found["state"], found["positions"], found["provenance"]

    def wait(self) -> None:
        """Returns when all checkpoints are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def claim_workdir(workdir: epath.Path, config: RunConfig) -> None:
    """Writes workdir/config.json, or checks that the one there is of the same run.

    Fields that do not touch a run's numbers (`config.fingerprint`) may change between its starts.

    Raises:
      UserError: naming the fields in which the run that owns the directory differs.
    """
    file = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if file.exists():
            owner = json.loads(file.read_text())
            if owner["fingerprint"] != fingerprint(config):
                fields = ", ".join(different_fields(owner["config"], to_json(config))) or "another kind of run"
                raise UserError(
                    f"{workdir}: it belongs to a run with another config ({fields}); give that config, or a new "
                    "--workdir"
                )
        if jax.process_index() == 0:
            part = workdir / "config.json.part"
            record = {"kind": type(config).__name__, "fingerprint": fingerprint(config), "config": to_json(config)}
            part.write_text(json.dumps(record, indent=2) + "\n")
            part.replace(file)
    except (ValueError, KeyError) as error:
        raise UserError(f"{file}: not readable; delete it, or give a new --workdir") from error
    except OSError as error:
        raise UserError(f"{workdir}: cannot write there ({error.strerror}); give another --workdir") from error
