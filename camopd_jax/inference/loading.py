"""Finds and loads a Hugging Face checkpoint, and resolves its dtypes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from camopd_jax.config.schema import Compute
from camopd_jax.data import templates
from camopd_jax.data.templates import Reader
from camopd_jax.errors import UserError
from camopd_jax.models import hf
from camopd_jax.models.config import ModelConfig, from_hf
from camopd_jax.models.partition import merge
from camopd_jax.models.transformer import Model
from camopd_jax.types import Params

CHECKPOINT = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")  # the files of a checkpoint to download


@dataclass(frozen=True)
class Loaded:
    """A loaded checkpoint."""

    folder: Path
    mesh: Mesh
    model: Model
    params: Params
    tokenizer: Any  # a tokenizer of transformers
    eos_ids: tuple[int, ...]  # every token that ends an answer

    @property
    def reader(self) -> Reader:
        return Reader(self.tokenizer, self.model.config.vocab_size)

    def with_params(self, params: Params) -> "Loaded":
        """The same model with these parameters in place of its own; the others, such as frozen ones, stay."""
        return dataclasses.replace(self, params=merge(self.params, params))


def find(name: str, field: str, files: Sequence[str] = CHECKPOINT) -> Path:
    """The folder of a checkpoint: `name` itself, or the local copy of a repository of the Hugging Face hub.

    Its config.json is checked here, before anything else of the folder is read: other readers, the tokenizer's among
    them, would call a mistake in it their own.

    Args:
      name: a folder, or a hub name like Qwen/Qwen3-8B, which is downloaded.
      field: the flag or config field that holds the name, for error messages.
      files: patterns of the files to download.

    Raises:
      UserError: if there is no such folder and the hub has no such repository, and for a config.json that is not
        that of a supported model.
    """
    folder = _find(name, field, files)
    model_config(folder)
    return folder


def _find(name: str, field: str, files: Sequence[str]) -> Path:
    """The folder that `find` checks."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{field}: no folder {name}; give a Hugging Face folder or a hub name like Qwen/Qwen3-8B")
    from huggingface_hub import snapshot_download  # slow to import, and only needed here

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises its own, requests' and OS errors
        raise UserError(
            f"{field}: no folder {name}, and it cannot be fetched from the hub ({type(error).__name__}); "
            "check the name, log in with `hf auth login`, or give a local folder"
        ) from error


def matmul_dtype(compute: Compute, platform: str | None = None) -> str:
    """The dtype of matrix products: "auto" is float32 on CPUs and bfloat16 elsewhere.

    Args:
      platform: "cpu", "gpu" or "tpu"; None: the platform of this process.
    """
    if compute.matmul != "auto":
        return compute.matmul
    return "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"


def teacher_dtype(compute: Compute, platform: str | None = None) -> str:
    """The dtype of a teacher's weights: "auto" is the dtype of matrix products."""
    return compute.teacher if compute.teacher != "auto" else matmul_dtype(compute, platform)


def load(
    folder: Path, mesh: Mesh, compute: Compute, *, dtype: str, context: int, output_vocab_size: int | None = None
) -> Loaded:
    """Loads a checkpoint onto the mesh.

    Args:
      dtype: of the parameters.
      context: the longest sequence of the run in tokens, prompt and answer.
      output_vocab_size: logits are cut to this size, for models whose vocabularies are padded differently.

    Raises:
      UserError: naming the file, for a checkpoint that is incomplete or has an unknown architecture.
    """
    config = model_config(folder, context)
    if output_vocab_size is not None:
        config = dataclasses.replace(config, output_vocab_size=output_vocab_size)
    model = Model(config, mesh=mesh, dtype=matmul_dtype(compute), remat=compute.remat, attention=compute.attention)
    tokenizer = templates.load_tokenizer(folder)
    params = hf.load(folder, config, mesh, dtype)
    return Loaded(folder, mesh, model, params, tokenizer, templates.eos_ids(folder, tokenizer))


def model_config(folder: Path, context: int | None = None) -> ModelConfig:
    """Reads the architecture from a folder's config.json, for sequences of up to `context` tokens (None: any)."""
    return from_hf(hf.read_config(folder), context=context, where=str(folder / "config.json"))
