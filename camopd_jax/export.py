"""Writes a run's model as a Hugging Face folder that transformers loads.

    python -m camopd_jax.export --workdir=runs/medqa --out=recovered
    python -m camopd_jax.export --workdir=runs/medqa --out=recovered --step=80
    python -m camopd_jax.export --workdir=runs/medqa --out=recovered --best

The folder holds the configuration, tokenizer, chat template and generation settings of the model the
run started from, the trained weights as sharded safetensors in that model's own dtypes, and a model
card that tells where they come from.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
from absl import flags

from camopd_jax import __version__, cli
from camopd_jax.engine import Loaded
from camopd_jax.errors import UserError
from camopd_jax.models import hf

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to take; default: the last.")
_BEST = flags.DEFINE_bool("best", False, "Take the checkpoint with the highest accuracy.")

# Files of the original folder that stay true of the trained model.
_KEPT = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
         "generation_config.json", "LICENSE*", "NOTICE*")


def write_folder(out: Path, loaded: Loaded, provenance: dict[str, Any]) -> None:
    """Writes weights, configuration, tokenizer and model card to a folder, whole or not at all.

    Args:
      loaded: the model; its `folder` gives all that training does not change, and the dtypes.
      provenance: named facts for the model card.
    """
    part = out.with_name(out.name + ".part")
    if jax.process_index() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for pattern in _KEPT:
            for file in loaded.folder.glob(pattern):
                shutil.copyfile(file, part / file.name)
        (part / "README.md").write_text(model_card(provenance))
    hf.save(part, loaded.params, loaded.model.config, hf.read_config(loaded.folder), hf.tensor_dtypes(loaded.folder))
    if jax.process_index() == 0:
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
