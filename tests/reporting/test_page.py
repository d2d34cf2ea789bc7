"""The page: its contents for each kind of directory, valid HTML, and safety."""

import datetime
import html
import html.parser
import json
import re
import subprocess
import sys

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs
from workdirs import HALF, NOTHING, diagnostics_row, write, write_grid, write_run

from camopd_jax.reporting import load, styles
from camopd_jax.reporting.page import page

NOW = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)
EVALUATED = [(4, 0.1, 0.99), (8, 0.3, 0.97), (12, 0.5, 1.0)]
RECOVERY, REVIEW, THIRD = styles.PART_COLOURS[:3]
VOID = {"meta", "input", "br", "link", "img"}


def made(*folders):
    """The page of some directories without Plotly's library; checks that it is well formed."""
    text = page(load.read([str(folder) for folder in folders]), NOW)
    assert text.count(get_plotlyjs()) == 1
    text = text.replace(get_plotlyjs(), "")
    check(text)
    return text


class Nesting(html.parser.HTMLParser):
    """Fails if tags are not closed in order; collects ids and references to them."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.refers, self.tags = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        self.refers += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag


def check(text):
    seen = Nesting()
    seen.feed(text)
    assert not seen.open
    assert len(set(seen.ids)) == len(seen.ids)
    assert all(target.startswith("#") and target[1:] in seen.ids for target in seen.refers)
    assert not any(tag in ("link", "img", "iframe", "object") for tag, _ in seen.tags)
    assert not re.search(r"https?:|url\(|@import", text)
    assert "default-src 'none'" in text  # a browser holds the page to it
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= set(re.findall(r"(--[\w-]+):", text))
    assert text.count("<html lang=") == text.count("<title>camopd_jax: ") == text.count('name="viewport"') == 1
    for title, plot in figures(text).items():
        assert title and plot.data and not plot.layout.template.layout.font.color, "the theme is the page's to choose"


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def figures(text):
    """The figures by title, as Plotly reads them; Plotly raises errors for unknown properties."""
    plots = {}
    for title, data in re.findall(
        r'<figcaption>(.*?)(?: <small>.*?)?</figcaption>.*?<script type="application/json">(.*?)</script>', text, re.S
    ):
        plots[html.unescape(title)] = go.Figure(json.loads(data, parse_constant=refuse))
    assert len(plots) == text.count("<figure>")
    return plots


def colours(plot):
    return {trace.name: trace.line.color for trace in plot.data if trace.fill is None}


def titles(text):
    return re.findall(r"<h2[^>]*>(.*?)</h2>", text)


def row(text, table, name):
    """The cells of a row of the table whose caption contains `table`."""
    tables = re.findall(r"<table>.*?</table>", text, flags=re.S)
    own = next(t for t in tables if table in html.unescape(t.split("</caption>")[0]))
    line = next(r for r in re.findall(r"<tr>.*?</tr>", own, flags=re.S) if f"{name}</th>" in r)
    return [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", line)]


# ---------------------------------------------------------------------------------- single runs


def test_a_run_with_an_incomplete_last_line(tmp_path):
    folder = write_run(tmp_path / "mine", steps=5, student=None, exported=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "phase": "reco')
    text = made(folder)
    assert "mine: a run, in progress, 5 of 12 steps" in text
    assert titles(text) == ["Selection", "Gaps", "Answers", "Optimisation", "Throughput", "Answers early and late",
                            "Runs and settings"]  # fmt: skip


def test_a_run_with_only_a_config(tmp_path):
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
    plots = figures(text)
    assert list(plots)[:5] == ["Recovery against retention", "Recovery: sums", "Recovery: logic",
                               "Recovery: mean over benchmarks", "Retention: drugs"]  # fmt: skip
    band, line = plots["Recovery: sums"].data
    assert band.y == pytest.approx((0.15, 0.35, 0.55, 0.45, 0.25, 0.05)) and line.y == (0.1, 0.3, 0.5)
    assert band.fill == "toself" and band.fillcolor == line.line.color and band.hoverinfo == "skip"
    assert colours(plots["Share of answers selected"]) == {"recovery": RECOVERY, "review": REVIEW}
    # 4 of 8 questions back, all kept: sqrt(.5 * .5 / 7) = 18.9 points over questions
    assert row(text, "In %", "mine") == ["2e-06", "12", "24 questions", "1,200", "50.0 ± 18.9", "50.0 ± 18.9",
                                         "50.0 ± 13.4", "100.0 ± 0.0", "12"]  # fmt: skip
    start, point = plots["Recovery against retention"].data
    assert (start.x, start.y, point.x, point.y) == ((0,), (1,), (0.5,), (1,))
    assert point.error_x.array == pytest.approx((0.134,), abs=1e-3) and point.error_y.array == (0,)
    stages = {trace.name: trace.x for trace in plots["Time of a step by stage"].data}
    assert stages["update"] == (0.4, 0.4) and list(stages) == ["rollout", "score", "select", "update", "other"]
    assert plots["Gap mass of the answers: median"].data[1].y[:3] == pytest.approx((0.02, 0.04, 0.06))


def test_gradients(tmp_path):
    rows = [diagnostics_row(0), diagnostics_row(4, layers={"embedding": 0.4, "layer 0": None}, correlations=None)]
    text = made(write_run(tmp_path / "mine", diagnostics=rows))
    plots = figures(text)
    dashes = {trace.name: (trace.line.color, trace.line.dash) for trace in plots["Coherence"].data if not trace.fill}
    assert dashes["recovery, selected"] == (RECOVERY, "solid") and dashes["review, all"] == (REVIEW, "dash")
    assert len(dashes) == 6 and {"recovery, random", "review, random"} <= dashes.keys()
    assert set(colours(plots["Conflict of the branches"])) == {"selected", "all"}
    (layers,) = plots["Conflict by layer"].data
    assert layers.x == ("0", "4") and layers.y == ("embedding", "layer 0", "final norm")
    assert list(map(list, layers.z)) == [[-0.2, 0.4], [0.1, None], [0.3, None]]
    (correlations,) = plots["Correlations of the gap mass"].data
    assert len(correlations.y) == 10 and correlations.y[-1] == "review, teacher loss" and correlations.x == ("0",)
    assert list(map(list, correlations.z)) == [[0.3]] * 10


def test_a_mixed_run_shows_both_branches(tmp_path):
    text = made(write_run(tmp_path / "mine", "vanilla"))
    selected = figures(text)["Share of answers selected"]
    assert colours(selected) == {"recovery": RECOVERY, "review": REVIEW}
    assert [trace.y[0] for trace in selected.data if not trace.fill] == [0.25, 0.5]
    assert colours(figures(text)["Loss"]) == {"recovery": RECOVERY, "review": REVIEW, "mixed": THIRD}
    assert "vanilla MOPD: both streams" in text and "mine: review" in text


@pytest.mark.parametrize("schedule", ["alternate", "mixed"])
def test_three_branches_of_any_name(tmp_path, schedule):
    names = {"law-2": 1, "recovery": 2, "maths": 1}
    coherence = {"coherence": {"selected": 0.2, "all": 0.1}}
    rows = [diagnostics_row(step, branches=dict.fromkeys(names, coherence)) for step in (0, 4)]
    text = made(write_run(tmp_path / "mine", branches=names, diagnostics=rows, **{"method.schedule": schedule}))
    plots = figures(text)
    assert colours(plots["Share of answers selected"]) == {
        "law-2": RECOVERY,
        "recovery": REVIEW,
        "maths": THIRD,
    }
    assert set(colours(plots["Conflict of the branches"])) == {"selected", "all"}
    assert {trace.name for trace in plots["Coherence"].data if trace.showlegend} == {
        f"{name}, selected" for name in names
    }
    assert {f"{name}, all" for name in names} < set(colours(plots["Coherence"]))
    assert all(f"mine: {name}</h3>" in text for name in names)


def test_numbers_that_are_not_finite_are_gaps_in_lines(tmp_path):
    folder = write_run(tmp_path / "mine")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[2] |= {"loss": None, "grad_norm": None}
    write(folder / "metrics.jsonl", rows)
    measured = diagnostics_row(4, layers=None, conflict={"selected": {"cosine": None}}, correlations={"recovery": None})
    write(folder / "diagnostics.jsonl", [diagnostics_row(0), measured, {"step": 8}])
    scores = [{"step": step, "phase": "recovery", "score": [None] * (step + 1)} for step in range(4)]
    write(folder / "selection.jsonl", scores)
    plots = figures(made(folder))
    assert plots["Loss"].data[1].x == (0, 1, 4, 5, 6, 8, 9, 10) and "Conflict by layer" in plots
    assert "Gap mass of the answers: median" not in plots


def test_a_page_of_supervised_fine_tuning(tmp_path):
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
    assert set(colours(figures(text)["Loss"])) == {"sft"}


# --------------------------------------------------------------------------------- several runs


def test_two_runs_are_compared_by_question(tmp_path):
    """6 and 4 of 8 recovered: +25; sd of the differences sqrt(1.5 / 7), t(7) = 2.365: half-width 38.7."""
    better = HALF | {"sums": [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]}
    mine, other = write_run(tmp_path / "a" / "mine", student=better), write_run(tmp_path / "other", "vanilla")
    text = made(mine, other)
    assert row(text, "Difference from vanilla", "mine")[:2] == ["8 questions", "+25.0 (-13.7 to +63.7)"]
    assert row(text, "Difference from camopd", "other")[1] == "-25.0 (-63.7 to +13.7)"
    assert re.search(r"method\.schedule</th>.*>alternate</td>.*><b>mixed</b></td>", text, re.S)
    assert "general_model</th>" not in text  # the same in both
    loss = figures(text)["Loss, recovery"]
    assert colours(loss) == {"mine": styles.COMPARED_COLOURS["camopd"], "other": styles.COMPARED_COLOURS["vanilla"]}


def test_runs_with_different_questions_are_not_compared(tmp_path):
    mine, other = write_run(tmp_path / "mine"), write_run(tmp_path / "other", "vanilla")
    rows = [json.loads(line) for line in (other / "eval.jsonl").read_text().splitlines()]
    write(other / "eval.jsonl", [row | {"asked": "others"} for row in rows])
    assert "Difference from" not in made(mine, other)


def test_runs_with_equal_names_are_shown_by_path(tmp_path):
    folders = [write_run(tmp_path / name / "run") for name in ("a", "b")]
    assert [source.groups[0].name for source in load.read(map(str, folders))] == [str(folder) for folder in folders]


def test_fifty_runs(tmp_path):
    methods = ["alternating"] * 48 + ["vanilla", "camopd"]
    folders = [write_run(tmp_path / f"run-{i}", method, standings=EVALUATED, **{"seed": i})
               for i, method in enumerate(methods)]  # fmt: skip
    text = made(*folders)
    assert len(text) < 2e6 and "50 directories" in text
    recovery = figures(text)["Recovery: mean over benchmarks"]
    of_run = colours(recovery)
    assert len(of_run) == 50 and of_run["run-49"] == styles.COMPARED_COLOURS["camopd"]
    assert list(of_run.values()).count(styles.MUTED) == 50 - 2 - len(styles.GROUP_COLOURS)
    shown = {trace.name for trace in recovery.data if trace.showlegend}
    assert shown == {name for name, colour in of_run.items() if colour != styles.MUTED}
    assert recovery.data[0].line.color == styles.MUTED, "grey lines lie below the others"


# ------------------------------------------------------------------------------------- grids

SEEDS = {"camopd": (3, 4, 5), "vanilla": (2, 4, 4)}  # of the 6 questions that do not tune, those that are back


def scores(right, tuned):
    """Questions 0 and 4 are for tuning; of the six others, the first `right` are right."""
    others = [1.0] * right + [0.0] * (6 - right)
    return HALF | {"sums": [tuned, *others[:3], tuned, *others[3:]]}


@pytest.fixture
def grid(tmp_path):
    students = {method: {seed: scores(right, float(method == "camopd")) for seed, right in enumerate(of_seeds)}
                for method, of_seeds in SEEDS.items()}  # fmt: skip
    return write_grid(tmp_path / "grid", students, {"camopd": {"0.0002": 0.7, "0.0004": 0.25}})


def test_a_finished_grid(grid):
    """camopd: 3, 4, 5 of 6, so 66.7 with sd 16.7 over 3 seeds. Minus vanilla: 1/6, 0, 1/6; t(2) = 4.303."""
    text = made(grid)
    assert "a grid, ended, 8 runs, the last start took 10 minutes" in text
    assert row(text, "In %", "camopd")[:5] == ["0.0002", "12", "3 seeds", "1,200", "66.7 ± 9.6"]
    assert row(text, "Difference from vanilla", "camopd")[:2] == ["3 seeds", "+11.1 (-12.8 to +35.0)"]
    assert row(text, "grid: choice of settings", "camopd") == ["0.0002: 70.0", "0.0004: 25.0"]
    assert "<b>0.0002: 70.0</b>" in text and "<b>0.0004: 25.0</b>" not in text
    assert [
        trace.name for trace in figures(text)["Loss, review"].data if trace.name == "camopd" and not trace.fill
    ] == ["camopd"]  # the tuning run is not drawn


def test_a_difference_without_spread_is_not_marked(tmp_path):
    students = {
        method: {seed: scores(right, 0.0) for seed in range(2)} for method, right in (("camopd", 4), ("vanilla", 2))
    }
    text = made(write_grid(tmp_path / "grid", students))
    assert "+33.3 (+33.3 to +33.3)" in text and "<b>+33.3" not in text


def test_runs_that_failed(grid):
    facts = json.loads((grid / "study.json").read_text()) | {"failed": {"grid/pcgrad/0.1/seed-0": "no <room> left"}}
    (grid / "study.json").write_text(json.dumps(facts))
    text = made(grid)
    assert "a grid, ended, 8 runs, 1 failed" in text
    assert row(text, "Runs that failed.", "grid/pcgrad/0.1/seed-0") == ["no &lt;room&gt; left"]


def test_the_interpolation(grid):
    for weight, right in ((0.3, 2), (0.6, 4)):
        folder = write_run(grid / "interpolation" / f"{weight:g}" / "seed-1000", steps=0, student=scores(right, 0.0))
        for name in ("metrics", "samples", "selection"):
            (folder / f"{name}.jsonl").unlink()
    facts = json.loads((grid / "study.json").read_text())
    facts["settings"]["interpolation"] = 0.6
    facts["merits"]["interpolation"] = {"0.3": 0.4, "0.6": 0.5}
    (grid / "study.json").write_text(json.dumps(facts))
    text = made(grid)
    assert row(text, "In %", "interpolation")[:5] == ["0.6", "0", "18 questions", "\u2013", "66.7 ± 21.1"]
    # 4/6 less 2/6, 4/6, 4/6
    assert row(text, "Difference from vanilla", "interpolation")[:2] == ["3 seeds", "+11.1 (-36.7 to +58.9)"]
    path = next(trace for trace in figures(text)["Recovery against retention"].data if "interpolation of" in trace.name)
    assert path.hovertext == ("30 % original", "60 % original") and path.x[1] > path.x[0]
    assert row(text, "grid: choice of settings", "interpolation") == ["0.3: 40.0", "0.6: 50.0"]


def test_a_grid_in_progress_shows_its_best_tuning_run(grid):
    (grid / "study.json").unlink()
    write_run(grid / "random" / "0.0002" / "seed-1000", "random", student=HALF, seed=1000)
    write_run(grid / "random" / "0.0004" / "seed-1000", "random", seed=1000,
              student=HALF | {"sums": NOTHING, "logic": NOTHING})  # fmt: skip
    write_run(grid / "random" / "0.0008" / "seed-1000", "random", steps=3, student=None, exported=False, seed=1000)
    text = made(grid)
    assert "a grid, in progress, 11 runs so far, 10 of them ended" in text
    assert row(text, "In %", "random, tuning")[0] == "0.0002" and row(text, "In %", "camopd")[2] == "3 seeds"
    # tuning questions 0 and 4 are right on both axes with the lower rate, on one axis with the higher
    assert row(text, "grid: choice of settings", "random") == ["0.0002: 100.0", "0.0004: 50.0"]


def test_a_grid_with_one_finished_seed_has_errors_over_questions(grid):
    (grid / "study.json").unlink()
    write_run(grid / "random" / "0.0002" / "seed-0", "random", student=HALF, seed=0)
    write_run(grid / "random" / "0.0002" / "seed-1", "random", steps=3, student=None, exported=False, seed=1)
    text = made(grid)
    assert row(text, "In %", "random")[2] == "18 questions" and row(text, "In %", "random")[4] == "33.3 ± 21.1"
    assert row(text, "The runs of this page", "random")[2:] == ["3 of 12", "0, 1", "in progress"]


# -------------------------------------------------------------------------------------- safety


def test_prompts_answers_and_names_are_escaped(tmp_path):
    hostile = '</script><script>alert("x")</script><svg onload=x>'
    folder = write_run(tmp_path / "<b>&run", prompt=hostile)
    other = write_run(tmp_path / "x' onmouseover='y")
    samples = [json.loads(line) | {"tokens": [hostile, "\ud83d", "z"]}
               for line in (folder / "samples.jsonl").read_text().splitlines()]  # fmt: skip
    write(folder / "samples.jsonl", samples)
    text = made(folder, other)
    assert "alert(" in text and "<script>alert" not in text and "<svg onload" not in text and "<b>&run" not in text
    assert "&lt;b&gt;&amp;run" in colours(figures(text)["Loss, recovery"])  # Plotly's own texts may hold tags
    text.encode()  # half a pair of surrogates would not be written


def test_tokens_are_coloured_by_their_gaps(tmp_path):
    text = made(write_run(tmp_path / "mine"))
    assert '<span class="more-3" title="gap +1.5000">fo</span>' in text
    assert '<span class="less-2" title="gap -0.3000"> ur</span>' in text
    assert '<span title="gap +0.0000">&lt;e&gt;</span>' in text
    assert "early, step 0" in text and "late, step 8" in text


def test_long_answers_are_cut(tmp_path):
    folder = write_run(tmp_path / "mine")
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    write(folder / "samples.jsonl", [row | {"tokens": ["a"] * 302, "gaps": [None] * 302} for row in rows])
    text = made(folder)
    assert "… 2 more tokens" in text and text.count("<span>a</span>") % 300 == 0


def test_a_report_loads_no_jax(tmp_path):
    write_run(tmp_path / "mine")
    code = (
        "import sys, camopd_jax.report; from camopd_jax.reporting.page import write_page;"
        f"write_page([{str(tmp_path / 'mine')!r}], {str(tmp_path / 'page.html')!r});"
        "sys.exit(str({'jax', 'flax', 'optax'} & set(sys.modules) or ''))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stderr.strip() == "" and (tmp_path / "page.html").exists()
