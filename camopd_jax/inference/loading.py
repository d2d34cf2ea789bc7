"""Finds and loads a Hugging Face checkpoint, and resolves its dtypes."""

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from camopd_jax.config.schema import Adapter, Compute, Config, TrainConfig
from camopd_jax.data import templates
from camopd_jax.data.templates import Reader
from camopd_jax.errors import UserError
from camopd_jax.models import adapters, hf, peft
from camopd_jax.models.config import ModelConfig, from_hf
from camopd_jax.models.disk import CHECKPOINT, Tensor, find_folder, hub_revision
from camopd_jax.models.names import HEAD
from camopd_jax.models.partition import merge
from camopd_jax.models.peft_settings import AdapterSettings, base_folder, is_adapter, new_settings, read_settings
from camopd_jax.models.quantised import INT8
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.types import Params


@dataclass(frozen=True)
class Loaded:
    """A loaded checkpoint."""

    folder: Path
    mesh: Mesh
    model: Model
    params: Params
    tokenizer: Any  # a tokenizer of transformers
    eos_ids: tuple[int, ...]  # every token that ends an answer
    adapter: AdapterSettings | None = None  # of an adapter whose leaves are among `params`, not merged
    tuned: bool = True  # whether a GPU's compiler tunes products outside training steps: `config.Compute.autotune`

    @property
    def reader(self) -> Reader:
        return Reader(self.tokenizer, self.model.config.vocab_size)

    def with_params(self, params: Params) -> "Loaded":
        """The same model with these parameters in place of its own; the others, such as frozen ones, stay."""
        return dataclasses.replace(self, params=merge(self.params, params))

    def merged(self) -> "Loaded":
        """The same model with its adapter merged into the weights, which keep their dtype."""
        if self.adapter is None:
            return self
        model = dataclasses.replace(self.model, config=dataclasses.replace(self.model.config, adapter=()))
        return dataclasses.replace(self, model=model, params=adapters.merge(self.params), adapter=None)


def find(name: str, field: str, files: Sequence[str] = CHECKPOINT) -> Path:
    """The folder of a checkpoint: `name` itself, or the local copy of a repository of the Hugging Face hub.

    Its config.json is checked here, before anything else of the folder is read: other readers, the tokenizer's among
    them, would call a mistake in it their own. For a PEFT adapter, its adapter_config.json and its base model's
    config.json are checked.

    Args:
      name: a folder, or a hub name like Qwen/Qwen3-8B, which is downloaded.
      field: the flag or config field that holds the name, for error messages.
      files: patterns of the files to download.

    Raises:
      UserError: if there is no such folder and the hub has no such repository, and for a config.json that is not
        that of a supported model.
    """
    folder = find_folder(name, field, files)
    model_config(folder, files=files)
    return folder


def matmul_dtype(compute: Compute, platform: str | None = None) -> str:
    """The dtype of matrix products: "auto" is float32 on CPUs and bfloat16 elsewhere.

    Args:
      platform: "cpu", "gpu" or "tpu"; None: the platform of this process.
    """
    if compute.matmul != "auto":
        return compute.matmul
    return "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"


def teacher_dtype(compute: Compute, platform: str | None = None) -> str:
    """The dtype of frozen weights, of teachers and beside an adapter: "auto" is the dtype of matrix products."""
    return compute.teacher if compute.teacher != "auto" else matmul_dtype(compute, platform)


def make_model(config: ModelConfig, mesh: Mesh, compute: Compute, dtype: str) -> Model:
    """The functions of a model, as a run's config sets them up.

    Args:
      dtype: of activations and matrix products.
    """
    return Model(
        config,
        mesh=mesh,
        dtype=dtype,
        remat=compute.remat,
        attention=compute.attention,
        decode_attention=compute.decode_attention,
    )


