"""What a folder without a Hugging Face checkpoint has instead, and how to convert it."""

from fnmatch import fnmatch
from pathlib import Path

_MISTRAL = "is in Meta's or Mistral's own format; give the Hugging Face version of this model"
_UNFINISHED = "is a download that did not end; fetch the checkpoint again"
_SAVE = "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT)"
# Patterns of file names, and what to do; the first one that a file matches
_FORMATS = {
    "*.incomplete": _UNFINISHED,
    "*.aria2": _UNFINISHED,
    "*_model_states.pt": "is part of a DeepSpeed checkpoint; run `python zero_to_fp32.py . OUT --safe_serialization` "
    "in the folder of zero_to_fp32.py, and add config.json and the tokenizer to OUT",
    "*.distcp": "is part of an FSDP checkpoint; run `accelerate merge-weights FOLDER OUT` on its folder, and add "
    "config.json and the tokenizer to OUT",
    "model_world_size_*.pt": "is part of a verl checkpoint; run `python -m verl.model_merger merge --backend fsdp "
    "--local_dir FOLDER --target_dir OUT`",
    "consolidated*.safetensors": _MISTRAL,
    "consolidated*.pth": _MISTRAL,
    "*-of-*.safetensors": "is one of several files, but model.safetensors.index.json is missing; fetch that file too",
    "*.safetensors": "is there; rename it to model.safetensors if it has all weights of the model",
    "*.gguf": "is for inference, and mostly quantised; give the safetensors from which it was made",
    **dict.fromkeys(
        ("*.bin", "*.pt", "*.pth"),
        f"is a pickle, which can run code and is never read; convert it to safetensors with {_SAVE}",
    ),
}
# Files of a training program beside its weights
_OTHERS = ("training_args.bin", "optimizer*", "scheduler*", "rng_state*", "scaler*", "adapter_model*")


def advice(folder: Path) -> str | None:
    """What files of a folder and its direct sub-folders are, and how to convert them; None if they are unknown."""
    files = sorted(file.relative_to(folder) for part in (folder, *_parts(folder)) for file in part.glob("*"))
    for pattern, text in _FORMATS.items():
        for file in files:
            if file.match(pattern) and not any(fnmatch(part, other) for part in file.parts for other in _OTHERS):
                return f"{file} {text}"
    return None


def _parts(folder: Path) -> list[Path]:
    """The sub-folders that are not checkpoints on their own."""
    whole = ("config.json", "adapter_config.json", "model.safetensors")
    return [part for part in folder.glob("*/") if not any((part / name).exists() for name in whole)]


def checkpoint_inside(folder: Path) -> Path | None:
    """The last checkpoint in the sub-folders of a folder, such as checkpoint-500, export or snapshots/REVISION."""
    patterns = [f"{level}{name}" for level in ("*/", "*/*/") for name in ("config.json", "adapter_config.json")]
    inside = [file for pattern in patterns for file in folder.glob(pattern)]
    return max(inside, key=lambda file: file.stat().st_mtime).parent if inside else None
