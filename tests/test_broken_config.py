"""A mistake in a checkpoint's config.json is told by every command as one, with the field, before anything is made."""

import shutil

import pytest
from quickstart import PAPER_CONFIG, QUICKSTART
from rows import chat_row, edit_json, write_lines

from camopd_jax.errors import UserError
from camopd_jax.inference import loading

SFT = f"""
from camopd_jax.config import SftConfig, default

def get_config():
    config = default(SftConfig)
    config.model = "MODEL"
    config.data.source = "{QUICKSTART / "eval_domain.jsonl"}"
    return config
"""
FLAGS = {
    "train": [PAPER_CONFIG, "--config.specialised_model=MODEL", "--workdir=OUT"],
    "sft": ["--config=FOLDER/sft.py", "--workdir=OUT"],
    "evaluate": [PAPER_CONFIG, "--checkpoint=MODEL", "--workdir=OUT"],
    "generate": ["--model=MODEL", "--input=FOLDER/x.jsonl", "--output=OUT"],
    "score": ["--model=MODEL", "--input=FOLDER/x.jsonl", "--output=OUT"],
    "interpolate": [PAPER_CONFIG, "--config.specialised_model=MODEL", "--weight=0.5", "--out=OUT"],
    "plan": [PAPER_CONFIG, "--topology=local", "--specialised_config=MODEL"],
    "doctor": [PAPER_CONFIG, "--config.general_model=MODEL", "--workdir=OUT"],
    "lm_eval": ["--model", "camopd_jax", "--model_args", "path=MODEL", "--tasks", "arc_easy"],
}


def not_json(file):
    file.write_text("{")


def spelt_out(file):
    edit_json(file, num_hidden_layers="three")


def odd_heads(file):
    edit_json(file, num_attention_heads=7, head_dim=None, num_key_value_heads=None)


BROKEN = {
    not_json: "not readable as JSON",
    spelt_out: "field num_hidden_layers is 'three'; give an integer > 0",
    odd_heads: "num_attention_heads is 7, which does not divide hidden_size = 96",
}


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(QUICKSTART / "specialist", tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        pytest.param(*pair, marks=[pytest.mark.slow] if pair[0] == "lm_eval" else [])  # which imports torch
        for pair in zip(FLAGS, [*BROKEN] * 3, strict=True)
    ],
)
def test_every_command_names_the_field_of_config_json(name, spoil, model, command, tmp_path):
    spoil(model / "config.json")
    (tmp_path / "sft.py").write_text(SFT.replace("MODEL", str(model)))
    write_lines(tmp_path / "x.jsonl", [chat_row("reverse abc") | {"response": "cba"}])
    places = {"MODEL": model, "FOLDER": tmp_path, "OUT": tmp_path / "out"}
    flags = FLAGS[name]
    for word, path in places.items():
        flags = [flag.replace(word, str(path)) for flag in flags]
    ended = command(name, *flags)
    assert ended.code == 2, ended.err
    lines = [line for line in ended.out.splitlines() if not line.startswith("checking, ")]  # not of its progress
    said = " ".join(" ".join(lines if name == "doctor" else ended.err.splitlines()[-1:]).split())
    assert f"{model / 'config.json'}: {BROKEN[spoil]}" in said
    assert "tokenizer" not in said
    assert not [file for file in (tmp_path / "out").rglob("*") if file.suffix in (".jsonl", ".safetensors")]


@pytest.mark.parametrize("spoil", BROKEN)
def test_a_folder_is_not_found_unless_its_config_json_is_sound(spoil, model):
    assert loading.find(str(model), "--model") == model
    (model / "tokenizer.json").write_text("{")  # which is not looked at yet
    assert loading.find(str(model), "--model") == model
    spoil(model / "config.json")
    with pytest.raises(UserError, match=f"config.json: {BROKEN[spoil]}"):
        loading.find(str(model), "--model")
