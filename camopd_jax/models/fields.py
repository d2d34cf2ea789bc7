"""Limits of the fields of a `config.json`, and the fields without effect on the output."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from camopd_jax.errors import UserError
from camopd_jax.models.family import Fields

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Names, special tokens, regularisation in training, caches, file formats
_RECORDS = """
    architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id
    sep_token_id attention_dropout hidden_dropout pretraining_tp name_or_path _name_or_path id2label label2id
    num_labels problem_type return_dict output_attentions output_hidden_states is_llama_config tokenizer_class
    transformers.js_config _attn_implementation_autoset attn_implementation _flash_attn_2_enabled
    chunk_size_feed_forward is_encoder_decoder is_decoder unsloth_version unsloth_fixed hidden_act
    _sliding_window_pattern task_specific_params _commit_hash max_sequence_length gradient_checkpointing torchscript
    use_bfloat16 tf_legacy_loss finetuning_task prefix cross_attention_hidden_size tie_encoder_decoder
    tie_last_hidden_states resid_pdrop embd_pdrop residual_dropout use_parallel_embedding
    output_router_logits router_aux_loss_coef router_jitter_noise _attn_implementation _attn_implementation_internal
    use_flash_attention use_flash_attention_2 use_flash_attn max_seq_length max_seq_len seq_length model_max_length
    padding_side tokenizer_model_max_length tokenizer_padding_side
"""
# Fields of GenerationConfig, which earlier versions of transformers save in config.json. A test compares them with the
# installed version. They are not read from it, since a field of a later version may change a model's output.
_GENERATION = """
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind bad_words_ids
    begin_suppress_tokens cache_config cache_implementation compile_config constraints continuous_batching_config
    decoder_start_token_id disable_compile diversity_penalty do_sample dola_layers early_stopping
    encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_decoder_ids forced_eos_token_id
    _from_model_config generation_kwargs guidance_scale is_assistant length_penalty low_memory max_cache_len
    max_length max_matching_ngram_size max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_logits
    output_scores penalty_alpha prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits
    repetition_penalty return_dict_in_generate return_legacy_cache sequence_bias speculation_type stop_strings
    suppress_tokens target_lookbehind temperature token_healing top_h top_k top_p typical_p use_mtp
    watermarking_config
"""
HARMLESS = frozenset((_RECORDS + _GENERATION).split())


@dataclass(frozen=True)
class Kind:
    """A kind of values."""

    name: str
    holds: Callable[[Any], bool]

    def check(self, value: Any, field: str, where: str) -> None:
        """Raises UserError for a value of another kind; the message begins with `where` and names the field."""
        if not self.holds(value):
            raise UserError(f"{where}: field {field} is {value!r}; give {self.name}")

    def or_null(self) -> "Kind":
        return Kind(f"{self.name} or null", lambda value: value is None or self.holds(value))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_integer(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


COUNT = Kind("an integer > 0", lambda value: _is_integer(value) and value > 0)
NUMBER = Kind("a finite number > 0", lambda value: _is_number(value) and value > 0)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
FRACTION = Kind("a number > 0 and <= 1", lambda value: _is_number(value) and 0 < value <= 1)
NOT_NEGATIVE = Kind("a finite number >= 0", lambda value: _is_number(value) and value >= 0)
_INDEX = Kind("an integer >= 0", lambda value: _is_integer(value) and value >= 0)
_TEXT = Kind("a string", lambda value: isinstance(value, str))
_TEXTS = Kind("a list of strings", lambda value: isinstance(value, list) and all(map(_TEXT.holds, value)))
_BLOCK = Kind("an object", lambda value: isinstance(value, dict))
_BLOCKS = Kind("an object of objects", lambda value: isinstance(value, dict) and all(map(_BLOCK.holds, value.values())))
TOKENS = Kind(
    "an integer or a list of them", lambda v: all(map(_is_integer, v if isinstance(v, list) else [v]))
).or_null()
_BITS = Kind("a list of 0 and 1", lambda value: isinstance(value, list) and all(bit in (0, 1) for bit in value))
_ANY = Kind("anything", lambda value: True)

_OF_DEFAULT = {bool: FLAG, int: COUNT, float: NUMBER, str: _TEXT.or_null()}
_KINDS = {  # of fields whose kind is not the type of their default
    **dict.fromkeys(REQUIRED, COUNT),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window"), COUNT.or_null()),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), NUMBER.or_null()),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), _BLOCK.or_null()),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), _ANY),  # checked in `config._rope`
    "query_pre_attn_scalar": NUMBER,
    "partial_rotary_factor": FRACTION,
    "no_rope_layers": _BITS.or_null(),
    **dict.fromkeys(("max_window_layers", "num_kv_shared_layers", "hidden_size_per_layer_input"), _INDEX),
    "num_global_key_value_heads": COUNT.or_null(),
    "per_layer_config": _BLOCKS.or_null(),
    "initializer_range": NOT_NEGATIVE,
    "layer_types": _TEXTS.or_null(),
    "eos_token_id": TOKENS,
}


def check(fields: Fields, defaults: Fields, where: str) -> None:
    """Checks each field, and that head sizes fit together.

    Args:
      fields: of a config.json, with the defaults of its family.
      defaults: of the family; their types determine the kinds of fields that `_KINDS` does not have.
      where: the file's name in error messages.

    Raises:
      UserError: with the field and its value.
    """
    for field in REQUIRED:
        COUNT.check(fields.get(field), field, where)
    for field, value in fields.items():
        kind = _KINDS.get(field) or _OF_DEFAULT.get(type(defaults.get(field)), _ANY)
        kind.check(value, field, where)
    layers, bits = fields["num_hidden_layers"], fields.get("no_rope_layers")
    if bits is not None and len(bits) != layers:
        raise UserError(f"{where}: no_rope_layers has {len(bits)} numbers; give {layers}, one for each layer")
    width, heads, head_dim = fields["hidden_size"], fields["num_attention_heads"], fields["head_dim"]
    if head_dim is None and width % heads:
        raise UserError(f"{where}: num_attention_heads is {heads}, which does not divide hidden_size = {width}")
    if (head_dim or width // heads) % 2:
        name, value = ("head_dim", head_dim) if head_dim else ("hidden_size / num_attention_heads", width // heads)
        raise UserError(f"{where}: {name} is {value}; RoPE needs an even number")
    kv_heads = fields["num_key_value_heads"] or heads
    if heads % kv_heads:
        raise UserError(
            f"{where}: num_key_value_heads is {kv_heads}, which does not divide num_attention_heads = {heads}"
        )
