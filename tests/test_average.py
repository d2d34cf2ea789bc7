"""A run whose result is the exponential average of the weights."""

import shutil

import numpy as np
import pytest
from quickstart import PAPER_CONFIG
from safetensors.numpy import load_file

FLAGS = [
    PAPER_CONFIG,
    "--config.steps=3", "--config.rollout.batch_size=16",
    "--config.optimizer.micro_batch=8", "--config.optimizer.schedule=constant", "--config.checkpoints.every=1",
    "--config.checkpoints.keep_last=9", "--config.evaluation.benchmarks=()", "--config.log.report=false",
]  # fmt: skip


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_the_average_is_exported_and_resumed(command, tmp_path):
    """Decay 0.5: the weights after updates 1, 2 and 3 count 1, 2 and 4. The updates are those of a run without it."""
    plain, average = tmp_path / "plain", tmp_path / "average"
    assert command("train", f"--workdir={plain}", *FLAGS).code == 0
    for step in (1, 2):
        assert command("export", f"--workdir={plain}", f"--out={tmp_path / f'{step}'}", f"--step={step}").code == 0
    after = [tensors(tmp_path / "1"), tensors(tmp_path / "2"), tensors(plain / "export")]
    wanted = {
        name: sum(w * p[name].astype(float) for w, p in zip((1, 2, 4), after, strict=True)) / 7 for name in after[0]
    }
    flags = [*FLAGS, "--config.optimizer.average=0.5", "--config.diagnostics.every=3", "--config.diagnostics.rows=8",
             "--config.compute.offload=late"]  # fmt: skip
    ended = command("train", f"--workdir={average}", *flags)
    assert ended.code == 0, ended.err
    once = tensors(average / "export")
    for name, tensor in once.items():
        np.testing.assert_allclose(tensor, wanted[name], rtol=1e-5, atol=1e-7, err_msg=name)
    assert "averaged over its updates" in (average / "export" / "README.md").read_text()
    shutil.rmtree(average / "checkpoints" / "3")
    ended = command("train", f"--workdir={average}", *flags)
    assert ended.code == 0 and "continuing from step 2" in ended.out, ended.err
    assert command("export", f"--workdir={average}", f"--out={tmp_path / 'again'}").code == 0
    for folder in (average / "export", tmp_path / "again"):
        for name, tensor in tensors(folder).items():
            np.testing.assert_array_equal(tensor, once[name], err_msg=name)
