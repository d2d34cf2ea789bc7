"""Writes a model as a Hugging Face folder for transformers, and loads the model of a run's checkpoint."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError

from camopd_jax.config.identity import from_json
from camopd_jax.config.schema import Config, TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.evals.runner import read_ranks
from camopd_jax.inference import loading
from camopd_jax.inference.interpolation import interpolated
from camopd_jax.inference.loading import Loaded
from camopd_jax.method.optimizer import run_state
from camopd_jax.models import hf, partition, peft
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.names import EMBEDDING, HEAD
from camopd_jax.models.peft_settings import CONFIG, base_folder
from camopd_jax.runs.card import RunRecord, model_card, read_record
from camopd_jax.runs.checkpoint import CheckpointStore, DamagedCheckpoint
from camopd_jax.runs.start import chosen_weight
from camopd_jax.runtime.distributed import barrier, is_primary
from camopd_jax.runtime.mesh import mesh_of

# Files of the original folder that are valid for the trained model too.
_COPIED = (
    "tokenizer*",
    "*.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
)

NO_RECORD = RunRecord()


def write_folder(out: epath.Path, loaded: Loaded, provenance: dict[str, str], record: RunRecord = NO_RECORD) -> None:
    """Writes weights, configuration, tokenizer and model card. Replaces `out` only when everything is written.

    A model with an adapter that is not merged becomes a PEFT folder, which needs its base model.

    Args:
      loaded: the model; files that training does not change, and the tensors' dtypes, are taken from its `folder` and
        its base model's.
      provenance: facts for the model card, by name.
      record: more for the model card.

    Raises:
      UserError: if it cannot be written.
    """
    original, base = loaded.folder, base_folder(loaded.folder)
    try:
        with _part(out) as part:
            if is_primary():
                for folder in dict.fromkeys((base, original)):
                    _copy_files(folder, part)
                (part / "README.md").write_text(model_card(out.parent.name, provenance, loaded, record))
            config = loaded.model.config
            if loaded.adapter is not None:
                peft.save(part, loaded.params, loaded.adapter, config, original)
            else:
                values, dtypes = _files_of_merged(base, config)
                others = hf.other_tensors(base, config)
                hf.save(part, loaded.params, config, values, dtypes, hf.MAX_SHARD_BYTES, others)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{out}: cannot write ({reason}); free disk space, then export with python -m camopd_jax.export"
        ) from error


def _files_of_merged(base: Path, config: ModelConfig) -> tuple[dict[str, Any], dict[str, np.dtype]]:
    """The contents of config.json, and the dtype of each tensor, of a model with the weights of `config`.

    Args:
      base: the folder with the original ones. An adapter that is merged may have changed its vocabulary.
    """
    stored, values = loading.base_config(base), _with_architecture(hf.read_config(base))
    dtypes = hf.tensor_dtypes(base, stored)
    if config.vocab_size != stored.vocab_size:
        values |= {"vocab_size": config.vocab_size}
    if config.tied_head != stored.tied_head:
        values |= {"tie_word_embeddings": config.tied_head}
        dtypes.setdefault(HEAD, dtypes[EMBEDDING])
    return values, dtypes


def _copy_files(folder: Path, part: Path) -> None:
    for file in (file for pattern in _COPIED for file in folder.glob(pattern) if file.is_file()):
        copy = part / file.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _with_architecture(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that names the class with a head, which is what is written.

    The original may name another one (a model that AutoModel saved) or none.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES  # slow to import

    name = CLASSES.get(config["model_type"])  # None: the installed version does not have the family
    return config if name is None or config.get("architectures") == [name] else config | {"architectures": [name]}


@contextlib.contextmanager
def _part(out: epath.Path) -> Iterator[Path]:
    """A local folder that replaces `out` when everything is written; only process 0's folder is used."""
    is_local = "://" not in str(out)
    part = Path(f"{out}.part") if is_local or not is_primary() else Path(tempfile.mkdtemp())
    if is_primary():
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        if is_primary():
            shutil.rmtree(part, ignore_errors=True)
        raise
    if is_primary():
        if is_local:
            _replace(part, Path(out))
        else:
            _upload(part, out)
    barrier("export")


def _replace(part: Path, out: Path) -> None:
    """Renames `part` to `out`, which never holds a part of its files: an old folder there is renamed before."""
    old = Path(f"{out}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _upload(folder: Path, out: epath.Path) -> None:
    """Moves a folder's files to a bucket: its config, without which nothing loads a folder, as the last one."""
    if out.exists():
        out.rmtree()
    out.mkdir(parents=True)
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: file.name in ("config.json", CONFIG)):
        target = out / file.relative_to(folder).as_posix()
        target.parent.mkdir(exist_ok=True)
        epath.Path(file).copy(target)
    shutil.rmtree(folder)


def restore_model(
    workdir: str, step: int | None = None, best: bool = False, merge: bool = False
) -> tuple[Loaded, dict[str, str], RunRecord]:
    """Loads the model of a run's checkpoint. Also returns its provenance, with "steps", and its record.

    Args:
      step: of the checkpoint; None: the last one.
      best: use the best checkpoint if `step` is None.
      merge: merge an adapter into its base model, in float32.

    Raises:
      UserError: if there is no such checkpoint.
    """
    folder = epath.Path(workdir)
    config = from_json(folder / "config.json")
    checkpoints = CheckpointStore(workdir, config.checkpoints, read_ranks(folder))
    if step is None:
        step = checkpoints.best() if best else checkpoints.latest()
        if best and step is None:
            raise UserError(f"{folder}: none of its checkpoints was evaluated; leave --best out, or give a --step")
    if step is None or step not in checkpoints.steps():
        raise UserError(
            f"{folder / 'checkpoints'}: no checkpoint{'' if step is None else f' {step}'} there, only "
            f"{checkpoints.steps()}; give one of them with --step"
        )
    loaded = _initial_student(config, folder, "float32" if merge else None)
    trained = partition.trained(loaded.params, config.optimizer.trained)
    try:
        state, _, provenance = checkpoints.restore(step, run_state(trained, config))
    except DamagedCheckpoint as error:
        raise UserError(f"{error}; the run has checkpoints {checkpoints.steps()}: give another one") from error
    loaded = loaded.with_params(state.evaluated)
    record = read_record(folder, config, step)
    return loaded.merged() if merge else loaded, provenance | {"steps": str(step)}, record


def _initial_student(config: Config, workdir: epath.Path, frozen_dtype: str | None) -> Loaded:
    """The student before the first step of a run. Only its frozen parameters matter: the others are in checkpoints."""
    mesh = mesh_of(config.mesh)

    def load(name: str, field: str) -> Loaded:
        folder = loading.find(name, field)
        return loading.load_trained(folder, mesh, config, context=1, frozen_dtype=frozen_dtype)

    if not isinstance(config, TrainConfig):
        return load(config.model, "config.model")
    student = load(config.specialised_model, "config.specialised_model")
    trained = jax.tree.leaves(partition.trained(student.params, config.optimizer.trained))
    if config.start.interpolation == 0 or len(trained) == len(jax.tree.leaves(student.params)):
        return student
    general = load(config.general_model, "config.general_model")
    return student.with_params(interpolated(general.params, student.params, chosen_weight(config, workdir)))
