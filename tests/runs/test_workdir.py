"""Ownership of a work directory."""

import json
from pathlib import Path

import pytest
from etils import epath

from camopd_jax.config.schema import MeshConfig, Optimizer, SftConfig, Stream, TrainConfig, WarmUp
from camopd_jax.errors import UserError
from camopd_jax.runs.workdir import claim_workdir


def train_config(**changes):
    return TrainConfig("general", "specialised", **changes)


def claim(workdir, config):
    claim_workdir(epath.Path(workdir), config)
    return json.loads((Path(workdir) / "config.json").read_text())


def test_a_workdir_accepts_its_own_config(tmp_path):
    first = claim(tmp_path / "new/run", train_config(steps=120))
    assert (first["kind"], first["config"]["steps"]) == ("TrainConfig", 120)
    again = claim(tmp_path / "new/run", train_config(steps=200, mesh=MeshConfig(fsdp=2)))
    assert again["config"]["steps"] == 200 and again["fingerprint"] == first["fingerprint"]
    assert [p.name for p in (tmp_path / "new/run").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seed": 1, "optimizer": Optimizer(b1=0.5)}, r"\(config\.optimizer\.b1, config\.seed\)"),
        ({"optimizer": Optimizer(schedule="cosine")}, r"config\.optimizer\.schedule"),
    ],
)
def test_a_workdir_with_another_config_is_an_error(tmp_path, changes, named):
    claim(tmp_path, train_config())
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match=f"belongs to a run with another config.*{named}.*new --workdir"):
        claim(tmp_path, train_config(**changes))
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_workdir_of_an_earlier_version_is_continued(tmp_path):
    """A field that its config.json does not have counts with its default."""
    now = claim(tmp_path, train_config())
    before = json.loads(json.dumps(now)) | {"fingerprint": "of the fields it had"}
    del before["config"]["method"]["normalise"], before["config"]["warm_up"]
    (tmp_path / "config.json").write_text(json.dumps(before))
    with pytest.raises(UserError, match=r"another config \(config\.warm_up\.steps\)"):
        claim(tmp_path, train_config(warm_up=WarmUp(steps=3)))
    again = claim(tmp_path, train_config())
    assert (again["config"], again["fingerprint"]) == (now["config"], now["fingerprint"])


def test_a_workdir_with_a_field_that_no_longer_exists_is_refused(tmp_path):
    before = claim(tmp_path, train_config())
    before["config"]["method"]["shape"] = "round"
    (tmp_path / "config.json").write_text(json.dumps(before))
    with pytest.raises(UserError, match=r"another config \(config\.method\.shape\)"):
        claim(tmp_path, train_config())


def test_with_a_cosine_schedule_steps_must_not_change(tmp_path):
    cosine = Optimizer(schedule="cosine")
    claim(tmp_path, train_config(optimizer=cosine, steps=100))
    with pytest.raises(UserError, match=r"another config \(config\.steps\)"):
        claim(tmp_path, train_config(optimizer=cosine, steps=101))


def test_a_workdir_of_another_command_is_refused(tmp_path):
    claim(tmp_path, SftConfig("model", Stream("d.jsonl")))
    with pytest.raises(UserError, match="belongs to a run of `sft`, not of `train`"):
        claim(tmp_path, train_config())


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "TrainConfig"}', '{"kind": "TrainConfig", "config": []}'])
def test_an_invalid_config_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: not the config\.json of a run"):
        claim(tmp_path, train_config())
    assert (tmp_path / "config.json").read_text() == text


def test_a_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        claim(tmp_path / "file/run", train_config())


def test_a_bucket_without_the_gs_package(monkeypatch):
    def missing(path):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(epath.backend.fsspec_backend, "fs", missing)
    with pytest.raises(UserError, match="gs://bucket/run: Please install gcsfs"):
        claim("gs://bucket/run", train_config())
