"""Checks of the documentation site's pages against the code."""

import ast
import doctest
import re
from pathlib import Path

import yaml

from camopd_jax.config import methods
from camopd_jax.evals.tasks import TASKS
from camopd_jax.method.objectives import OBJECTIVES
from camopd_jax.method.token_weights import WEIGHTS
from camopd_jax.models.families import FAMILIES
from camopd_jax.models.multimodal import MULTIMODAL

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ELLIPSIS = "…"


def texts(file):
    """The texts in a Python file, with an ellipsis for each value of an f-string."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else ELLIPSIS for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def quoted_messages(page):
    """The first cells of the tables, without their backticks."""
    return [m[1].replace(r"\|", "|") for m in re.finditer(r"^\| `((?:[^`])+)` \|", page.read_text(), re.M)]


def test_every_message_in_troubleshooting_is_in_the_code():
    source = "\n".join(text for file in (ROOT / "camopd_jax").rglob("*.py") for text in texts(file))
    messages = quoted_messages(DOCS / "troubleshooting.md")
    assert len(messages) > 30
    for message in messages:
        assert message.strip(f"{ELLIPSIS}:; ") in source, message


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    pages = [page for part in yaml.safe_load(text)["nav"] for of_part in part.values() for page in of_part]
    assert sorted(pages) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_example_of_the_method_page():
    failed, tried = doctest.testfile(str(DOCS / "method.md"), module_relative=False)
    assert tried >= 3 and not failed


def quickstart_rows(text):
    """Of each benchmark in a table of the quickstart: the accuracies of the three models, and what is back or kept."""
    cells = {}
    for m in re.finditer(r"^ *(?:general|domain): (\w+) +(\S.*)$", text, re.M):
        values = re.findall(r"\d[\d.]* ± [\d.]+", m[2])
        if len(values) == 4:
            cells[m[1]] = values
    return cells


def one_line(file):
    return " ".join(file.read_text().split())


def test_the_tables_of_the_quickstart_have_the_same_numbers():
    """Those of the README, of the quickstart's page and of the results."""
    readme = quickstart_rows((ROOT / "README.md").read_text())
    assert set(readme) == {"covered", "uncovered", "mean", "domain"}
    assert quickstart_rows((DOCS / "quickstart.md").read_text()) == readme
    section = (DOCS / "results.md").read_text().split("\n## ")[1]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "%" in line]
    for name, row in zip(("covered", "uncovered", "domain"), rows[:3], strict=True):
        share = readme[name].pop()
        assert re.findall(r"[\d.]+ ± [\d.]+", row) == readme[name] and f"{share.split()[0]} %" in row


def test_the_shares_with_the_papers_settings_follow_from_the_results():
    """Those that the README states, from the accuracies of the second table of the results."""
    stated = re.search(r"settings, `.*?`, the last column has ([\d, and]+) %", one_line(ROOT / "README.md"))[1]
    rows = [line for line in (DOCS / "results.md").read_text().splitlines() if line.startswith("| ") and "%" in line]
    (_, start, end), (_, low, high), (_, before, after) = (
        [float(cell.split()[0]) for cell in row.split("|")[3:6]] for row in rows[3:6]
    )
    mean = (end + high - start - low) / (200 - start - low)
    shares = (end - start) / (100 - start), (high - low) / (100 - low), mean, after / before
    assert [int(x) for x in re.findall(r"\d+", stated)] == [round(100 * share) for share in shares]


def test_the_study_page_counts_the_methods():
    text = one_line(DOCS / "studies.md")
    parts = (methods._STUDY, methods._NEIGHBOURS, methods._OPTIONS)
    counts = re.search(r"defines (\d+) methods, .*?: (\d+) of the study, .*?, (\d+) of \[other .*? and (\d+) of", text)
    assert [int(n) for n in counts.groups()] == [len(methods.METHODS), *map(len, parts)]


def test_the_families_page_has_every_family():
    section = (DOCS / "inputs.md").read_text().split("\n## Families")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == {"model_type", *FAMILIES, *MULTIMODAL}


def test_the_objectives_page_has_every_objective_and_weight():
    text = (DOCS / "objectives.md").read_text()
    named = set(re.findall(r"^\| `(\w+)", text, re.M))
    assert {*OBJECTIVES, *WEIGHTS} <= named


def test_the_page_of_benchmarks_has_every_task():
    text = (DOCS / "evaluation.md").read_text()
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == set(TASKS)
