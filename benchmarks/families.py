# ruff: noqa: E402
"""Compares every model family with transformers on torch, on this machine's devices and in both precisions.

    python benchmarks/families.py
    python benchmarks/families.py --families=qwen3,gemma2

Tiny random instances, those of the tests. Prints a line of JSON for each family: the largest difference of a token's
log-probability in float32, and the mean and the largest in bfloat16, both from torch in float32 on the CPU. The exit
code is 1 if a family failed or differs by more than 1e-4 in float32. Needs torch, like the tests.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests/models"), str(ROOT / "tests")]

from conftest import FAMILIES, build  # tests/models/conftest.py
from scoring import log_probs, torch_log_probs

from camopd_jax.models import hf
from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.runtime.mesh import make_mesh
from camopd_jax.runtime.start import start

LARGEST = 1e-4  # nats, in float32

flags.DEFINE_list("families", list(FAMILIES), "Names of tests/models/conftest.py.")
flags.DEFINE_integer("rows", 4, "Sequences.")
flags.DEFINE_integer("slots", 40, "Tokens of each.")


def differences(family: str, folder: Path) -> dict[str, float]:
    """Of the log-probabilities of random tokens, in nats."""
    theirs = build(family)
    theirs.save_pretrained(folder)
    v = flags.FLAGS
    tokens = np.random.default_rng(0).integers(0, 90, (v.rows, v.slots)).astype(np.int32)
    expected = torch_log_probs(theirs, tokens)
    config, mesh = from_hf(hf.read_config(folder), context=v.slots), make_mesh(devices=jax.devices()[:1])
    params = hf.load(folder, config, mesh, "float32")

    def gaps(dtype: str) -> np.ndarray:
        return np.abs(log_probs(Model(config, mesh=mesh, dtype=dtype), params, tokens) - expected)

    exact, rounded = gaps("float32"), gaps("bfloat16")
    return {"float32": float(exact.max()), "bfloat16_mean": float(rounded.mean()), "bfloat16": float(rounded.max())}


def main(_) -> None:
    start()
    failed = False
    for family in flags.FLAGS.families:
        line = {"family": family, "device": jax.devices()[0].device_kind}
        with tempfile.TemporaryDirectory() as folder:
            try:
                line |= {name: float(f"{gap:.3g}") for name, gap in differences(family, Path(folder)).items()}
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {error}"[:300]
        failed |= not line.get("float32", 1.0) <= LARGEST
        print(json.dumps(line), flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    app.run(main)