def load(
    folder: Path, mesh: Mesh, compute: Compute, *, dtype: str, context: int, output_vocab_size: int | None = None
) -> Loaded:
    """Loads a checkpoint onto the mesh. A PEFT adapter is merged into its base model, if that is not in int8.

    Args:
      dtype: of the parameters; "int8" as in `models.quantised`.
      context: the longest sequence of the run in tokens, prompt and answer.
      output_vocab_size: logits are cut to this size, for models whose vocabularies are padded differently.

    Raises:
      UserError: naming the file, for a checkpoint that is incomplete or has an unknown architecture.
    """
    if is_adapter(folder):
        base = load(
            base_folder(folder), mesh, compute, dtype=dtype, context=context, output_vocab_size=output_vocab_size
        )
        loaded = with_adapter(base, folder, dtype)
        return loaded if dtype == INT8 else loaded.merged()
    config = dataclasses.replace(model_config(folder, context), int8=dtype == INT8)
    if output_vocab_size is not None:
        config = dataclasses.replace(config, output_vocab_size=output_vocab_size)
    model = make_model(config, mesh, compute, matmul_dtype(compute))
    tokenizer = templates.load_tokenizer(folder)
    if warning := templates.class_warning(folder, tokenizer):
        warnings.warn(warning, stacklevel=2)
    ends = templates.eos_ids(folder, tokenizer)
    params = hf.load(folder, config, mesh, model.dtype if dtype == INT8 else dtype)
    return Loaded(folder, mesh, model, params, tokenizer, ends, tuned=compute.autotune == "all")


def model_config(folder: Path, context: int | None = None, files: Sequence[str] = CHECKPOINT) -> ModelConfig:
    """Reads the architecture from a folder's config.json, for sequences of up to `context` tokens (None: any).

    For a PEFT adapter this is the architecture of its base model with the adapter, which is not merged. `files` of the
    base model are downloaded if it is on the hub.
    """
    config = base_config(folder, context, files)
    return read_settings(folder, config).model_config(config) if is_adapter(folder) else config


def base_config(folder: Path, context: int | None = None, files: Sequence[str] = CHECKPOINT) -> ModelConfig:
    """The same without the adapter: `model_config` of a PEFT adapter's base model, or of any other folder itself."""
    base = base_folder(folder, files)
    return from_hf(hf.read_config(base), context=context, where=str(base / "config.json"))


def stored_dtypes(folder: Path) -> set[str]:
    """The dtypes of a checkpoint's weights, all of which are checked by name and shape.

    Raises:
      UserError: for missing or additional tensors and wrong shapes.
    """
    config = base_config(folder)
    tensors = list(hf.matching(base_folder(folder), config).values())
    if is_adapter(folder):
        tensors += peft.matching(folder, read_settings(folder, config), config).values()
    return {str(tensor.dtype) for tensor in tensors}


def fingerprint(folder: Path) -> str:
    """`hf.fingerprint` of a checkpoint; of a PEFT adapter, a hash of its files and of its base model's fingerprint."""
    if not is_adapter(folder):
        return hf.fingerprint(folder)
    return peft.fingerprint(folder, hf.fingerprint(base_folder(folder)))


def pair_warning(general: Path, specialised: Path) -> str | None:
    """A warning about the two models of a run that cannot be meant like that, or None."""
    if _same_weights(general, specialised):
        same = "config.general_model and config.specialised_model hold the same weights"
        return f"{same}: there is no lost ability to recover"
    if is_adapter(general) and not is_adapter(specialised) and _same_weights(base_folder(general), specialised):
        return "config.general_model is an adapter of config.specialised_model: it seems that the two are swapped"
    return None


def _same_weights(first: Path, second: Path) -> bool:
    """Whether two checkpoints have the same values, in any files and dtypes; of each tensor only a few are compared."""
    if is_adapter(first) or is_adapter(second):
        return fingerprint(first) == fingerprint(second)
    a, b = (hf.matching(folder, model_config(folder)) for folder in (first, second))
    if a.keys() - {HEAD} != b.keys() - {HEAD} or any(a[name].shape != b[name].shape for name in a.keys() & b.keys()):
        return False
    return all(np.array_equal(_sample(a[name]), _sample(b[name])) for name in a.keys() & b.keys())


