"""Converts ml_collections' ConfigDicts to frozen dataclasses, with defaults and checks of types and limits."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import ml_collections
from annotated_types import Ge, Gt, Le, Lt
from ml_collections import config_dict

from camopd_jax.errors import UserError

_LIMITS = {
    Gt: (">", lambda value, limit: value > limit.gt, lambda limit: limit.gt),
    Ge: (">=", lambda value, limit: value >= limit.ge, lambda limit: limit.ge),
    Lt: ("<", lambda value, limit: value < limit.lt, lambda limit: limit.lt),
    Le: ("<=", lambda value, limit: value <= limit.le, lambda limit: limit.le),
}


_UNIONS = (typing.Union, types.UnionType)


def default(cls: type) -> ml_collections.ConfigDict:
    """A ConfigDict with the default of every field of a config class, for a config file to change.

    config = default(TrainConfig)
    config.optimizer.learning_rate = 1e-6
    """
    hints = typing.get_type_hints(cls)
    return _config_dict({f.name: _default_value(f, hints[f.name]) for f in dataclasses.fields(cls)})


def _default_value(field: dataclasses.Field[Any], hint: Any) -> Any:
    if _required(field):
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return default(hint)
        return config_dict.FieldReference(None, field_type=_reference_type(hint))
    if field.default_factory is not dataclasses.MISSING:
        return _to_config(field.default_factory(), hint)
    return _to_config(field.default, hint)


def _to_config(value: Any, hint: Any) -> Any:
    """A default in the form for a ConfigDict. A field that may be None accepts both None and a value."""
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        return _config_dict({name: _to_config(part, hints[name]) for name, part in vars(value).items()})
    if isinstance(value, dict) and _is_table(hint):
        return _config_dict({name: _to_config(part, typing.get_args(hint)[1]) for name, part in value.items()})
    if value is None or type(None) in typing.get_args(hint):
        return config_dict.FieldReference(value, field_type=_reference_type(hint))
    if typing.get_origin(hint) in _UNIONS:  # a number or a word
        return config_dict.FieldReference(value, field_type=object)
    return value


def _config_dict(values: dict[str, Any]) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(values, sort_keys=False)  # branches keep their order in a cycle


def _is_table(hint: Any) -> bool:
    """Whether a type is a dict of config classes by name."""
    return typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1])


def _reference_type(hint: Any) -> type:
    option = next((a for a in typing.get_args(hint) if a is not type(None)), hint)
    option = typing.get_args(option)[0] if typing.get_origin(option) is Annotated else option
    option = typing.get_origin(option) or option
    return object if dataclasses.is_dataclass(option) else option


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def make_room(hint: Any, config: ml_collections.ConfigDict, path: Sequence[str], is_none: bool) -> None:
    """Prepares a config for a flag that sets the field `path`: ml_collections only sets existing fields, by their type.

    Adds missing blocks and fields, and changes the type of a field that is set to None. Unknown names are ignored:
    `build` or ml_collections refuse them.

    Args:
      hint: the type of `config`: a config class, or a dict.
      is_none: whether the flag sets None.
    """
    name, *inner = path
    if dataclasses.is_dataclass(hint):
        hint = typing.get_type_hints(hint).get(name)
    elif not _is_table(hint) or name in config:
        hint = typing.get_args(hint)[1]
    else:
        return
    options = typing.get_args(hint) or (hint,)
    if inner:
        block = next((h for h in (hint, *options) if dataclasses.is_dataclass(h) or typing.get_origin(h) is dict), None)
        if block is None:
            return
        value = config.get(name)
        if not isinstance(value, ml_collections.ConfigDict):
            empty = default(block) if isinstance(block, type) else _config_dict({})
            _replace(config, name, _config_dict(value) if isinstance(value, dict) else empty)
        make_room(block, config[name], inner, is_none)
    elif hint is not None and (
        name not in config or config.get_type(name) is type(None) or (is_none and type(None) in options)
    ):
        kind = next((h for h in options if h in (str, int, float, bool) and not is_none), object)  # object: a literal
        _replace(config, name, config_dict.FieldReference(config.get(name), field_type=kind))


def with_fields(cls: type, fields: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A ConfigDict with the default of every field except these, which may be nested. `build` checks them.

    >>> from camopd_jax.config.schema import Sampling
    >>> with_fields(Sampling, {"top_p": 0.9}).to_dict()
    {'temperature': 1.0, 'top_k': 0, 'top_p': 0.9, 'min_p': 0.0}
    """
    config = default(cls)
    _set_fields(cls, config, fields, ())
    return config


