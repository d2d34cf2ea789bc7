"""Config files in YAML or JSON: the fields of a config that differ from their defaults, in nested blocks."""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from camopd_jax.errors import UserError

SUFFIXES = (".yaml", ".yml", ".json")


class _Loader(yaml.SafeLoader):
    """Reads numbers and truth values by YAML 1.2: 1e-6 is a number and `off` a text, unlike in PyYAML's YAML 1.1."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}


for _tag, _form, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("null", r"~|null|Null|NULL|None|", [*"~nN", ""]),
    ("int", r"[-+]?[0-9]+", [*"-+0123456789"]),
    ("merge", r"<<", ["<"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), _first)


def read_yaml(file: Path) -> dict[str, Any]:
    """The fields in a YAML or JSON file; of a run's config.json, the config.

    Raises:
      OSError: if it cannot be read.
      UserError: naming the line, if it is not YAML or not a mapping, or for a name that no field can have.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        loader = _Loader(text.replace("\t", " ") if file.suffix == ".json" else text)  # YAML has no tabs between values
        root = loader.get_single_node()
        _check_names(root, file)
        fields = None if root is None else loader.construct_document(root)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise UserError(f"{where}: not YAML ({getattr(error, 'problem', None) or error})") from error
    if not isinstance(fields, dict):
        raise UserError(f"{file}: give the fields of a config as `name: value`")
    return fields["config"] if fields.keys() == {"kind", "config"} else fields


def _check_names(node: yaml.Node | None, file: Path, above: tuple[yaml.Node, ...] = ()) -> None:
    """Refuses names that are given twice, of which YAML keeps the last one, and those that no field can have."""
    if any(node is outer for outer in above):
        raise UserError(f"{file}:{above[-1].start_mark.line + 1}: an alias (*) is inside of what it stands for")
    lines: dict[str, int] = {}
    values = node.value if isinstance(node, yaml.SequenceNode) else []
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            pass
        elif key.tag != "tag:yaml.org,2002:str":
            raise UserError(
                f"{file}:{line}: {key.value!r:.80} is not a name; give the fields of a config as `name: value`"
            )
        elif "." in key.value:
            outer, _, inner = key.value.partition(".")
            raise UserError(f"{file}:{line}: {key.value} has to be in blocks, as in `{outer}: {{{inner}: ...}}`")
        elif key.value in lines:
            raise UserError(f"{file}:{line}: {key.value} is also given in line {lines[key.value]}; remove one of them")
        lines[key.value] = line
        values = [*values, value]
    for value in values:
        _check_names(value, file, (*above, node))
