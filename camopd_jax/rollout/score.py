"""A forward pass over given answers, which reads a model's logits at each of their tokens.

`score` is the pure function. `score_batch` is the host's loop over it: it computes one micro-batch of rows of similar
length at a time, padded only to its longest row.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from camopd_jax.rollout.head import TokenFunction, apply_to_tokens, head_params, map_tokens
from camopd_jax.rollout.masks import length_mask
from camopd_jax.runtime import heap
from camopd_jax.runtime.buckets import MicroBatch, Widths, split_by_length
from camopd_jax.runtime.mesh import batch_shards, constrain, gather, platform, sharding, take_rows
from camopd_jax.runtime.tuning import compiler_options
from camopd_jax.types import LanguageModel, Params, Prompts, Record, Residuals, Sequences, TeacherRecord


class Reading(Protocol):
    """A function of a model's logits at each token. Hashable: a static argument of compiled functions."""

    @property
    def keeps_hidden(self) -> bool:
        """Whether to store the final hidden states [..., D] that predict the tokens too, as "hidden"."""

    @property
    def teacher(self) -> LanguageModel | None:
        """If given, the targets have this model's logits "teacher_logits" instead of its "hidden" states."""

    def __call__(self, logits: jax.Array, targets: Record) -> Record:
        """Returns arrays [..., ...] by name.

        Args:
          logits: float32[..., V]. targets: "tokens" int32[...], and the values of a teacher if they are given.
        """


@dataclass(frozen=True)
class LogProb:
    """Computes `log softmax(logits / temperature)[token]` in nats, float32[...], as "log_prob".

    With `best`, also the log-probability of the most likely token at each position, as "best".
    """

    temperature: float = 1.0
    best: bool = False
    keeps_hidden: ClassVar[bool] = False
    teacher: ClassVar[LanguageModel | None] = None

    def __call__(self, logits: jax.Array, targets: Record) -> Record:
        logits = logits / self.temperature
        chosen = jnp.take_along_axis(logits, targets["tokens"][..., None], axis=-1)
        if self.best:
            chosen = jnp.concatenate([chosen, jnp.max(logits, axis=-1, keepdims=True)], axis=-1)
        log_probs = chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return {"log_prob": log_probs[..., 0]} | ({"best": log_probs[..., 1]} if self.best else {})


LOG_PROB = LogProb()
NOTHING = TeacherRecord()  # no values of a teacher

# ------------------------------------------------------------------------------------- pure functions


def join(prompts: Prompts, tokens_BT: jax.Array) -> jax.Array:
    """Prompt and response of each row without padding between them: int32[B, P + T], right-padded."""
    prompt_slots, slots = prompts.tokens.shape[1], prompts.tokens.shape[1] + tokens_BT.shape[1]
    slot_BS = jnp.arange(slots)[None, :]
    from_response_BS = slot_BS - prompts.lengths[:, None]  # index of the response token in this slot
    prompt_BS = jnp.pad(prompts.tokens, ((0, 0), (0, slots - prompt_slots)))
    response_BS = jnp.take_along_axis(tokens_BT, jnp.clip(from_response_BS, 0, tokens_BT.shape[1] - 1), axis=1)
    joined_BS = jnp.where(from_response_BS < 0, prompt_BS, response_BS)
    return jnp.where(from_response_BS < tokens_BT.shape[1], joined_BS, 0)


def join_residuals(prompts: Prompts, residuals: Residuals, slots: int) -> Residuals:
    """The residual stream in the order of `join`, `[B, slots, D]` each, from the slots of a rollout's cache.

    After the last token that was in the cache, the values are arbitrary but finite.
    """
    slot_BS = jnp.arange(slots)[None, :]
    in_prompt_BS = slot_BS < prompts.lengths[:, None]
    cached_BS = jnp.where(in_prompt_BS, slot_BS, slot_BS - prompts.lengths[:, None] + prompts.tokens.shape[1])
    return tuple(jnp.take_along_axis(array, cached_BS[..., None], axis=1, mode="clip") for array in residuals)


def predicting_states(
    model: LanguageModel,
    params: Params,
    sequences: Sequences,
    slots: int | None = None,
    so_far: Params | None = None,
    residuals: Residuals = (),
) -> jax.Array:
    """The final hidden states `[B, T, D]` that predict each response token.

    Args:
      slots: padded length of prompt and answer together; None: P + T.
      so_far, residuals: as in `LanguageModel.hidden`, but `residuals` has the slots of the rollout's cache.
    """
    prompts, answer_slots = sequences.prompts, sequences.tokens.shape[1]
    joined_BS = join(prompts, sequences.tokens)[:, :slots]
    stream = join_residuals(prompts, residuals, joined_BS.shape[1])
    hidden_BSD = model.hidden(params, joined_BS, so_far, stream)
    predicts_BT = (prompts.lengths - 1)[:, None] + jnp.arange(answer_slots)[None, :]
    predicts_BT = jnp.minimum(predicts_BT, joined_BS.shape[1] - 1)
    return jnp.take_along_axis(hidden_BSD, predicts_BT[..., None], axis=1)


