"""The arrays that are passed through one step, and the letters of their axes.

Axis letters, in names (`tokens_BT`) and comments (`int32[B, T]`) alike:

    B  sequences of a batch (rows)       L  layers
    P  prompt slots, right-padded        D  model width ("embed")
    T  response slots, right-padded      H  query heads
    S  sequence slots (prompt then       G  key/value heads
       response without a hole), or      K  head width
       slots of a KV cache               F  feed-forward width
    V  vocabulary                        M  rows of one micro-batch

A row's real tokens come first, then its padding. Masks are computed from lengths, never from token ids,
because the pad id may equal an EOS id. Gaps are always `log teacher - log student`, in nats.
"""

from typing import Any, Protocol

import jax
from flax import struct
from jax.sharding import Mesh

Params = Any  # a nested dict of arrays, see models/weights.py
# The residual stream: what enters each layer, and what leaves the last; L + 1 arrays [B, S, D]. (): not kept
Residuals = tuple[jax.Array, ...]
Record = dict[str, jax.Array]  # what an objective keeps from the teacher for each token: arrays [B, T, ...] by name


class Prompts(struct.PyTreeNode):
    """Tokenised prompts."""

    tokens: jax.Array  # int32[B, P], right-padded
    lengths: jax.Array  # int32[B], at least 1


class PromptBatch(struct.PyTreeNode):
    """One batch of a stream. The teacher may read the same request under another template."""

    student: Prompts  # what the student answers
    teacher: Prompts  # the same request as the teacher reads it; often equal
    index: jax.Array  # int32[B], the prompt's row in its source: names the row's random key


class Sequences(struct.PyTreeNode):
    """Prompts with given answers: what a model scores, and learns from."""

    prompts: Prompts
    tokens: jax.Array  # int32[B, T], right-padded; the closing tokens of a turn are part of the answer
    lengths: jax.Array  # int32[B]


class Rollout(struct.PyTreeNode):
    """The student's own answers."""

    tokens: jax.Array  # int32[B, T], right-padded; a closing EOS is part of the answer
    lengths: jax.Array  # int32[B], 1..T
    log_probs: jax.Array  # float32[B, T], log pi(token) at temperature 1, unfiltered; 0 in padding
    entropy: jax.Array  # float32[B], mean entropy in nats of the answer's distributions
    stopped: jax.Array  # bool[B], True: ended by EOS; False: cut at the cap
    residuals: Residuals = ()  # of the tokens but the last, in the slots of the cache that they were made with

    def after(self, prompts: Prompts) -> Sequences:
        """The answers behind their prompts."""
        return Sequences(prompts, self.tokens, self.lengths)


class LogProbs(struct.PyTreeNode):
    """Log-probabilities of the sampled tokens under both models; 0 in padding."""

    student: jax.Array  # float32[B, T]
    teacher: jax.Array  # float32[B, T]

    @property
    def gap(self) -> jax.Array:
        """float32[B, T], `log teacher - log student` in nats (Eq 1)."""
        return self.teacher - self.student


class Selection(struct.PyTreeNode):
    """Which answers are trained on (methods Eq 6-8)."""

    mass: jax.Array  # float32[B], the gap mass of each answer, >= 0
    order: jax.Array  # int32[B], rows by falling gap mass, ties by row
    count: jax.Array  # int32[], the first `count` rows of `order` are trained on
    weights: jax.Array  # float32[B], 1 for a selected row, else 0


class TeacherRecord(struct.PyTreeNode):
    """What an objective keeps of the teacher until the gradient."""

    tokens: Record = struct.field(default_factory=dict)  # at each token, beside the token's log-probability
    head: Params = struct.field(default_factory=dict)  # its output head, where "hidden" states are among them


class Batch(struct.PyTreeNode):
    """A branch's answers in one step, scored and ranked."""

    prompts: Prompts  # as the student read them
    index: jax.Array  # int32[B], the prompts' rows in their source
    rollout: Rollout
    log_probs: LogProbs
    selection: Selection
    teacher: TeacherRecord = TeacherRecord()

    def after_gradient(self) -> "Batch":
        """What is still needed once the gradient is there."""
        return self.replace(rollout=self.rollout.replace(residuals=()), teacher=TeacherRecord())


class TrainState(struct.PyTreeNode):
    """All that an update changes: what is trained, and what the optimizer remembers of it."""

    step: jax.Array  # int32[], updates done or skipped
    params: Params  # those that are trained; frozen ones are no part of it
    moments: dict[str, Any]  # Adam state: {"shared": ...}, or one for each branch by its name


class KVCache(struct.PyTreeNode):
    """What is kept of earlier tokens. A slot whose position is `EMPTY` is attended by nobody."""

    keys: tuple[jax.Array, ...]  # of each layer, [B, G, S, K]
    values: tuple[jax.Array, ...]  # the same
    positions: jax.Array  # int32[B, S], position of each slot's token in its row, or EMPTY
    residuals: Residuals = ()


EMPTY = 2**30  # a position later than any token's: a causal mask shuts it out by itself


class LanguageModel(Protocol):
    """What the steps ask of a model. Hashable: it is a static argument of every compiled function.

    `models.transformer.Model` is the one implementation.
    """

    @property
    def mesh(self) -> Mesh | None:
        """Where its arrays lie; None: one device."""

    @property
    def dtype(self) -> str:
        """Of activations and matrix products."""

    @property
    def head_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of the parameters that `logits` reads."""

    def __hash__(self) -> int: ...

    def on(self, mesh: Mesh | None) -> "LanguageModel":
        """The same model on another mesh of the same devices."""

    def hidden(
        self, params: Params, tokens_BS: jax.Array, so_far: Params | None = None, residuals: Residuals = ()
    ) -> jax.Array:
        """Final hidden states `[B, S, D]` of whole rows; causal, so right-padding changes nothing.

        With `so_far`, a float32 gradient of `params["layers"]`, the derivative by `so_far` is that gradient with this
        one added. Then `residuals` of these tokens under these parameters spare the forward pass.
        """

    def for_decoding(self, params: Params) -> Params:
        """Parameters as `prefill`, `decode` and `logits` take them: cast once, each layer's apart."""

    def layer_for_decoding(self, layers: Params, i: jax.Array | int) -> Params:
        """Layer i of that, out of the parameters of all layers."""

    def others_for_decoding(self, others: Params) -> Params:
        """That of parameters that belong to no layer."""

    @property
    def decoding_shardings(self) -> Params | None:
        """Where these lie, a tree like them; None: one device."""

    def prefill(
        self, params: Params, tokens_BP: jax.Array, lengths_B: jax.Array, keep_residuals: bool = False
    ) -> tuple[jax.Array, KVCache]:
        """Hidden states `[B, P, D]` of the prompts, and a cache of P slots (padding slots EMPTY)."""

    def decode(
        self, params: Params, token_B: jax.Array, position_B: jax.Array, cache: KVCache, slot: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """Hidden states `[B, D]` of one more token a row, and the cache with it written at `slot`."""

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """float32 logits `[..., V]` of hidden states `[..., D]`; of the parameters it reads those of `head_axes`."""
