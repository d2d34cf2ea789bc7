"""Short runs of `train` with the quickstart's models."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
STEPS = 8
PAPER_CONFIG = f"--config={ROOT / 'configs/quickstart.py'}:camopd"  # the paper's settings
SMALL = [
    PAPER_CONFIG, f"--config.steps={STEPS}", "--config.rollout.batch_size=16",
    "--config.optimizer.micro_batch=8", "--config.checkpoints.every=3", "--config.checkpoints.keep_last=9",
    "--config.evaluation.benchmarks=()", "--config.log.report=false",
    "--config.optimizer.schedule=constant",  # a run may then go on for more steps
]  # fmt: skip


def one_line(ended, *parts):
    lines = ended.err.strip().splitlines()
    assert ended.code == 2, ended.err
    assert len(lines) == 1 and lines[0].startswith("error: "), ended.err
    for part in parts:
        assert part in lines[0]


def checkpoints(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def same_weights(workdir, other):
    ours, theirs = (load_file(w / "export" / "model.safetensors") for w in (workdir, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)
