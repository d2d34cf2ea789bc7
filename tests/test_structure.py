"""The structure of the package: folders import only from lower layers, and commands contain no library code."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "camopd_jax"
COMMON = {"errors", "types", "__init__"}  # modules beside the commands that every folder may import


def modules():
    for file in sorted(PACKAGE.rglob("*.py")):
        yield file, file.relative_to(PACKAGE).with_suffix("").parts


def part(parts):
    """The folder of a module. Modules outside the folders and the command `data.recipe` are separate parts."""
    return "data.recipe" if parts == ("data", "recipe") else parts[0]


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("camopd_jax"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "camopd_jax":
            is_package = (PACKAGE.parent / node.module.replace(".", "/")).is_dir()
            yield from [f"{node.module}.{a.name}" for a in node.names] if is_package else [node.module]


def graph():
    edges = {}
    for file, parts in modules():
        for name in imports(file):
            target = tuple(name.split(".")[1:])
            if target and target[0] != "__version__":
                edges.setdefault(part(parts), set()).add(part(target))
    return {name: targets - {name} for name, targets in edges.items()}


def test_folders_import_each_other_in_one_direction():
    order = list(TopologicalSorter(graph()).static_order())  # raises CycleError
    assert len(order) > 15


def test_imports_follow_the_layers_in_the_architecture():
    picture = (PACKAGE.parent / "docs" / "architecture.md").read_text().split("```")[1]
    rows = {name: i for i, line in enumerate(picture.splitlines()) for name in line[:18].split()}
    folders = {parts[0] for _, parts in modules() if len(parts) > 1}
    assert folders <= set(rows), f"docs/architecture.md does not show {folders - set(rows)}"
    for name, targets in graph().items():
        for target in targets & set(rows) if name in rows else ():
            assert rows[name] < rows[target], f"{name} imports {target}, which stands no lower in the picture"


def test_nothing_imports_a_command():
    commands = {parts[0] for _, parts in modules() if len(parts) == 1} - COMMON
    for name, targets in graph().items():
        assert not targets & commands, f"{name} imports the command {targets & commands}"


def test_files_are_small():
    for file, parts in modules():
        limit = 110 if len(parts) == 1 and parts[0] not in COMMON else 450
        assert len(file.read_text().splitlines()) <= limit, file
