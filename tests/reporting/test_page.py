"""The page as a whole: what it shows of each kind of directory, that it is well formed, and that it is safe."""

import datetime
import html.parser
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from workdirs import HALF, NOTHING, diagnostics_row, write, write_grid, write_run

from camopd_jax.reporting import directories
from camopd_jax.reporting.page import page

NOW = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)
EVALUATED = [(4, 0.1, 0.99), (8, 0.3, 0.97), (12, 0.5, 1.0)]
VOID = {"meta", "input", "br", "link", "img"}


def made(*folders):
    """The page of some directories, checked to be well formed."""
    text = page(directories.read([str(folder) for folder in folders]), NOW)
    check(text)
    return text


class Nesting(html.parser.HTMLParser):
    """Fails on tags that do not close in order; collects ids, classes and what attributes name."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.refers, self.tags = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        self.refers += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag


def check(text):
    seen = Nesting()
    seen.feed(text)
    assert not seen.open
    assert len(set(seen.ids)) == len(seen.ids)
    assert all(target.startswith("#") and target[1:] in seen.ids for target in seen.refers)
    assert not any(tag in ("script", "link", "img", "iframe") for tag, _ in seen.tags)
    assert not re.search(r"url\((?!#)|@import", text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= set(re.findall(r"(--[\w-]+):", text))
    assert text.count("<html lang=") == text.count("<title>camopd_jax: ") == text.count('name="viewport"') == 1
    for drawing in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img" and root.get("aria-label") and root.get("viewBox")
        for node in root.iter():
            values = " ".join(node.attrib.values()) + " " + (node.text or "")
            assert not re.search(r"\b(nan|inf)\b", values, flags=re.I), values
            assert "#0a0b" not in values  # a sentinel that no theme turns into a colour


def titles(text):
    return re.findall(r"<h2[^>]*>(.*?)</h2>", text)


def captions(text):
    """Titles of the figures."""
    found = re.findall(r"<figcaption>(.*?)</figcaption>", text, flags=re.S)
    return [re.sub(r"<[^>]+>", "", caption).strip().split("\n")[0] for caption in found]


def figure(text, title):
    return next(part for part in re.findall(r"<figure.*?</figure>", text, flags=re.S) if title in part)


def row(text, table, name):
    """The cells of a row of the table whose caption begins with `table`."""
    found = next(t for t in re.findall(r"<table>.*?</table>", text, flags=re.S) if f"<caption>{table}" in t)
    line = next(r for r in re.findall(r"<tr>.*?</tr>", found, flags=re.S) if f"{name}</th>" in r)
    return [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", line)]


# ---------------------------------------------------------------------------------- single runs


def test_a_run_that_was_killed_in_the_middle_of_a_line(tmp_path):
    folder = write_run(tmp_path / "mine", steps=5, student=None, exported=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "phase": "reco')
    text = made(folder)
    assert "mine: a run, in progress, 5 of 12 steps" in text
    assert titles(text) == ["Selection", "Gaps", "Answers", "Optimisation", "Throughput", "Answers early and late",
                            "Runs and settings"]  # fmt: skip


def test_a_run_of_which_there_is_only_a_config(tmp_path):
    folder = write_run(tmp_path / "mine", steps=0, student=None, exported=False)
    for file in folder.glob("*.jsonl"):
        file.unlink()
    assert titles(made(folder)) == ["Runs and settings"]


def test_a_finished_run(tmp_path):
    folder = write_run(tmp_path / "mine", standings=EVALUATED, diagnostics=[diagnostics_row(s) for s in (0, 4, 8)],
                       **{"evaluation.every": 4})  # fmt: skip
    text = made(folder)
    assert "mine: a run, ended, 12 of 12 steps" in text and "2 January 2026, 03:04 UTC" in text
    assert titles(text) == ["Results", "Recovery and retention over steps", "Selection", "Gaps", "Gradients", "Answers",
                            "Optimisation", "Throughput", "Answers early and late", "Runs and settings"]  # fmt: skip
    shown = captions(text)
    assert shown[:5] == ["What came back against what was kept", "Recovery: mean of its benchmarks", "Recovery: sums",
                         "Recovery: logic", "Retention: drugs"]  # fmt: skip
    assert "fill-opacity" in figure(text, "Recovery: sums")  # the band
    selected = figure(text, "Answers that were selected")
    assert "stroke: var(--recovery)" in selected and "stroke: var(--review)" in selected
    # 4 of 8 questions back, all kept: sqrt(.5 * .5 / 7) = 18.9 points over questions
    assert row(text, "In %", "mine") == ["2e-06", "12", "24 questions", "1,200", "50.0 ± 18.9", "50.0 ± 18.9",
                                         "50.0 ± 13.4", "100.0 ± 0.0"]  # fmt: skip


def test_a_mixed_run_shows_both_branches(tmp_path):
    text = made(write_run(tmp_path / "mine", "vanilla"))
    for title in ("Answers that were selected", "Scores of the answers, recovery", "Scores of the answers, review"):
        assert title in captions(text)
    selected = figure(text, "Answers that were selected")
    assert "stroke: var(--recovery)" in selected and "stroke: var(--review)" in selected
    assert "vanilla MOPD: both streams" in text


def test_numbers_that_were_not_finite_leave_holes(tmp_path):
    folder = write_run(tmp_path / "mine")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[2] |= {"loss": None, "grad_norm": None}
    write(folder / "metrics.jsonl", rows)
    measured = diagnostics_row(4, layers=None, conflict={"selected": {"cosine": None}}, correlations={"recovery": None})
    write(folder / "diagnostics.jsonl", [diagnostics_row(0), measured, {"step": 8}])
    text = made(folder)
    assert "Loss" in captions(text) and "Conflict, layer by layer" in captions(text)


def test_supervised_fine_tuning_has_a_page_too(tmp_path):
    folder = write_run(tmp_path / "sft", student=None, exported=False)
    stored = json.loads((folder / "config.json").read_text())["config"]
    kept = {name: stored[name] for name in ("steps", "seed", "optimizer", "evaluation", "checkpoints", "log")}
    (folder / "config.json").write_text(json.dumps({"kind": "SftConfig", "config": kept | {"model": "small"}}))
    write(folder / "metrics.jsonl", [{"step": i, "phase": "sft", "loss": 2.0 - i / 12, "seconds": {"update": 0.1},
                                      "tokens_per_second": 9.0, "response_tokens": 8} for i in range(5)])  # fmt: skip
    for name in ("samples", "selection", "eval"):
        (folder / f"{name}.jsonl").unlink()
    text = made(folder)
    assert titles(text) == ["Optimisation", "Throughput", "Runs and settings"] and "supervised fine-tuning" in text


# --------------------------------------------------------------------------------- several runs


def test_two_runs_are_compared_question_by_question(tmp_path):
    """6 of 8 back against 4: +25; sd of the differences sqrt(1.5 / 7), t(7) = 2.365: 38.7 on either side."""
    better = HALF | {"sums": [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]}
    ours, theirs = write_run(tmp_path / "a" / "mine", student=better), write_run(tmp_path / "theirs", "vanilla")
    text = made(ours, theirs)
    assert row(text, "Less that of vanilla", "mine")[:2] == ["8 questions", "+25.0 (\u221213.7 to +63.7)"]
    assert row(text, "Less that of camopd", "theirs")[1] == "\u221225.0 (\u221263.7 to +13.7)"
    assert "method.schedule" in text and "<td>alternate</td>" in text and "<td><b>mixed</b></td>" in text
    assert "general_model</th>" not in text  # the same in both


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [write_run(tmp_path / name / "run") for name in ("a", "b")]
    assert [source.groups[0].name for source in directories.read(map(str, folders))] == ["a/run", "b/run"]


def test_fifty_runs(tmp_path):
    methods = ["alternating"] * 48 + ["vanilla", "camopd"]
    folders = [write_run(tmp_path / f"run-{i}", method, standings=EVALUATED, **{"seed": i})
               for i, method in enumerate(methods)]  # fmt: skip
    text = made(*folders)
    assert len(text) < 5e6 and "50 directories, 50 runs, 50 ended" in text
    assert "48 others" in text
    recovery = figure(text, "Recovery: mean of its benchmarks")
    strokes = re.findall(r"<title>run-(\d+)</title>\s*<path[^>]*?stroke: var\(--([\w-]+)\)", recovery, flags=re.S)
    assert dict(strokes)["49"] == "group-1" and dict(strokes)["48"] == "group-2" and dict(strokes)["7"] == "muted"
    assert "run-7" in captions(text)  # where lines tangle, each has a figure of its own


# ------------------------------------------------------------------------------------- grids

SEEDS = {"camopd": (3, 4, 5), "vanilla": (2, 4, 4)}  # of the 6 questions that do not tune, those that are back


def scores(right, tuned):
    """Questions 0 and 4 tune; of the six others, the first so many are right."""
    others = [1.0] * right + [0.0] * (6 - right)
    return HALF | {"sums": [tuned, *others[:3], tuned, *others[3:]]}


@pytest.fixture
def grid(tmp_path):
    students = {method: {seed: scores(right, float(method == "camopd")) for seed, right in enumerate(of_seeds)}
                for method, of_seeds in SEEDS.items()}  # fmt: skip
    return write_grid(tmp_path / "grid", students, {"camopd": {"0.0002": 0.7, "0.0004": 0.25}})


def test_a_finished_grid(grid):
    """camopd: 3, 4, 5 of 6, so 66.7 with sd 16.7 over 3 seeds. Less vanilla: 1/6, 0, 1/6; t(2) = 4.303."""
    text = made(grid)
    assert "a grid, ended, 8 runs, the last start took 10 minutes" in text
    assert row(text, "In %", "camopd")[:5] == ["0.0002", "12", "3 seeds", "1,200", "66.7 ± 9.6"]
    assert row(text, "Less that of vanilla", "camopd")[:2] == ["3 seeds", "+11.1 (\u221212.8 to +35.0)"]
    assert row(text, "grid: mean of recovery", "camopd") == ["70.0", "25.0"]
    assert "<b>70.0</b>" in text and "<b>25.0</b>" not in text
    assert len(re.findall(r"<title>camopd</title>", figure(text, "Loss, recovery"))) == 1  # the tuning run is not drawn


def test_the_interpolation_is_one_model_and_a_line_of_squares(grid):
    for weight, right in ((0.3, 2), (0.6, 4)):
        folder = write_run(grid / "interpolation" / f"{weight:g}" / "seed-1000", steps=0, student=scores(right, 0.0))
        for name in ("metrics", "samples", "selection"):
            (folder / f"{name}.jsonl").unlink()
    facts = json.loads((grid / "study.json").read_text())
    facts["settings"]["interpolation"] = 0.6
    (grid / "study.json").write_text(json.dumps(facts))
    text = made(grid)
    assert row(text, "In %", "interpolation")[:5] == ["0.6", "0", "18 questions", "\u2013", "66.7 ± 21.1"]
    # 4/6 less 2/6, 4/6, 4/6
    assert row(text, "Less that of vanilla", "interpolation")[:2] == ["3 seeds", "+11.1 (\u221236.7 to +58.9)"]
    assert "interpolation of the two models" in figure(text, "What came back") and "Squares:" in text


def test_a_grid_in_progress_shows_its_best_tuning_run_until_there_are_results(grid):
    (grid / "study.json").unlink()
    write_run(grid / "random" / "0.0002" / "seed-1000", "random", student=HALF, seed=1000)
    write_run(grid / "random" / "0.0004" / "seed-1000", "random", seed=1000,
              student=HALF | {"sums": NOTHING, "logic": NOTHING})  # fmt: skip
    write_run(grid / "random" / "0.0008" / "seed-1000", "random", steps=3, student=None, exported=False, seed=1000)
    text = made(grid)
    assert "a grid, in progress, 11 runs so far, 10 of them ended" in text
    assert row(text, "In %", "random, tuning")[0] == "0.0002" and row(text, "In %", "camopd")[2] == "3 seeds"
    # on the tuning questions 0 and 4 all are right with the lower rate, of both axes; with the higher, of one
    assert row(text, "grid: mean of recovery", "random") == ["100.0", "50.0"]


# -------------------------------------------------------------------------------------- safety


def test_prompts_answers_and_names_are_text(tmp_path):
    hostile = '<script>alert("x")</script><svg onload=x>'
    folder = write_run(tmp_path / "<b>&run", prompt=hostile)
    other = write_run(tmp_path / "x' onmouseover='y")
    samples = [json.loads(line) | {"tokens": [hostile, "\ud83d", "z"]}
               for line in (folder / "samples.jsonl").read_text().splitlines()]  # fmt: skip
    write(folder / "samples.jsonl", samples)
    text = made(folder, other)
    assert "<script" not in text and "&lt;script&gt;" in text and "<svg onload" not in text and "<b>&run" not in text
    text.encode()  # half a pair of surrogates would not be written


def test_tokens_are_tinted_by_the_sign_of_their_gaps(tmp_path):
    text = made(write_run(tmp_path / "mine"))
    assert '<span class="up-3" title="gap +1.5000">fo</span>' in text
    assert '<span class="down-2" title="gap -0.3000"> ur</span>' in text
    assert '<span title="gap +0.0000">&lt;e&gt;</span>' in text
    assert "early, step 0" in text and "late, step 8" in text