def score(
    model: LanguageModel,
    params: Params,
    sequences: Sequences,
    chunk: int = 0,
    reading: Reading = LOG_PROB,
    slots: int | None = None,
    given: TeacherRecord = NOTHING,
) -> Record:
    """`reading` of a model's logits at each response token, given its prompt and the tokens before it.

    Args:
      chunk: tokens per chip whose logits exist at a time; 0: `head.tokens_at_once`.
      reading: the function of each token's logits.
      slots: padded length of prompt and answer together; None: P + T.
      given: a teacher's values of the same tokens, which `reading` compares with.

    Returns:
      Arrays [B, T, ...] by name; 0 in padding.
    """
    hidden_BTD = predicting_states(model, params, sequences, slots)
    function, targets = _function(model, reading, given), given.tokens | {"tokens": sequences.tokens}
    record = map_tokens(function, params, hidden_BTD, targets, chunk, given.head)
    if reading.keeps_hidden:
        record |= {"hidden": hidden_BTD}
    mask_BT = length_mask(sequences.lengths, sequences.tokens.shape[1])
    return {name: jnp.where(mask_BT.reshape(*mask_BT.shape, *(1,) * (array.ndim - 2)), array, 0)
            for name, array in record.items()}  # fmt: skip


def _function(model: LanguageModel, reading: Reading, given: TeacherRecord) -> TokenFunction:
    """With the reading's teacher, if there are values of one."""
    return TokenFunction(model, reading, reading.teacher if given.tokens else None)


def score_rows(
    model: LanguageModel,
    params: Params,
    record: Record,
    sequences: Sequences,
    rows_M: jax.Array,
    given: TeacherRecord = NOTHING,
    *,
    widths: Widths,
    reading: Reading,
) -> Record:
    """Scores these rows and writes the results into `record`, which has the rows of the complete batch.

    Args:
      rows_M: row numbers in the batch; B means no row.
      given: as in `score`, of the complete batch.
    """
    cut = widths.answer_slots
    values = {name: array[:, :cut] for name, array in given.tokens.items()}
    of_rows = take_rows((sequences.replace(tokens=sequences.tokens[:, :cut]), values), rows_M, model.mesh)
    new = score(model, params, of_rows[0], widths.chunk, reading, widths.slots, given.replace(tokens=of_rows[1]))

    def put(array: jax.Array, of_rows: jax.Array) -> jax.Array:
        missing = array.shape[1] - widths.answer_slots
        of_rows = jnp.pad(of_rows, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2))
        array = array.at[rows_M].set(of_rows, mode="drop")
        return constrain(array, model.mesh, "batch", *(None,) * (array.ndim - 1))

    return jax.tree.map(put, record, new)


def empty_record(
    model: LanguageModel, params: Params, sequences: Sequences, reading: Reading, given: TeacherRecord = NOTHING
) -> Record:
    """Zeros with the shapes of the result of `score`."""
    tokens, head = sequences.tokens, head_params(model, params)
    name, axes = next(iter(model.head_axes.items()))
    hidden = jax.ShapeDtypeStruct((*tokens.shape, head[name].shape[axes.index("embed")]), model.dtype)
    function = functools.partial(apply_to_tokens, _function(model, reading, given))
    shapes = jax.eval_shape(function, head, hidden, given.tokens | {"tokens": tokens}, given.head)
    shapes |= {"hidden": hidden} if reading.keeps_hidden else {}
    place = None if model.mesh is None else sharding(model.mesh, "batch")
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=place), shapes)


# --------------------------------------------------------------------------------- the host's loop


def scoring(mesh: Mesh | None, tuned: bool = True) -> Any:
    """Compiled `score_rows`; `tuned` as in `score_batch`."""
    return _scoring(mesh, tuned)


@functools.cache
def _scoring(mesh: Mesh | None, tuned: bool) -> Any:
    rows = None if mesh is None else sharding(mesh, "batch")
    return jax.jit(
        score_rows,
        static_argnums=0,
        static_argnames=("widths", "reading"),
        donate_argnums=2,
        out_shardings=rows,
        compiler_options=compiler_options(mesh, tuned),
    )


def score_batch(
    model: LanguageModel,
    params: Params,
    sequences: Sequences,
    parts: Iterable[MicroBatch],
    chunk: int = 0,
    reading: Reading = LOG_PROB,
    given: TeacherRecord = NOTHING,
    tuned: bool = True,
) -> Record:
    """`score` of the rows in these micro-batches; other rows are 0.

    Args:
      tuned: whether a GPU's compiler tunes the products (`runtime.tuning`).
    """
    trim_heap(model.mesh)
    program = scoring(model.mesh, tuned)
    record = empty_record(model, params, sequences, reading, given)
    for part in parts:
        widths = part.widths(chunk)
        record = program(model, params, record, sequences, part.rows, given, widths=widths, reading=reading)
    return record


def trim_heap(mesh: Mesh | None) -> None:
    """On a CPU, returns freed memory to the system, before scoring and gradients, which need the most memory."""
    if platform(mesh) == "cpu":
        heap.trim()


def micro_batches(
    mesh: Mesh | None, sequences: Sequences, size: int, smallest: int, rows: np.ndarray | None = None
) -> Iterator[MicroBatch]:
    """`buckets.split_by_length` of a batch on the mesh: of these rows, or of all. Every process must call it."""
    prompt_lengths, lengths = gather((sequences.prompts.lengths, sequences.lengths))
    rows = np.arange(len(lengths)) if rows is None else rows
    widths = sequences.prompts.tokens.shape[1], sequences.tokens.shape[1]
    return split_by_length(prompt_lengths, lengths, rows, size, widths, smallest, batch_shards(mesh))
