"""Resolved configs as stored by runs: JSON, fingerprints, differences, and changes by field name."""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Sequence
from typing import Any

from etils import epath

from camopd_jax.config.build import build
from camopd_jax.config.consistency import checked
from camopd_jax.config.schema import MOVED, Config, MayChange, SftConfig, TrainConfig
from camopd_jax.errors import UserError


def to_json(config: Config) -> dict[str, Any]:
    """The resolved config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


_KINDS = {c.__name__: c for c in (TrainConfig, SftConfig)}


def from_json(file: epath.Path) -> Config:
    """The config of a work directory, from its config.json."""
    kind, values = read_stored(file)
    try:
        return build(_KINDS[kind], values, "config", MOVED)
    except (ValueError, KeyError) as error:
        raise UserError(f"{file}: not the config.json of a run; give the --workdir of one") from error


def read_stored(file: epath.Path) -> tuple[str, dict[str, Any]]:
    """The kind and the values of a config.json, unconverted: a file of an earlier version has other fields.

    Raises:
      UserError: if the file does not exist or is not the config of a run.
    """
    try:
        record = json.loads(file.read_text())
        kind, values = record["kind"], record["config"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file}: no such file; give the --workdir of a run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not the config.json of a run; give the --workdir of one") from error
    if kind not in _KINDS or not isinstance(values, dict):
        raise UserError(f"{file}: not the config.json of a run; give the --workdir of one")
    return kind, values


def with_new_fields(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config.json with the default of every field that an earlier version did not have.

    Unchanged if the file has values that this version refuses.
    """
    try:
        return to_json(build(_KINDS[kind], values, "config", MOVED))
    except UserError:
        return values


def _free_fields(cls: type, prefix: str = "") -> set[str]:
    """Names of the `Free` fields of a config class, as "optimizer.micro_batch"."""
    names: set[str] = set()
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if any(isinstance(mark, MayChange) for mark in getattr(hint, "__metadata__", ())):
            names.add(prefix + name)
        elif dataclasses.is_dataclass(hint):
            names |= _free_fields(typing.cast(type, hint), f"{prefix}{name}.")
    return names


_FREE = _free_fields(TrainConfig) | _free_fields(SftConfig)


def fingerprint(config: Config) -> str:
    """A hash of all fields that determine what a run computes, except its number of steps."""
    kept = _without_changeable(to_json(config))
    return hashlib.sha256(json.dumps([type(config).__name__, kept], sort_keys=True).encode()).hexdigest()[:16]


def different_fields(before: dict[str, Any], after: dict[str, Any], every: bool = False) -> list[str]:
    """Names of the fields that differ between two resolved configs.

    Args:
      every: compare all fields; False: only those that determine what a run computes.
    """
    if every:
        return _different(before, after, "config")
    return _different(_without_changeable(before), _without_changeable(after), "config")


def field_differences(configs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The fields that differ between several resolved configs, with the value in each config (None: no such field).

    Fields are named like "branches.recovery.scale" and sorted by name.
    """
    first, *others = configs
    names = sorted({name for other in others for name in _different(first, other, "config")})
    return {name.removeprefix("config."): [_value(values, name) for values in configs] for name in names}


def _value(values: Any, name: str) -> Any:
    """The value of a field named like "config.method.schedule"; None if there is none."""
    for part in name.split(".")[1:]:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _without_changeable(values: dict[str, Any]) -> dict[str, Any]:
    """A resolved config without its free fields. `steps` stays in it if the learning rate depends on it."""
    free = _FREE - ({"steps"} if values["optimizer"]["schedule"] != "constant" else set())
    order = {"branch_order": list(values["branches"])} if "branches" in values else {}
    return _without(values, free) | order


def _without(values: dict[str, Any], names: set[str], prefix: str = "") -> dict[str, Any]:
    """A config's values without the fields of these names."""
    return {
        key: _without(value, names, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in values.items()
        if prefix + key not in names
    }


def _different(before: dict[str, Any], after: dict[str, Any], where: str) -> list[str]:
    names = []
    for key in sorted(before.keys() | after.keys()):
        a, b = before.get(key), after.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += _different(a, b, f"{where}.{key}")
        elif a != b:
            names.append(f"{where}.{key}")
    return names


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The config with new values for fields named like "branches.recovery.scale".

    Raises:
      UserError: for a field that does not exist, and for invalid values.
    """
    values = to_json(config)
    for name, value in changes.items():
        *blocks, last = name.split(".")
        block = values
        for part in blocks:
            block = block[part]
        block[last] = value
    return checked(build(type(config), values, "config", MOVED))
