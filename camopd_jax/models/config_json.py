"""The fields of a `config.json`: those of its text model, checked, with the defaults of its family."""

import re
from typing import Any

from camopd_jax.errors import UserError
from camopd_jax.models import fields as limits
from camopd_jax.models.families import FAMILIES
from camopd_jax.models.family import Family, Fields
from camopd_jax.models.multimodal import MULTIMODAL

_ROPE_FIELDS = {"rope_theta", "rope_scaling", "rope_parameters"}
_REPLACED = {"sliding_window_pattern"}  # fields that are not read if there are layer_types


def is_multimodal(config: Fields) -> bool:
    """Whether the model of a config.json has modalities besides text."""
    return isinstance(config.get("model_type"), str) and config["model_type"] in MULTIMODAL


def text_config(config: Fields, where: str = "config.json") -> tuple[Fields, str]:
    """The fields of the text model of a config.json, and their place for error messages."""
    if not is_multimodal(config):
        return config, where
    multimodal, text = MULTIMODAL[config["model_type"]], config.get("text_config")
    if not isinstance(text, dict):
        raise UserError(f"{where}: field text_config is {text!r}; give an object")
    known = multimodal.fields | limits.HARMLESS | {"text_config"}
    if odd := [f for f, value in config.items() if f not in known and value not in (None, False, [], {})]:
        raise UserError(
            f"{where}: field {odd[0]} = {config[odd[0]]!r} is not known for {config['model_type']}; if it does not "
            "change the model's output, delete it from the file, else this model is not supported"
        )
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
    return {"model_type": multimodal.text} | text | tied, f"{where}: text_config"


def checked_fields(config: Fields, where: str) -> tuple[Fields, Family]:
    """Checks the fields of a config.json; returns them with the defaults of its family, and the family.

    Raises:
      UserError: as `from_hf`.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        near = name.lower() if isinstance(name, str) else _type_of_class(config.get("architectures"))
        hint = f"; did you mean {near!r}?" if near in FAMILIES else ""
        raise UserError(
            f"{where}: model_type {name!r} is not supported; supported are {', '.join([*FAMILIES, *MULTIMODAL])}{hint}"
        )
    family = FAMILIES[name]
    known = family.defaults.keys() | {*limits.REQUIRED} | limits.HARMLESS | _ROPE_FIELDS
    config = {family.renamed.get(field, field): value for field, value in config.items()}
    if config.get("layer_types") is not None:
        config = {field: value for field, value in config.items() if field not in _REPLACED}
    for field, value in config.items():
        if field in family.fixed:
            if value not in (None, family.fixed[field]):
                raise UserError(f"{where}: field {field} is {value!r}; {name} supports only {family.fixed[field]!r}")
        elif field not in known and not _is_neutral(field, value, config):
            raise UserError(
                f"{where}: field {field} = {value!r} is not known for {name}; if it does not change the model's "
                "output, delete it from the file, else this model is not supported"
            )
    fields = {**family.defaults, **{field: value for field, value in config.items() if field in known}}
    limits.check(fields, family.defaults, where)
    return fields, family


def _type_of_class(architectures: Any) -> str:
    """The model_type that a class such as LlamaForCausalLM most likely has."""
    name = str(architectures[0] if isinstance(architectures, list) and architectures else "")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.removesuffix("ForCausalLM")).lower()


def _is_neutral(field: str, value: Any, config: Fields) -> bool:
    """Whether a field that a family does not have has a value that changes nothing."""
    if field == "partial_rotary_factor":
        return value in (None, 1)
    if field == "layer_types":
        return value is None or (isinstance(value, list) and set(map(str, value)) <= {"full_attention"})
    if field == "max_window_layers":
        return not config.get("use_sliding_window") and not config.get("sliding_window")
    return value in (None, False, [], {})


def layer_types(fields: Fields, family: Family, where: str) -> list[str]:
    """ "full_attention" or "sliding_attention" for each layer."""
    layers, types = fields["num_hidden_layers"], fields.get("layer_types")
    if types is None:
        types = ["sliding_attention" if family.slides(i, fields) else "full_attention" for i in range(layers)]
    if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{where}: layer_types {types} must name full_attention or sliding_attention for {layers} layers"
        )
    window, used = fields.get("sliding_window"), fields.get("use_sliding_window", True)
    return types if used and window is not None else ["full_attention"] * layers
