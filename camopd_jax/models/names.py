"""Maps the tensor names of a checkpoint to the standard names, as far as transformers does."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

from camopd_jax.errors import UserError
from camopd_jax.models.rows import MODULE_NAMES

T = TypeVar("T")

HEAD, EMBEDDING = (f"{MODULE_NAMES[name]}.weight" for name in ("head", "embedding"))
BASE = "model."  # before the names of all tensors but the head's

# Parts of names that programs add, and how to save a model without them; the first one that a name has
_WRAPPERS = {
    "lora_": "call merge_and_unload() of the PEFT model and save what it returns",
    "base_model.model.": "call merge_and_unload() of the PEFT model and save what it returns",
    "_fsdp_wrapped_module.": "save the complete state dict of the FSDP model (FSDP.summon_full_params)",
    "_checkpoint_wrapped_module.": "save the model without the wrappers of activation checkpointing",
    "_orig_mod.": "save the `_orig_mod` of the compiled model",
    "pretrained_model.": "save the `pretrained_model` of the model with a value head",
    "language_model.": "save the `language_model` of the multimodal model",
    "attention.wq.": "it is in Meta's or Mistral's own format; give the Hugging Face version of this model",
    ".module.": "save the `module` of the DistributedDataParallel model",
}
# Heads of other models, by the start of their names
_HEADS = {
    "v_head.": "a value head; save the `pretrained_model` of the model with a value head",
    "score.": "the head of a classifier or reward model; give a language model",
}


def standard_names(tensors: Mapping[str, T], wanted: Collection[str], tied: bool, folder: Path) -> dict[str, T]:
    """Returns the tensors by standard name.

    As in transformers, "model." may be missing from the names (AutoModel saves a model without its head) or be there
    twice, and a file may have the head instead of the embedding if they are tied (safetensors' save_model keeps one).

    Args:
      wanted: the standard names of the model's tensors.
      tied: whether head and embedding are the same tensor.

    Raises:
      UserError: if a tensor has two names.
    """
    named: dict[str, T] = {}
    for name, tensor in tensors.items():
        full = name
        if name not in wanted:
            full = next((n for n in (BASE + name, name.removeprefix(BASE)) if n in wanted), name)
        if full in named:
            raise UserError(f"{folder}: tensor {full} is there twice, with and without {BASE!r}; delete one of them")
        named[full] = tensor
    if tied and HEAD in named and EMBEDDING not in named:
        named[EMBEDDING] = named.pop(HEAD)
    return named


def check_names(present: Collection[str], wanted: Collection[str], folder: Path) -> None:
    """Raises UserError unless a folder has exactly the tensors of a model."""
    missing, extra = sorted(set(wanted) - set(present)), sorted(set(present) - set(wanted))
    if missing and (prefix := _prefix(missing[0], extra)):
        advice = next(
            (how for wrapper, how in _WRAPPERS.items() if wrapper in f".{prefix}"), "save the model on its own"
        )
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
    for start, what in _HEADS.items():
        if heads := [name for name in extra if name.startswith(start)]:
            raise UserError(f"{folder}: tensor {heads[0]} belongs to {what}, or delete the tensors {start}*")
    if wrapper := next((part for part in _WRAPPERS if any(part in f".{name}" for name in extra)), None):
        odd = next(name for name in extra if wrapper in f".{name}")
        raise UserError(
            f"{folder}: the name of tensor {odd} ({len(extra)} in all) is not a model's; {_WRAPPERS[wrapper]}"
        )
    if extra:
        lacking = f", and {missing[0]} ({len(missing)} in all) is missing" if missing else ""
        raise UserError(
            f"{folder}: tensor {extra[0]} ({len(extra)} in all) has no place in a model of this config.json{lacking}; "
            "config.json and weights belong to different models"
        )


def _prefix(missing: str, extra: Collection[str]) -> str | None:
    """The prefix of the missing tensor's name in the file, if the file has it with one; else None."""
    for ending in (missing, missing.removeprefix(BASE)):
        for name in extra:
            if name.endswith(f".{ending}"):
                return name.removesuffix(ending)
    return None
