"""The grid of methods, learning rates and seeds: finished and unfinished cells, and the command."""

import concurrent.futures
import json
import runpy
import signal
import time
from pathlib import Path

import jax
import pytest
from quickstart import PAPER_CONFIG
from rows import read_lines, write_lines

from camopd_jax.config.consistency import from_config_dict
from camopd_jax.config.identity import changed, to_json
from camopd_jax.config.methods import METHOD_NAMES, METHODS, changes_of
from camopd_jax.config.schema import Benchmark, BranchConfig, Evaluation, Optimizer, RolloutConfig, Stream, TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.method.branches import load_models, make_branches, make_teachers
from camopd_jax.method.setup import resolve
from camopd_jax.runs.grid import INTERPOLATION, Cell, Grid, is_finished, keep_programs_of

ROOT = Path(__file__).parents[1]
BRANCHES = {"recovery": BranchConfig(Stream("g")), "review": BranchConfig(Stream("d"), teacher="specialised")}
BASE = TrainConfig(
    "g", "s", branches=BRANCHES, steps=4, rollout=RolloutConfig(batch_size=8), optimizer=Optimizer(),
    evaluation=Evaluation(every=2, benchmarks=(Benchmark("a", source="x"), Benchmark("b", source="y", axis="domain"))),
)  # fmt: skip
CELL = Cell("vanilla", 1e-4, 3)


def leave(workdir, cell, benchmarks=("a", "b"), step=4, config=None):
    folder = cell.folder(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"kind": "TrainConfig", "config": to_json(config or cell.config(BASE))})
    )
    write_lines(folder / "eval.jsonl", [{"model": "student", "step": step, "benchmark": name} for name in benchmarks])


def test_the_config_of_a_cell():
    config = CELL.config(BASE)
    assert (config.seed, config.optimizer.learning_rate, config.method.schedule) == (3, 1e-4, "mixed")
    assert config.evaluation.every == 0, "compared at the end alone"
    assert str(CELL.folder("w")) == "w/vanilla/0.0001/seed-3"
    assert Cell(INTERPOLATION, 0.3, 0).config(BASE) == BASE


def test_a_cell_with_all_final_results_is_finished(tmp_path):
    assert not is_finished(CELL, BASE, str(tmp_path))
    leave(tmp_path, CELL, benchmarks=("a",))
    assert not is_finished(CELL, BASE, str(tmp_path))
    leave(tmp_path, CELL, step=2)
    assert not is_finished(CELL, BASE, str(tmp_path))
    leave(tmp_path, CELL)
    assert is_finished(CELL, BASE, str(tmp_path))


def test_the_error_for_another_config_names_the_field(tmp_path):
    leave(tmp_path, CELL, config=Cell("vanilla", 2e-4, 3).config(BASE))
    with pytest.raises(UserError, match=r"seed-3: made with another config\.optimizer\.learning_rate; give the old"):
        is_finished(CELL, BASE, str(tmp_path))


def test_a_cell_of_an_earlier_version_is_finished_too(tmp_path):
    leave(tmp_path, CELL)
    file = CELL.folder(str(tmp_path)) / "config.json"
    record = json.loads(file.read_text())
    del record["config"]["warm_up"]
    file.write_text(json.dumps(record))
    assert is_finished(CELL, BASE, str(tmp_path))


def test_runs_of_one_method_share_compiled_programs(monkeypatch):
    keep_programs_of.cache_clear()
    freed = []
    monkeypatch.setattr("jax.clear_caches", lambda: freed.append(True))
    for method, times in (("camopd", 1), ("camopd", 1), ("vanilla", 2), ("camopd", 3)):
        keep_programs_of(method)
        assert len(freed) == times


