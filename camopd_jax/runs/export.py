"""Writes a model as a Hugging Face folder that transformers loads, and reads one back from a run's checkpoint."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from etils import epath

from camopd_jax import __version__
from camopd_jax.inference import loading
from camopd_jax.runtime import cli
from camopd_jax.runs.checkpoint import Checkpoints
from camopd_jax.config.schema import SftConfig, TrainConfig
from camopd_jax.inference.loading import Loaded
from camopd_jax.errors import UserError
from camopd_jax.evals.runner import read_ranks
from camopd_jax.models import hf, partition
from camopd_jax.method.optimizer import init_state, moment_names
from camopd_jax.runtime.distributed import is_primary, barrier
from camopd_jax.config.identity import from_json
from camopd_jax.runtime.mesh import make_mesh

# Files of the original folder that stay true of the trained model.
_KEPT = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
         "generation_config.json", "LICENSE*", "NOTICE*")  # fmt: skip


def write_folder(out: epath.Path, loaded: Loaded, provenance: dict[str, str]) -> None:
    """Writes weights, configuration, tokenizer and model card, whole or not at all; replaces what is at `out`.

    Args:
      loaded: the model; its `folder` gives all that training does not change, and the tensors' dtypes.
      provenance: named facts for the model card.

    Raises:
      UserError: if it cannot be written.
    """
    try:
        with _part(out) as part:
            if is_primary():
                for pattern in _KEPT:
                    for file in loaded.folder.glob(pattern):
                        shutil.copyfile(file, part / file.name)
                (part / "README.md").write_text(model_card(out.parent.name, provenance))
            hf.save(
                part, loaded.params, loaded.model.config, hf.read_config(loaded.folder), hf.tensor_dtypes(loaded.folder)
            )
    except OSError as error:
        raise UserError(
            f"{out}: cannot write ({error.strerror}); free some room, then export with python -m camopd_jax.export"
        ) from error


@contextlib.contextmanager
def _part(out: epath.Path) -> Iterator[Path]:
    """A local folder that becomes `out` when all is written."""
    local = "://" not in str(out)
    part = Path(str(out) + ".part") if local or not is_primary() else Path(tempfile.mkdtemp())
    if is_primary():
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    yield part
    if is_primary():
        if out.exists():
            out.rmtree()
        if local:
            part.rename(out)
        else:
            out.mkdir(parents=True)
            for file in part.iterdir():
                epath.Path(file).copy(out / file.name)
            shutil.rmtree(part)
    barrier("export")


def model_card(name: str, provenance: dict[str, str]) -> str:
    """README.md of an exported folder."""
    base = provenance.get("specialised_model", provenance.get("model"))
    facts = "\n".join(f"| {key.replace('_', ' ')} | `{value}` |" for key, value in provenance.items())
    front = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\nbase_model: {json.dumps(base)}\n---\n"
    return (
        f"{front}\n# {name}\n\nMade from `{base}` by {provenance['method']} with camopd_jax {__version__}.\n\n"
        f"| | |\n|---|---|\n{facts}\n\nThe base model's licence applies.\n"
    )


def restored(workdir: str, step: int | None = None, best: bool = False) -> tuple[Loaded, dict[str, str]]:
    """The model of a run's checkpoint, and where it comes from.

    Args:
      step: of the checkpoint; None: the last, or the best.

    Raises:
      UserError: if there is no such checkpoint.
    """
    folder = epath.Path(workdir)
    config = from_json(folder / "config.json")
    checkpoints = Checkpoints(workdir, config.checkpoints, read_ranks(folder))
    chosen = step if step is not None else checkpoints.best() if best else checkpoints.latest()
    if chosen is None or chosen not in checkpoints.steps():
        raise UserError(
            f"{folder / 'checkpoints'}: no checkpoint {'' if chosen is None else chosen} there, only "
            f"{checkpoints.steps()}; give one of them with --step"
        )
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    moments = moment_names(config) if isinstance(config, TrainConfig) else ("shared",)
    base, field = (
        (config.model, "model") if isinstance(config, SftConfig) else (config.specialised_model, "specialised_model")
    )
    loaded = loading.load(
        loading.find(base, f"config.{field}"), mesh, config.compute, dtype=config.compute.params, context=1
    )
    trained = partition.trained(loaded.params, config.optimizer.trained)
    state, _, provenance = checkpoints.restore(chosen, init_state(trained, moments))
    return loaded.with_params(state.params), provenance | {"steps": str(chosen)}