def _set_fields(cls: type, config: ml_collections.ConfigDict, fields: Mapping[str, Any], path: tuple[str, ...]) -> None:
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            _set_fields(cls, config, value, (*path, name))
            continue
        make_room(cls, config, (*path, name), value is None)
        block = config
        for part in path:
            if not isinstance(block.get(part), ml_collections.ConfigDict):
                _replace(block, part, _config_dict({}))
            block = block[part]
        try:
            block[name] = value
        except TypeError:  # `build` names the field and its type
            _replace(block, name, value)


def _replace(config: ml_collections.ConfigDict, name: str, value: Any) -> None:
    with config.unlocked():
        if name in config:
            del config[name]
        config[name] = value


def build(
    cls: type, values: Mapping[str, Any], where: str, moved: Mapping[str, str] = types.MappingProxyType({})
) -> Any:
    """Builds an instance of a config class from plain values.

    Args:
      moved: the new name of each field of earlier versions.

    Raises:
      UserError: naming the field, after `where`, for unknown and missing fields, wrong types and numbers beyond their
        limits.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(unknown_field(f"{where}.{key}", key, fields, moved))
    for name, f in fields.items():
        if _required(f) and values.get(name) is None:
            raise UserError(f"{where}.{name} is missing; set it in the config file or with --{where}.{name}=...")
    hints = typing.get_type_hints(cls, include_extras=True)
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}", moved) for key, value in values.items()})


def from_flags(cls: type, **values: Any) -> Any:
    """An instance of a config class from the values of flags with the names of its fields.

    Raises:
      UserError: naming the flag whose value is beyond the limits of its field.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    return cls(**{name: _convert(hints[name], value, f"--{name}", {}) for name, value in values.items()})


def unknown_field(where: str, name: str, fields: Iterable[str], moved: Mapping[str, str]) -> str:
    """The error message for a field that does not exist."""
    fields = list(fields)
    if name in moved:
        return f"{where} is not a field any more; it is now config.{moved[name]}"
    near = difflib.get_close_matches(name, fields, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the fields here are {', '.join(fields)}"
    return f"{where} is not a field; {hint}"


def _convert(hint: Any, value: Any, where: str, moved: Mapping[str, str]) -> Any:
    """`value` converted to the type `hint`; raises a UserError that names the field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        return _convert_optional(args, value, where, moved)
    if origin is Annotated:
        return _within_limits(_convert(args[0], value, where, moved), args[1:], where)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where} is {value!r}; it must be one of {', '.join(map(repr, args))}")
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            return build(hint, value, where, moved)
        names = ", ".join(f.name for f in dataclasses.fields(hint))
        raise UserError(f"{where} must be a block with the fields {names}")
    if origin is tuple and isinstance(value, list | tuple):
        items = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(items) == len(value):
            pairs = zip(items, value, strict=True)
            return tuple(_convert(item, part, f"{where}[{i}]", moved) for i, (item, part) in enumerate(pairs))
    if origin is dict and isinstance(value, Mapping):
        if not _is_table(hint):
            return dict(value)
        return {name: _convert(args[1], part, f"{where}.{name}", moved) for name, part in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where} is {value!r}; give a finite number")
        return value
    kind = getattr(hint, "__name__", str(hint)) if origin is None else str(hint).replace("typing.", "")
    raise UserError(f"{where} is {value!r}; it must be of type {kind}")


def _convert_optional(options: tuple[Any, ...], value: Any, where: str, moved: Mapping[str, str]) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    for option in options[:-1]:
        try:
            return _convert(option, value, where, moved)
        except UserError:
            continue
    try:
        return _convert(options[-1], value, where, moved)
    except UserError as error:
        literals = [option for option in options[:-1] if typing.get_origin(option) is Literal]
        words = [repr(word) for option in literals for word in typing.get_args(option)]
        raise UserError(" or ".join([str(error), *words])) from None


def _within_limits(value: Any, limits: tuple[Any, ...], where: str) -> Any:
    bounds = [limit for limit in limits if type(limit) in _LIMITS]
    if all(_LIMITS[type(limit)][1](value, limit) for limit in bounds):
        return value
    described = " and ".join(f"{_LIMITS[type(b)][0]} {_LIMITS[type(b)][2](b)}" for b in bounds)
    note = "".join(f" ({limit})" for limit in limits if isinstance(limit, str))
    raise UserError(f"{where} is {value!r}; give a number {described}{note}")
