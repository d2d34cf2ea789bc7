"""Interpolation of two models: by hand, and models that cannot be averaged."""

import json
import shutil

import numpy as np
from quickstart import PAPER_CONFIG, QUICKSTART
from rows import edit_json
from safetensors.numpy import load_file


def test_the_weighted_mean_of_every_parameter(command, tmp_path):
    ended = command("interpolate", PAPER_CONFIG, "--weight=0.25", f"--out={tmp_path / 'between'}")
    assert ended.code == 0 and "written: " in ended.out, ended.err
    general, specialised, between = (
        load_file(folder / "model.safetensors")
        for folder in (QUICKSTART / "generalist", QUICKSTART / "specialist", tmp_path / "between")
    )
    assert between.keys() == specialised.keys()
    for name, tensor in between.items():
        np.testing.assert_allclose(tensor, 0.25 * general[name] + 0.75 * specialised[name], rtol=1e-5, atol=1e-7)
    assert "interpolation with 0.25 of the original model" in (tmp_path / "between" / "README.md").read_text()
    assert json.loads((tmp_path / "between" / "config.json").read_text())["model_type"] == "llama"


def test_mistakes(command, tmp_path):
    (tmp_path / "there").mkdir()
    ended = command("interpolate", PAPER_CONFIG, f"--out={tmp_path / 'there'}")
    assert ended.code == 2 and "--out" in ended.err and "exists; give a new folder" in ended.err
    shutil.copytree(QUICKSTART / "generalist", tmp_path / "other")
    edit_json(tmp_path / "other" / "config.json", rope_theta=5000.0)
    ended = command(
        "interpolate", PAPER_CONFIG, f"--config.general_model={tmp_path / 'other'}", f"--out={tmp_path / 'x'}"
    )
    assert ended.code == 2 and "config.specialised_model: its architecture is not that of" in ended.err
    assert not (tmp_path / "x").exists()