def test_a_run_that_fails_leaves_the_others(monkeypatch, tmp_path):
    def train(config, workdir):
        if config.method.schedule == "mixed":
            raise OverflowError("too long\nby far")
        if config.seed:
            raise UserError("a file is missing")

    monkeypatch.setattr("camopd_jax.runs.grid.train", train)
    (tmp_path / "teachers" / "answers").mkdir(parents=True)
    cells = [CELL, Cell("camopd", 1e-4, 0), Cell("camopd", 1e-4, 1)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool, Grid(pool, BASE, str(tmp_path)) as grid:
        assert grid.run(cells, "runs") == [cells[1]]
    folders = [cell.folder(str(tmp_path)) for cell in cells]
    assert grid.failed == {
        str(folders[0]): "OverflowError: too long (log.txt has more)", str(folders[2]): "a file is missing",
    }  # fmt: skip
    assert "by far" in (folders[0] / "log.txt").read_text() and "in train" in (folders[0] / "log.txt").read_text()
    assert "Traceback" not in (folders[2] / "log.txt").read_text(), "one clear line is enough"


def test_every_method_has_a_first_batch():
    """Streams of each size that a method uses, with the quickstart's models and prompts."""
    base = from_config_dict(TrainConfig, runpy.run_path(str(ROOT / "configs/sandbox.py"))["get_config"]())
    base = changed(base, {f"branches.{name}.prompts.limit": 70 for name in base.branches})
    models = load_models(resolve(base, jax.devices()[:1]))
    for name in METHODS:
        setup = resolve(changed(base, changes_of(name, base)), jax.devices()[:1])
        branches = make_branches(setup, models, make_teachers(setup.config, models), setup.rows, seed=0)
        rows = {branch: len(next(branches[branch].prompts).index) for branch in branches}
        assert rows == setup.rows, name


def test_mistakes(command, tmp_path):
    config = f"--config={ROOT / 'configs/sandbox.py'}"
    for flags, message in (
        ([config], "--workdir is missing"),
        ([config, f"--workdir={tmp_path}", "--methods=camopd,vanila"], "vanila is not a method; give some of"),
        ([config, f"--workdir={tmp_path}", "--rates=1e-4,fast"], "--rates=1e-4,fast: give numbers separated by commas"),
        ([config, f"--workdir={tmp_path}", "--methods=,"], "--methods names no method; give some of camopd"),
        ([config, f"--workdir={tmp_path}", "--rates=1e-4,-1"], "--rates=1e-4,-1: give numbers > 0"),
        ([PAPER_CONFIG, "--config.evaluation.benchmarks=()",
          f"--workdir={tmp_path}", "--workers=1"], "config.evaluation.benchmarks is empty, so"),
    ):  # fmt: skip
        ended = command("compare", *flags)
        assert (ended.code, ended.err.count("\n")) == (2, 1) and message in ended.err, ended.err


def test_the_list_of_methods(command):
    """A line for each, without a config or a work directory."""
    ended = command("compare", "--list")
    assert ended.code == 0, ended.err
    assert [line.split()[0] for line in ended.out.splitlines()] == list(METHOD_NAMES)
    assert "arXiv 2608.26735" in ended.out


@pytest.mark.slow
def test_a_killed_grid_leaves_no_worker_behind(command, tmp_path):
    flags = [f"--config={ROOT / 'configs/sandbox.py'}", f"--workdir={tmp_path / 'w'}", "--config.steps=400",
             "--methods=camopd", "--rates=1e-4", "--seeds=1", "--workers=1"]  # fmt: skip
    metrics = Cell("camopd", 1e-4, 0).folder(tmp_path / "w") / "metrics.jsonl"
    command.start("compare", *flags).when(metrics.exists, signal.SIGKILL)
    time.sleep(2)
    size = metrics.stat().st_size
    time.sleep(5)
    assert metrics.stat().st_size == size


@pytest.mark.slow
def test_a_small_grid_twice(command, tmp_path):
    """Two methods, two rates, two seeds and the interpolation; only a run whose results are lost runs again."""
    flags = [f"--config={ROOT / 'configs/sandbox.py'}", f"--workdir={tmp_path / 'w'}", "--config.steps=4",
             "--config.rollout.batch_size=16", "--methods=camopd,distillation,interpolation", "--rates=1e-4,4e-4",
             "--seeds=2"]  # fmt: skip
    ended = command.start("compare", *flags).wait(600)  # some minutes on two busy cores
    assert ended.code == 0, ended.err
    assert "choosing among 2 rates: 13 of 13" in ended.out and "3 methods, 2 seeds: 4 of 4" in ended.out
    study = json.loads((tmp_path / "w" / "study.json").read_text())
    assert study["failed"] == {} and set(study["outcomes"]) == {"camopd", "distillation", "interpolation"}
    assert all(set(of) == {"0", "1"} for of in study["outcomes"].values())
    assert len(study["merits"]["interpolation"]) == 9 and len(study["merits"]["camopd"]) == 2
    for method, merits in study["merits"].items():
        assert merits[str(study["settings"][method])] == max(merits.values())
    rate = f"{study['settings']['camopd']:g}"
    run = tmp_path / "w" / "camopd" / rate / "seed-1"
    assert len(read_lines(run / "metrics.jsonl")) == 4 and "exported" in (run / "log.txt").read_text()

    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "w").rglob("metrics.jsonl")}
    (run / "eval.jsonl").unlink()
    again = command("compare", *flags)
    assert again.code == 0 and "3 methods, 2 seeds: 3 of 4 runs are complete already" in again.out
    assert json.loads((tmp_path / "w" / "study.json").read_text())["outcomes"] == study["outcomes"]
    assert {file for file, time in times.items() if file.stat().st_mtime_ns != time} <= {run / "metrics.jsonl"}
