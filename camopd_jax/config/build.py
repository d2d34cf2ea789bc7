"""Frozen dataclasses from ml_collections' ConfigDicts: complete defaults, checked types, names for every mistake."""

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict

from camopd_jax.errors import UserError


def default(cls: type) -> ml_collections.ConfigDict:
    """Every field of a config class at its default, for a config file to change.

    config = default(TrainConfig)
    config.optimizer.learning_rate = 1e-6
    """
    values = {}
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        value = None if _required(f) else f.default if f.default is not dataclasses.MISSING else f.default_factory()
        if _required(f) and dataclasses.is_dataclass(hints[f.name]):
            value = hints[f.name]()
        if dataclasses.is_dataclass(value):
            values[f.name] = default(type(value)) if _required(f) else _with_values(default(type(value)), value)
        elif value is None or type(None) in typing.get_args(hints[f.name]):  # stays open to None and to a value
            values[f.name] = config_dict.FieldReference(value, field_type=_placeholder_type(hints[f.name]))
        else:
            values[f.name] = value
    return ml_collections.ConfigDict(values)


def _with_values(config: ml_collections.ConfigDict, instance: Any) -> ml_collections.ConfigDict:
    for key, value in vars(instance).items():
        if dataclasses.is_dataclass(value):
            _with_values(config[key], value)
        elif value is not None:
            config[key] = value
    return config


def _placeholder_type(hint: Any) -> type:
    option = next((a for a in typing.get_args(hint) if a is not type(None)), hint)
    option = typing.get_origin(option) or option
    return object if dataclasses.is_dataclass(option) else option


def _required(f: dataclasses.Field) -> bool:
    return f.default is f.default_factory is dataclasses.MISSING


def build(cls: type, values: dict[str, Any], where: str) -> Any:
    """An instance of a config class from plain values.

    Raises:
      UserError: naming the field, after `where`, for unknown, missing and ill-typed ones.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the fields here are {', '.join(fields)}"
            raise UserError(f"{where}.{key} is not a field; {hint}")
    for name, f in fields.items():
        if _required(f) and values.get(name) is None:
            raise UserError(f"{where}.{name} is missing; set it in the config file or with --{where}.{name}=...")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, or a UserError that names the field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options[:-1]:
            try:
                return _convert(option, value, where)
            except UserError:
                continue
        return _convert(options[-1], value, where)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where} is {value!r}; it must be one of {', '.join(map(repr, args))}")
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return build(hint, value, where)
        raise UserError(f"{where} must be a block of {', '.join(f.name for f in dataclasses.fields(hint))}")
    if origin is tuple and isinstance(value, list | tuple):
        items = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(items) == len(value):
            return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(items, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    kind = getattr(hint, "__name__", str(hint)) if origin is None else str(hint).replace("typing.", "")
    raise UserError(f"{where} is {value!r}; it must be of type {kind}")
