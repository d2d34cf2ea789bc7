"""The shape of the package: imports run downward only."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "camopd_jax"

# From the ground up. A module imports from its own layer and below; the parts of one layer marked * not each other.
LAYERS = [
    ["errors", "freed"],
    ["configdict"],
    ["types", "masked", "sharding", "buckets", "processes", "distributed", "jsonl", "config", "resolved", "controls"],
    ["optim"],
    ["steps", "models", "data", "evals"],
    ["analysis"],
    ["metrics", "checkpoint"],
    ["answering", "piecewise", "residency"],
    ["phases", "engine", "cli"],
    ["planning", "evaluation", "branches"],
    ["diagnosis"],
    ["export"],
    ["host", "reporting"],
    [
        "train",
        "sft",
        "generate",
        "score",
        "evaluate",
        "lm_eval",
        "interpolate",
        "analyze",
        "report",
        "plan",
        "doctor",
        "data.recipe",
    ],
    ["compare"],
]
STRANGERS = {"steps", "models", "data", "evals"}


def part(name):
    return name if name == "data.recipe" else name.split(".")[0]  # a command that lies beside its data


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("camopd_jax"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "camopd_jax":
            names = [f"{node.module}.{a.name}" for a in node.names]
            is_package = (PACKAGE.parent / node.module.replace(".", "/")).is_dir()
            yield from names if is_package else [node.module]


def test_every_module_has_a_layer_and_imports_downward():
    height = {name: level for level, names in enumerate(LAYERS) for name in names}
    seen = 0
    for file in PACKAGE.rglob("*.py"):
        module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        if module.endswith("__init__"):
            continue
        ours = part(module)
        assert ours in height, f"{module} has no layer"
        for name in imports(file):
            theirs = part(name.removeprefix("camopd_jax."))
            if theirs in ("__version__", "camopd_jax"):
                continue
            assert height[theirs] <= height[ours], f"{module} imports {theirs} from above"
            if ours in STRANGERS and theirs in STRANGERS:
                assert ours == theirs, f"{module} imports {theirs}: the model and the data are arguments of a step"
            seen += 1
    assert seen > 50


def test_files_stay_small_enough_to_hold_in_the_head():
    for file in PACKAGE.rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 450, file