def _sample(tensor: Tensor) -> np.ndarray:
    """The first, middle and last 1,024 values of a tensor, float32."""
    flat = tensor.map().reshape(-1)
    starts = (0, flat.size // 2, max(0, flat.size - 1024))
    return np.concatenate([flat[start : start + 1024] for start in starts]).astype(np.float32)


# ------------------------------------------------------------------------------------------ adapters


def with_adapter(base: Loaded, folder: Path, dtype: str) -> Loaded:
    """The model of a PEFT adapter on the arrays of its base model, which are not copied.

    Args:
      base: the loaded base model.
      folder: of the adapter.
      dtype: of its matrices; for "int8", which is for the base model, that of matrix products.
    """
    config, mesh, dtype = base.model.config, base.mesh, base.model.dtype if dtype == INT8 else dtype
    settings = read_settings(folder, config)
    params = adapters.attach(base.params, peft.scales(settings, config, mesh))
    params = adapters.attach(params, peft.load_matrices(folder, settings, config, mesh, dtype))
    if settings.saved:
        stored = jax.tree.leaves(base.params)[0].dtype.name
        params = adapters.attach(params, peft.load_saved(folder, settings, config, mesh, stored))
    tokenizer = templates.load_tokenizer(folder)
    return Loaded(
        folder,
        mesh,
        dataclasses.replace(base.model, config=settings.model_config(config)),
        params,
        tokenizer,
        templates.eos_ids(folder, tokenizer),
        settings,
        base.tuned,
    )


def with_trained_matrices(loaded: Loaded, dtype: str) -> Loaded:
    """A model of `with_adapter` with its own copy of the adapter's matrices, which an update may replace."""
    assert loaded.adapter is not None
    base = dataclasses.replace(loaded.model.config, adapter=())
    return loaded.with_params(peft.load_matrices(loaded.folder, loaded.adapter, base, loaded.mesh, dtype))


def with_new_adapter(base: Loaded, adapter: Adapter, base_name: str, seed: int, dtype: str) -> Loaded:
    """A model with a new adapter, which changes nothing until it is trained, on the arrays of `base`.

    Args:
      base_name: the model's name in the config, for the adapter_config.json of an export.
      seed: for the random matrices A.
      dtype: of the adapter's matrices.
    """
    config = base.model.config
    settings = new_settings(adapter, config, base_name, hub_revision(base.folder))
    model = dataclasses.replace(base.model, config=settings.model_config(config))
    of_leaves = adapters.all_leaves(shardings(model.config, base.mesh))

    def leaves(seed: jax.Array) -> Params:
        new = adapters.init(model.config, jax.random.key(seed), adapter.alpha / adapter.rank)
        return adapters.attach(new, jax.tree.map(lambda p: p.astype(dtype), adapters.matrices(new)))

    new = jax.jit(leaves, out_shardings=of_leaves)(np.int32(seed))
    return dataclasses.replace(base, model=model, params=adapters.attach(base.params, new), adapter=settings)


def check_adapter(adapter: Adapter | None, folder: Path, field: str) -> None:
    """Checks `config.adapter` for the model that a run starts from.

    Args:
      field: the config field that names the model.

    Raises:
      UserError: if the model is an adapter itself, or lacks a target.
    """
    if adapter is None:
        return
    if is_adapter(folder):
        raise UserError(
            f"config.adapter: {field} is an adapter itself, which is what is trained; leave config.adapter out, or "
            "merge that adapter into its base model first"
        )
    new_settings(adapter, model_config(folder), "")


def load_trained(folder: Path, mesh: Mesh, config: Config, *, context: int, frozen_dtype: str | None = None) -> Loaded:
    """The model that a run trains, at its start: with its adapter, if it has one, else all of it.

    Args:
      folder: of the model that the config names.
      context: as in `load`.
      frozen_dtype: of the weights that an adapter leaves frozen; None: as `config.compute.teacher` says.
    """
    compute = config.compute
    if config.adapter is None and not is_adapter(folder):
        return load(folder, mesh, compute, dtype=compute.params, context=context)
    base = load(base_folder(folder), mesh, compute, dtype=frozen_dtype or teacher_dtype(compute), context=context)
    return with_trained_adapter(base, folder, config)


def with_trained_adapter(base: Loaded, folder: Path, config: Config) -> Loaded:
    """The model that a run trains on the frozen arrays of `base`: its own adapter, or the new one of the config."""
    if is_adapter(folder):
        return with_adapter(base, folder, config.compute.params)
    name = config.specialised_model if isinstance(config, TrainConfig) else config.model
    assert config.adapter is not None
    return with_new_adapter(base, config.adapter, name, config.seed, config.compute.params)
