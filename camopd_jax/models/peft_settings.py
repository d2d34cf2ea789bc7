"""Reads the adapter_config.json of PEFT's LoRA adapters, and applies it to a base model."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camopd_jax.config.schema import Adapter
from camopd_jax.errors import UserError
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.disk import CHECKPOINT, Tensor, find_folder, read_json
from camopd_jax.models.fields import COUNT, NUMBER, Kind
from camopd_jax.models.names import EMBEDDING, HEAD
from camopd_jax.models.peft_tensors import TOKENS, are_equal, parts, read_tensors, row_count
from camopd_jax.models.rows import WeightRow
from camopd_jax.models.weights import file_rows
from camopd_jax.runtime.paths import in_home

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BASE = "base_model_name_or_path"
ROUTER = "router"
ALL_LINEAR = "all-linear"  # as a target: the matrices of all layers
MERGE = "merge the adapter into its base model (merge_and_unload of PEFT) and give that folder"

# Fields of adapter_config.json that do not change the output of a saved adapter: names, settings of its training,
# and of initialisations whose result is in the weights.
_RECORDS = frozenset(
    """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout
    eva_config corda_config lora_ga_config megatron_config megatron_core qalora_group_size runtime_config
    ensure_weight_tying _custom_modules target_modules_to_tie
    """.split()
)
_READ = frozenset(
    """
    r lora_alpha use_rslora target_modules exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern
    modules_to_save trainable_token_indices bias init_lora_weights
    """.split()
)
_NAMES = Kind("a string or a list of strings", lambda v: isinstance(v, str) or _are(str, v)).or_null()
_PATTERN = Kind("an object", lambda value: isinstance(value, dict)).or_null()
_LAYERS = Kind("an integer or a list of them", lambda v: _are(int, v if isinstance(v, list) else [v])).or_null()
_TOKENS = Kind(
    "a list of token ids, or an object of them",
    lambda value: all(_are(int, of) for of in (value.values() if isinstance(value, dict) else [value])),
).or_null()
_FLAG = Kind("true or false", lambda value: isinstance(value, bool))
_KINDS = {
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), _NAMES),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _PATTERN),
    "modules_to_save": Kind("a list of strings", lambda value: _are(str, value)).or_null(),
    TOKENS: _TOKENS,
    "layers_to_transform": _LAYERS,
    "use_rslora": _FLAG,
    "revision": Kind("a string", lambda value: isinstance(value, str)).or_null(),
}
# Initialisations that leave the base model as it is; PiSSA, OLoRA, CorDA and others change it when an adapter is loaded
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


@dataclass(frozen=True)
class AdapterSettings:
    """An adapter_config.json, applied to a base model."""

    fields: Mapping[str, Any]  # of the file
    ranks: Mapping[str, tuple[int, ...]]  # for modules such as "attention.query", the rank in each layer; 0: no adapter
    scales: Mapping[str, tuple[float, ...]]  # the same for the scale s; 0: no adapter
    saved: tuple[WeightRow, ...]  # the base model's parameters that the adapter replaces (`modules_to_save`)
    vocab_size: int  # rows of embedding and head: those of the base model, or of the adapter's own
    tied_head: bool  # whether embedding and head are one tensor

    @property
    def base_name(self) -> str:
        return str(self.fields[_BASE])

    def model_config(self, base: ModelConfig) -> ModelConfig:
        """The config of the base model with this adapter."""
        ranks = tuple((name, max(ranks)) for name, ranks in self.ranks.items())
        return dataclasses.replace(base, adapter=ranks, vocab_size=self.vocab_size, tied_head=self.tied_head)


# ------------------------------------------------------------------------------------------ the base


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def base_folder(folder: Path, files: Sequence[str] = CHECKPOINT) -> Path:
    """The folder of an adapter's base model, from the hub if necessary; any other folder itself.

    Args:
      files: patterns of the files to download.

    Raises:
      UserError: if adapter_config.json names no base model, or one that does not exist or is an adapter too.
    """
    if not is_adapter(folder):
        return folder
    file = folder / CONFIG
    fields = read_json(file)
    name, field = _base_name(fields, file), f"{file}: {_BASE}"
    base = find_folder(name, field, files, fields.get("revision"))
    if is_adapter(base):
        raise UserError(f"{field} is {name!r}, which is an adapter too; merge that one into its own base first")
    return base


def _base_name(fields: Mapping[str, Any], file: Path) -> str:
    """The name of the base model that adapter_config.json gives; an absolute path, if only its own folder has it."""
    name = fields.get(_BASE)
    if not isinstance(name, str) or not name:
        raise UserError(f"{file}: field {_BASE} is {name!r}; give the base model's folder or hub name")
    beside = file.parent / name
    return str(beside.resolve()) if not in_home(name).is_dir() and beside.is_dir() else name


# --------------------------------------------------------------------------------------- the settings


def read_settings(folder: Path, base: ModelConfig) -> AdapterSettings:
    """Reads an adapter_config.json for its base model.

    Raises:
      UserError: naming the file and field, for other methods than LoRA, variants of it that are not supported, unknown
        fields and invalid values.
    """
    file = folder / CONFIG
    fields = read_json(file)
    if fields.get("peft_type") != "LORA":
        raise UserError(f"{file}: field peft_type is {fields.get('peft_type')!r}; only LORA is supported: {MERGE}")
    for field, value in fields.items():
        known = field in _RECORDS or field in _READ
        if not known and value not in (None, False, [], {}):
            raise UserError(f"{file}: field {field} = {value!r} is not supported; {MERGE}")
        if field in _KINDS:
            _KINDS[field].check(value, field, str(file))
    if fields.get("bias", "none") != "none":
        raise UserError(f"{file}: field bias is {fields['bias']!r}; only 'none' is supported: {MERGE}")
    if (initial := fields.get("init_lora_weights", True)) not in _INITIALISATIONS:
        raise UserError(
            f"{file}: field init_lora_weights is {initial!r}, which changes the base model when the adapter is loaded; "
            + MERGE
        )
    fields = fields | {_BASE: _base_name(fields, file)}
    return _resolve(fields, base, str(file), read_tensors(folder / WEIGHTS) if (folder / WEIGHTS).exists() else {})


def new_settings(adapter: Adapter, base: ModelConfig, base_name: str, revision: str | None = None) -> AdapterSettings:
    """The settings of a new adapter, with the fields that PEFT needs to load it.

    Args:
      base_name: folder or hub name of the model on which it is trained.
      revision: of that model, if it is from the hub.

    Raises:
      UserError: naming a target that the model does not have.
    """
    modules = (row.hf_name.removesuffix(".weight") for row in file_rows(base) if _may_have_adapter(row))
    known = {module.split(".")[-1] for module in modules}
    for target in adapter.targets:
        if target not in known and target != ALL_LINEAR:
            raise UserError(
                f"config.adapter.targets names {target!r}; give some of {', '.join(sorted(known))}, or {ALL_LINEAR}"
            )
    targets = sorted(known) if ALL_LINEAR in adapter.targets else list(adapter.targets)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        _BASE: base_name,
        "revision": revision,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    return _resolve(fields, base, "config.adapter", {})


def _resolve(
    fields: Mapping[str, Any], base: ModelConfig, where: str, on_disk: Mapping[str, Tensor]
) -> AdapterSettings:
    """Applies the patterns of an adapter_config.json to a model's modules, as PEFT does."""
    rank, alpha = fields.get("r", 8), fields.get("lora_alpha", 8)
    rank_pattern, alpha_pattern = fields.get("rank_pattern") or {}, fields.get("alpha_pattern") or {}
    ranks: dict[str, tuple[int, ...]] = {}
    scales: dict[str, tuple[float, ...]] = {}
    base = _with_own_vocabulary(fields, base, where, on_disk)
    if base.tensor_prefix:
        raise UserError(f"{where}: an adapter of a multimodal model is not supported; {MERGE}")
    with _naming_patterns(where):
        for row in file_rows(base):
            modules = [name.removesuffix(".weight") for name in row.names(base.num_layers)]
            targeted = [_is_target(fields, module) for module in modules]
            if row.path[-1] != "kernel":
                if row.path in (("embedding",), ("head",)) and any(targeted) and not _all_linear(fields):
                    raise UserError(f"{where}: an adapter of {modules[0]} is not supported; {MERGE}")
                continue
            if any(targeted) and not row.stacked:
                raise UserError(f"{where}: an adapter of {modules[0]} is not supported; {MERGE}")
            if not any(targeted) or not _may_have_adapter(row, fused=True):
                continue
            if row.part:
                fused = f"{where}: an adapter of {modules[0]}, one tensor of several matrices, is not supported"
                raise UserError(f"{fused}; {MERGE}")
            of_layers = [_by_pattern(rank_pattern, module, rank) for module in modules]
            alphas = [_by_pattern(alpha_pattern, module, alpha) for module in modules]
            for r, a in zip(of_layers, alphas, strict=True):
                COUNT.check(r, "r (or rank_pattern)", where)
                NUMBER.check(a, "lora_alpha (or alpha_pattern)", where)
            module = row.module
            power = 0.5 if fields.get("use_rslora") else 1.0
            ranks[module] = tuple(r * on for r, on in zip(of_layers, targeted, strict=True))
            pairs = zip(of_layers, alphas, targeted, strict=True)
            scales[module] = tuple(a / r**power * on for r, a, on in pairs)
    if not ranks:
        raise UserError(f"{where}: field target_modules = {fields.get('target_modules')!r} matches no module")
    saved = tuple(_saved_rows(fields, base, where, on_disk))
    return AdapterSettings(fields, ranks, scales, saved, base.vocab_size, base.tied_head)


