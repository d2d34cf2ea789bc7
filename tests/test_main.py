"""`camopd NAME` is `python -m camopd_jax.NAME`."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_without_a_name_it_lists_every_command_of_the_readme(command):
    ended = command("__main__")
    assert ended.code == 0, ended.err
    listed = {line.split()[1] for line in ended.out.splitlines()}
    assert listed == set(re.findall(r"^\| `python -m camopd_jax\.([\w.]+)` \|", (ROOT / "README.md").read_text(), re.M))


def test_arguments_are_passed_to_the_command(command):
    ended = command("__main__", "export", "--workdir=nowhere", "--step=3")
    assert (ended.code, ended.out) == (2, "") and ended.err == "error: --out is missing; for example --out=recovered\n"


def test_an_unknown_command_is_one_line(command):
    ended = command("__main__", "trian")
    assert (ended.code, ended.err) == (2, "error: 'trian' is not a command; did you mean train?\n")


def test_the_installed_script():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"camopd": "camopd_jax.__main__:main"}
