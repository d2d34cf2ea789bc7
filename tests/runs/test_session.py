"""Sessions: the code of docs/library.md and of the notebook, word for word, and what a session refuses."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from camopd_jax.config import TrainConfig, default
from camopd_jax.errors import UserError
from camopd_jax.runs.session import open_session
from camopd_jax.runtime.jsonl import read_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def at_the_root(tmp_path, monkeypatch):
    """A folder with the examples in it, as the root of the repository has them."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_code_of_the_page(at_the_root, capsys):
    """The printed gaps belong to an answer, the export is another model, `train` starts with the same step."""
    first, export, job = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), flags=re.S)
    names: dict = {}
    exec(first, names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == int(names["batches"]["recovery"].rollout.lengths[0])
    assert all(re.fullmatch(r"'.+' +[+-]\d\.\d{3}", line) for line in lines)
    assert int(names["session"].state.step) == 1 and names["metrics"]["grad_norm"] > 0
    exec(export, names)
    made, before = (
        load_file(folder / "model.safetensors")
        for folder in (at_the_root / "my_model", ROOT / "examples/quickstart/specialist")
    )
    assert made.keys() == before.keys() and any((made[name] != before[name]).any() for name in made)
    exec(job, names)
    assert "0 programs compiled and 0 read" not in capsys.readouterr().out  # only commands count them
    rows = read_rows(at_the_root / "my_run/metrics.jsonl")
    assert [row["phase"] for row in rows] == ["recovery"] * 3 + ["review"]
    # The session's step is the run's first
    assert rows[0]["loss"] == pytest.approx(float(names["metrics"]["loss"]), rel=1e-5)


@pytest.mark.slow
def test_the_notebook(at_the_root, capsys):
    """The mean gap of recovery falls over its steps."""
    notebook = json.loads((ROOT / "examples/first_run.ipynb").read_text())
    names: dict = {}
    cache = jax.config.values["jax_compilation_cache_dir"]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert jax.config.values["jax_compilation_cache_dir"] == cache
    gaps = names["mean_gap"]["recovery"]
    assert len(gaps) == 11 and np.mean(gaps[-3:]) < np.mean(gaps[:3])
    assert (at_the_root / "first_run_export/config.json").exists()
    assert "answers hold 80 % of the gap" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "value"),
    [("warm_up.steps", 3), ("start.interpolation", 0.1), ("branches.review.prompts.weights", "gap")],
)
def test_what_needs_a_work_directory(field, value):
    config = default(TrainConfig)
    config.general_model = config.specialised_model = "x"
    config.branches.recovery.prompts.source = config.branches.review.prompts.source = "x"
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=f"config.{field} is .* needs a work directory"):
        open_session(config)
