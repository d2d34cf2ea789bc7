"""Reading of directories, and curves over steps by hand."""

import json
import math

import pytest
from workdirs import EVERYTHING, HALF, TEACHERS, config, result_rows, standing_row, write, write_run

from camopd_jax.config.identity import field_differences, to_json
from camopd_jax.config.methods import METHODS, method_of
from camopd_jax.errors import UserError
from camopd_jax.reporting import answers, curves, load
from camopd_jax.reporting.page import write_page


def only_run(folder):
    return load.read([str(folder)])[0].groups[0].run


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_recognised_by_its_config(method):
    assert method_of(to_json(config(method, steps=24))) == method
    assert method_of(to_json(config(method, steps=24, **{"method.advantage_clip": 3.0}))) is None


@pytest.mark.parametrize("change", [{"branches": None}, {"method": None}, {"branches": {"a": {}}}])
def test_configs_of_other_versions_have_no_method(tmp_path, change):
    folder = write_run(tmp_path / "mine")
    stored = json.loads((folder / "config.json").read_text())
    stored["config"] = {name: value for name, value in (stored["config"] | change).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(stored))
    (source,) = load.read([str(folder)])
    assert source.groups[0].method is None and source.groups[0].run.parts[-2:] == ["recovery", "review"]


def test_differing_fields_of_several_configs():
    a, b = to_json(config()), to_json(config("mass-0.6", seed=3))
    del b["log"]
    fields = field_differences([a, b, a])
    mass = "branches.recovery.selection.mass"
    assert list(fields) == [mass, "branches.review.selection.mass", "log", "seed"]
    assert fields["seed"] == [0, 3, 0] and fields[mass] == [0.8, 0.6, 0.8]
    assert fields["log"] == [a["log"], None, a["log"]] and field_differences([a]) == {}


# ---------------------------------------------------------------------------------- final results


def test_final_results_are_those_of_the_last_complete_evaluation(tmp_path):
    folder = write_run(tmp_path / "mine", student=None, exported=False)
    rows = [row for name, scores in TEACHERS.items() for row in result_rows(name, 0, scores)]
    rows += result_rows("student", 4, HALF) + result_rows("student", 8, HALF | {"sums": EVERYTHING})
    write(folder / "eval.jsonl", [*rows, *result_rows("student", 12, HALF)[:2]])  # the last has no domain yet
    assert only_run(folder).final[0] == 8 and not only_run(folder).ended
    write(folder / "eval.jsonl", rows + result_rows("student", 12, HALF))
    assert only_run(folder).final[0] == 12 and only_run(folder).ended


def test_final_results_of_a_run_that_exported_its_best_model(tmp_path):
    folder = write_run(tmp_path / "mine", student=None, **{"checkpoints.export": "best"})
    rows = [row for name, scores in TEACHERS.items() for row in result_rows(name, 0, scores)]
    rows += [*result_rows("student", 4, HALF), standing_row(4, 0.5, 1.0)]
    rows += [*result_rows("student", 8, HALF), standing_row(8, 0.4, 1.0)]
    write(folder / "eval.jsonl", rows)
    assert only_run(folder).final[0] == 4


def test_teachers_results_are_on_the_students_questions(tmp_path):
    folder = write_run(tmp_path / "mine", student=None)
    rows = [row for name, scores in TEACHERS.items() for row in result_rows(name, 0, scores)]
    part = [row | {"n": 4, "scores": row["scores"][:4]} for row in result_rows("student", 12, HALF)]
    write(folder / "eval.jsonl", rows + part)
    assert [row["n"] for row in only_run(folder).final[1][0]] == [4, 4, 4]


# -------------------------------------------------------------------------------- over the steps


