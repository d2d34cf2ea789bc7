"""Config files in YAML: the fields of a config that differ from their defaults, in nested blocks."""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from camopd_jax.errors import UserError

SUFFIXES = (".yaml", ".yml")


class _Loader(yaml.SafeLoader):
    """Reads numbers and truth values by YAML 1.2: 1e-6 is a number and `off` a text, unlike in PyYAML's YAML 1.1."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}


for _tag, _form, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("null", r"~|null|Null|NULL|None|", [*"~nN", ""]),
    ("int", r"[-+]?[0-9]+", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), _first)


def read_yaml(file: Path) -> dict[str, Any]:
    """The fields in a YAML file.

    Raises:
      OSError: if it cannot be read.
      UserError: naming the line, if it is not YAML or not a mapping.
    """
    try:
        fields = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise UserError(f"{where}: not YAML ({getattr(error, 'problem', None) or error})") from error
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise UserError(f"{file}: give the fields of a config as `name: value`")
    return fields
