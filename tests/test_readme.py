"""Checks of README and docs."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_are_valid(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def test_every_command_and_config_in_the_docs_exists():
    for document in DOCUMENTS:
        text = document.read_text()
        for module in re.findall(r"python -m camopd_jax\.([\w.]+)", text):
            assert (ROOT / "camopd_jax" / (module.strip(".").replace(".", "/") + ".py")).exists(), module
        for config in re.findall(r"--config=(configs/\w+\.py)", text):
            assert (ROOT / config).exists() or config == "configs/mine.py", config


def test_ci_runs_both_commands_of_the_readme():
    for pattern in ("python .*--workdir=runs/quickstart", "python .*/pytest"):
        assert len([line for line in TEXT.splitlines() if re.fullmatch(pattern, line)]) == 1
        assert f"grep -x '{pattern}' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_lock_has_every_requirement():
    locked = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "requirements.lock").read_text().splitlines()
    }
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.match(r"[\w-]+", line)[0].lower().replace("_", "-") in locked, line


@pytest.mark.slow
def test_the_quickstart_recovers_general_ability_and_keeps_the_domain(command, tmp_path):
    """The README's first command with every benchmark, and the values in its table with a tolerance for rounding."""
    ended = command("train", f"--config={ROOT / 'configs/quickstart.py'}", f"--workdir={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    table = {m[1]: [float(x) for x in re.findall(r"([\d.]+) ±", m[2])[:3]]
             for m in re.finditer(r"^ *(\w+: \w+) (.*)$", ended.out, re.M) if "±" in m[2]}  # fmt: skip
    teacher, specialised, recovered = table["general: covered"]
    assert (recovered - specialised) / (teacher - specialised) > 0.9
    teacher, specialised, recovered = table["general: uncovered"]
    assert (recovered - specialised) / (teacher - specialised) > 0.45
    _, specialised, recovered = table["domain: domain"]
    assert specialised > 90 and recovered / specialised > 0.95


def test_no_tracked_file_names_a_machine_path():
    """No tracked file has an absolute path of a developer's machine."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in files:
        if not name.endswith((".safetensors", "test_readme.py")):
            assert not re.search(r"(?<![\w.])/(work|tmp|home|root)/", (ROOT / name).read_text()), name