def _may_have_adapter(row: WeightRow, fused: bool = False) -> bool:
    """Whether a row is a layer's matrix outside routers and experts, which are no linear modules for PEFT.

    Args:
      fused: whether one of several matrices in one tensor counts.
    """
    alone = not row.experts and ROUTER not in row.path
    return row.path[-1] == "kernel" and row.stacked and alone and (fused or not row.part)


@contextlib.contextmanager
def _naming_patterns(where: str) -> Iterator[None]:
    """Converts an invalid regular expression of adapter_config.json to a UserError."""
    try:
        yield
    except re.error as error:
        raise UserError(f"{where}: {error.pattern!r} is not a regular expression ({error})") from error


def _all_linear(fields: Mapping[str, Any]) -> bool:
    targets = fields.get("target_modules")
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def _is_target(fields: Mapping[str, Any], module: str) -> bool:
    """Whether an adapter targets a module such as model.layers.0.mlp.up_proj, by the rules of PEFT.

    `peft.tuners.tuners_utils.check_target_module_exists`.
    """
    excluded, targets = fields.get("exclude_modules"), fields.get("target_modules")
    if isinstance(excluded, str) and excluded and re.fullmatch(excluded, module):
        return False
    if isinstance(excluded, list) and _ends(module, excluded):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in fields.get("modules_to_save") or ()):
        return False
    if _all_linear(fields):
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if not targets or not _ends(module, targets):
        return False
    layers, patterns = fields.get("layers_to_transform"), fields.get("layers_pattern")
    if module in targets or layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns or [r"[^.]*"]
    matches = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns)
    number = next((int(match[1]) for match in matches if match), None)
    return number is not None and number in (layers if isinstance(layers, list) else [layers])


