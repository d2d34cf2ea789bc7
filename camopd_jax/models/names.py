"""Maps the tensor names of a checkpoint to the standard names, as far as transformers does."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

from camopd_jax.errors import UserError
from camopd_jax.models.weights import MODULE_NAMES

T = TypeVar("T")

HEAD, EMBEDDING = (f"{MODULE_NAMES[name]}.weight" for name in ("head", "embedding"))
_BASE = "model."  # before the names of all tensors but the head's

# Prefixes that programs add to all names, and how to save a model without them
_WRAPPERS = {
    "module.": "save the `module` of the DistributedDataParallel model",
    "_orig_mod.": "save the `_orig_mod` of the compiled model",
    "base_model.model.": "call merge_and_unload() of the PEFT model and save what it returns",
    "language_model.": "save the `language_model` of the multimodal model",
}


def standard_names(tensors: Mapping[str, T], wanted: Collection[str], tied: bool, folder: Path) -> dict[str, T]:
    """Returns the tensors by standard name.

    As in transformers, "model." may be missing from the names (AutoModel saves a model without its head), and a file
    may have the head instead of the embedding if they are tied (safetensors' save_model keeps one of them).

    Args:
      wanted: the standard names of the model's tensors.
      tied: whether head and embedding are the same tensor.

    Raises:
      UserError: if a tensor has two names.
    """
    named: dict[str, T] = {}
    for name, tensor in tensors.items():
        full = _BASE + name if name not in wanted and _BASE + name in wanted else name
        if full in named:
            raise UserError(f"{folder}: tensor {full} is there twice, with and without {_BASE!r}; delete one of them")
        named[full] = tensor
    if tied and HEAD in named and EMBEDDING not in named:
        named[EMBEDDING] = named.pop(HEAD)
    return named


def check_names(present: Collection[str], wanted: Collection[str], folder: Path) -> None:
    """Raises UserError unless a folder has exactly the tensors of a model."""
    missing, extra = sorted(set(wanted) - set(present)), sorted(set(present) - set(wanted))
    if missing and (prefix := _prefix(missing[0], extra)):
        advice = next((how for wrapper, how in _WRAPPERS.items() if wrapper in prefix), "save the model on its own")
        raise UserError(
            f"{folder}: names of tensors begin with {prefix!r} ({extra[0]}; {len(extra)} in all), which transformers "
            f"does not load either; {advice}, or rename the tensors"
        )
    if missing == [HEAD]:
        raise UserError(
            f"{folder}: tensor {HEAD} is missing; save the model with its head (AutoModelForCausalLM), or set "
            "tie_word_embeddings to true in config.json if its head is the embedding"
        )
    if missing and not extra:
        raise UserError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all); fetch the checkpoint again")
    if extra:
        lacking = f", and {missing[0]} ({len(missing)} in all) is missing" if missing else ""
        raise UserError(
            f"{folder}: tensor {extra[0]} ({len(extra)} in all) has no place in a model of this config.json{lacking}; "
            "config.json and weights belong to different models"
        )


def _prefix(missing: str, extra: Collection[str]) -> str | None:
    """The prefix of the missing tensor's name in the file, if the file has it with one; else None."""
    for ending in (missing, missing.removeprefix(_BASE)):
        for name in extra:
            if name.endswith(f".{ending}"):
                return name.removesuffix(ending)
    return None
