"""Exported folders: there as a whole or not at all, whatever stops an export."""

import dataclasses
import json
import resource
import shutil
import subprocess
from functools import partial
from pathlib import Path

import jax
import pytest
from builders import train_config
from etils import epath
from quickstart import QUICKSTART
from rows import edit_json
from safetensors.numpy import load_file

from camopd_jax.config.identity import to_json
from camopd_jax.config.schema import Compute
from camopd_jax.errors import UserError
from camopd_jax.inference import loading
from camopd_jax.models import hf
from camopd_jax.runs import export
from camopd_jax.runtime.mesh import make_mesh

GENERALIST = QUICKSTART / "generalist"
PROVENANCE = {"method": "copying", "model": "generalist"}


@pytest.fixture(scope="module")
def loaded():
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    return loading.load(GENERALIST, mesh, Compute(), dtype="float32", context=1)


@pytest.fixture
def out(tmp_path):
    return epath.Path(tmp_path / "out")


def write(out, loaded):
    export.write_folder(out, loaded, PROVENANCE)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_it_takes_the_place_of_the_folder_before(out, loaded):
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_text("of a larger model")
    write(out, loaded)
    written = {"README.md", "SHA256SUMS", "config.json", "generation_config.json", "model.safetensors"}
    assert set(names(out)) == written | {"tokenizer.json", "tokenizer_config.json"}
    assert names(out.parent) == ["out"]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, GENERALIST))
    assert {name: t.tobytes() for name, t in ours.items()} == {name: t.tobytes() for name, t in theirs.items()}


def test_a_flipped_bit_in_exported_weights_is_named(out, loaded):
    write(out, loaded)
    subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=out, check=True, capture_output=True)
    load = partial(loading.load, Path(out), loaded.mesh, Compute(), dtype="float32", context=1)
    load()
    file = out / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"out/model.safetensors: not the file whose checksum SHA256SUMS has"):
        load()
    (out / "SHA256SUMS").unlink()
    load()


@pytest.mark.parametrize("named", [["LlamaModel"], None])
def test_architectures_name_the_class_that_is_written(named, out, loaded, tmp_path):
    """A model that AutoModel saved is one without a head; an export has it."""
    source = shutil.copytree(GENERALIST, tmp_path / "source")
    edit_json(source / "config.json", architectures=named)
    write(out, dataclasses.replace(loaded, folder=source))
    assert hf.read_config(source).get("architectures") == named
    assert hf.read_config(Path(out)) == hf.read_config(source) | {"architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("lost")])
def test_what_stops_it_leaves_the_folder_before(error, out, loaded, monkeypatch):
    out.mkdir()
    (out / "config.json").write_text("before")

    def save(folder, *_):
        assert not (folder / "config.json").exists() and names(out) == ["config.json"]
        raise error

    monkeypatch.setattr(hf, "save", save)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        write(out, loaded)
    assert (out / "config.json").read_text() == "before"
    assert names(out.parent) == ["out"]


def test_a_full_disk(out, loaded):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))  # the weights have 1.2 MB
    try:
        with pytest.raises(UserError, match=r"out: cannot write \(.*File too large.*\); free disk space") as caught:
            write(out, loaded)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert names(out.parent) == []


def test_config_json_is_the_last_file_that_a_bucket_gets(out, tmp_path, monkeypatch):
    folder, order = tmp_path / "part", []
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "README.md", "tokenizer.json"):
        (folder / name).write_text(json.dumps(name))
    copy = type(out).copy
    monkeypatch.setattr(type(out), "copy", lambda self, to: order.append(self.name) or copy(self, to))
    export._upload(folder, out)
    assert len(order) == 4 and order[-1] == "config.json"
    assert names(out) == sorted(order) and not folder.exists()


def test_runs_that_have_no_such_checkpoint(tmp_path):
    config = train_config()
    (tmp_path / "config.json").write_text(json.dumps({"kind": "TrainConfig", "config": to_json(config)}))
    with pytest.raises(UserError, match="none of its checkpoints was evaluated; leave --best out"):
        export.restore_model(str(tmp_path), best=True)
    with pytest.raises(UserError, match="config.json: no such file; give the --workdir of a run"):
        export.restore_model(str(tmp_path / "config.json"))