def _ends(module: str, names: list[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that matches the end of a module's name (`peft.utils.other.get_pattern_key`)."""
    key = next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)
    return default if key is None else pattern[key]


def _with_own_vocabulary(
    fields: Mapping[str, Any], base: ModelConfig, where: str, on_disk: Mapping[str, Tensor]
) -> ModelConfig:
    """The base model with the embedding and head of an adapter's file: their rows, and whether they are one tensor."""
    listed = [name for name in (EMBEDDING, HEAD) if _saves(fields.get("modules_to_save") or (), name)]
    present = [name for name in (EMBEDDING, HEAD) if parts(on_disk, name)]
    if not present:
        return base
    tied = base.tied_head
    if tied and len(present) == 2:
        tied = are_equal(on_disk)
    elif tied and (listed or present == [HEAD]):
        raise UserError(
            f"{where}: modules_to_save has the embedding or the head, but not both, of a model in which they are one "
            f"tensor (tie_word_embeddings); {MERGE}"
        )
    rows = {name: count for name in present if (count := row_count(on_disk, name)) is not None}
    second = base.per_layer_input
    if second is not None and max(rows.values(), default=0) > second.vocab_size:
        raise UserError(
            f"{where}: the embedding has {max(rows.values())} rows, but the base model's embedding for each layer only "
            f"{second.vocab_size}; {MERGE}"
        )
    if (
        not tied
        and len(counts := {base.vocab_size if name not in rows else rows[name] for name in (EMBEDDING, HEAD)}) > 1
    ):
        raise UserError(f"{where}: embedding and head have different numbers of rows, {sorted(counts)}; {MERGE}")
    return dataclasses.replace(base, vocab_size=next(iter(rows.values()), base.vocab_size), tied_head=tied)


def _saved_rows(
    fields: Mapping[str, Any], base: ModelConfig, where: str, on_disk: Mapping[str, Tensor]
) -> Iterator[WeightRow]:
    """The rows of the parameters that an adapter replaces: those it lists, and embedding and head if it has them."""
    listed = fields.get("modules_to_save") or ()
    present = {name for name in (EMBEDDING, HEAD) if parts(on_disk, name)}
    for row in file_rows(base):
        names = row.names(base.num_layers)
        saved = [_saves(listed, name) or name in present for name in names]
        if any(saved) and not all(saved):
            raise UserError(f"{where}: modules_to_save matches {names[0]} in some layers only; {MERGE}")
        if all(saved):
            yield row


def _saves(listed: Any, tensor: str) -> bool:
    """Whether `modules_to_save` has the module of a tensor: PEFT compares the ends of names."""
    return any(tensor.rpartition(".")[0].endswith(name) for name in listed)