def test_rows_of_a_branch_include_mixed_steps(tmp_path):
    alone, mixed = only_run(write_run(tmp_path / "a")), only_run(write_run(tmp_path / "b", "vanilla"))
    assert curves.points(alone.rows_of("review"), ["selected_fraction"]) == [(3, 0.28), (7, 0.32), (11, 0.36)]
    assert curves.points(mixed.rows_of("review"), ["selected_fraction"])[:2] == [(0, 0.5), (1, 0.52)]
    assert curves.points(mixed.rows_of("mixed"), ["seconds", "update"])[0] == (0, 0.4)
    assert curves.points(alone.rows_of("review"), ["not there"]) == []
    assert alone.parts == ["recovery", "review"] and mixed.parts == ["recovery", "review", "mixed"]


def test_branches_are_in_the_order_of_the_config_then_of_the_rows(tmp_path):
    folder = write_run(tmp_path / "mine", branches={"b": 1, "a": 1})
    write(folder / "metrics.jsonl", [{"step": 0, "phase": "mixed", "z": {"gap_mean": 0.1}, "seconds": {"update": 1}}])
    assert only_run(folder).parts == ["b", "a", "z", "mixed"]


def test_points_are_averaged_over_runs_step_by_step():
    curve = curves.average([[(0, 1.0), (2, 5.0)], [(0, 3.0)], [(0, 5.0)]])
    assert curve.steps == [0, 2] and curve.values == [3.0, 5.0]
    assert curve.errors == [pytest.approx(2 / math.sqrt(3)), None]


def test_many_points_are_averaged_in_bins_within_each_run_first():
    curve = curves.average([[(step, float(step)) for step in range(8)], [(0, 10.5)]], at_most=4)
    assert curve.steps == [0.5, 2.5, 4.5, 6.5] and curve.values == [5.5, 2.5, 4.5, 6.5]


@pytest.mark.parametrize("gap, tint", [(0.04, ""), (-0.04, ""), (None, ""), (0.05, "more-1"), (-0.25, "less-2"),
                                       (1.0, "more-3"), (-7.0, "less-4")])  # fmt: skip
def test_gap_classes(gap, tint):
    assert answers.gap_class(gap) == tint


def test_early_and_late_answers_prefer_the_same_prompt(tmp_path):
    folder = write_run(tmp_path / "mine")
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        if row["step"] in (1, 6, 10):
            row["prompt"] = "again"
    write(folder / "samples.jsonl", rows)
    group = load.read([str(folder)])[0].groups[0]
    early, late = answers.early_and_late([row for row in group.run.samples if row["phase"] == "recovery"])[0]
    assert (early["step"], late["step"], early["prompt"]) == (1, 10, "again")


# ------------------------------------------------------------------------------------ mistakes


def test_a_directory_without_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        load.read([str(tmp_path)])
    with pytest.raises(UserError, match="no such directory"):
        load.read([str(tmp_path / "nowhere")])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "Other", "config": {}}'])
def test_an_invalid_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: not the config\.json of a run"):
        load.read([str(tmp_path)])


def test_an_incomplete_study_file(tmp_path):
    write_run(tmp_path / "camopd" / "0.0002" / "seed-0")
    (tmp_path / "study.json").write_text('{"axes"')
    with pytest.raises(UserError, match=r"study\.json: not JSON"):
        load.read([str(tmp_path)])


def test_the_command(command, tmp_path):
    folder, out = write_run(tmp_path / "mine", steps=0, student=None), tmp_path / "page.html"
    ended = command("report", folder, "--out", out)
    assert ended.code == 0 and ended.out == f"written: {out}\n" and out.read_text().startswith("<!DOCTYPE html>")


def test_a_page_that_cannot_be_written(tmp_path):
    folder = write_run(tmp_path / "mine", steps=0, student=None)
    with pytest.raises(UserError, match=r"no/page\.html: cannot write"):
        write_page([str(folder)], f"{tmp_path}/no/page.html")


def test_mistakes_are_one_line(command, tmp_path):
    for arguments, message in (([], "DIR is missing"), ([tmp_path, tmp_path / "gone"], "holds no run")):
        ended = command("report", *arguments)
        assert ended.code == 2 and ended.err.count("\n") == 1 and message in ended.err, ended.err
