"""The arrays that one step passes on, and the letters of their axes.

Axis letters, in names (`tokens_BT`) and comments (`int32[B, T]`) alike:

    B  sequences of a batch (rows)       L  layers
    P  prompt slots, right-padded        D  model width ("embed")
    T  response slots, right-padded      H  query heads
    S  sequence slots (prompt, then      G  key/value heads
       response without a gap), or       K  head width
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
# The residual stream: the input of each layer and the output of the last one; L + 1 arrays [B, S, D]. (): not stored
Residuals = tuple[jax.Array, ...]
Record = dict[str, jax.Array]  # values that an objective stores for each token: arrays [B, T, ...] by name


class Prompts(struct.PyTreeNode):
    """Tokenised prompts."""

    tokens: jax.Array  # int32[B, P], right-padded
    lengths: jax.Array  # int32[B], at least 1


class Sequences(struct.PyTreeNode):
    """Prompts with given answers, which a model scores or is trained on."""

    prompts: Prompts
    tokens: jax.Array  # int32[B, T], right-padded, with the tokens that end the turn
    lengths: jax.Array  # int32[B]


class Rollout(struct.PyTreeNode):
    """Sampled answers."""

    tokens: jax.Array  # int32[B, T], right-padded, with the final EOS if there is one
    lengths: jax.Array  # int32[B], 1..T
    log_probs: jax.Array  # float32[B, T], log pi(token) at temperature 1, unfiltered; 0 in padding
    entropy: jax.Array  # float32[B], entropy of the next-token distribution in nats, mean over the answer's tokens
    stopped: jax.Array  # bool[B], True: ended with EOS; False: cut at the maximum length
    residuals: Residuals = ()  # of all tokens except the last, in the slots of the rollout's KV cache

    def after(self, prompts: Prompts) -> Sequences:
        """The answers together with their prompts."""
        return Sequences(prompts, self.tokens, self.lengths)


class PromptBatch(struct.PyTreeNode):
    """One batch of a prompt stream. The teacher may get the same request in another chat template."""

    student: Prompts  # with the student's template
    teacher: Prompts  # the same requests with the teacher's template; often equal
    index: jax.Array  # int32[B], row number of each prompt in its source; part of the row's random key
    answers: Rollout | None = None  # given ones; None: answers are sampled


class LogProbs(struct.PyTreeNode):
    """Log-probabilities of the answers' tokens under student and teacher; 0 in padding."""

    student: jax.Array  # float32[B, T]
    teacher: jax.Array  # float32[B, T]

    @property
    def gap(self) -> jax.Array:
        """float32[B, T], `log teacher - log student` in nats (Eq 1)."""
        return self.teacher - self.student


class Selection(struct.PyTreeNode):
    """Which answers are trained on (methods Eq 6-8)."""

    mass: jax.Array  # float32[B], the gap mass of each answer, >= 0
    order: jax.Array  # int32[B], rows in descending order of gap mass; equal ones by row number
    count: jax.Array  # int32[], the first `count` rows of `order` are trained on
    weights: jax.Array  # float32[B], 1 for a selected row, else 0


class TeacherRecord(struct.PyTreeNode):
    """The teacher's values that an objective stores until the gradient is computed, and the student's beside them."""

    tokens: Record = struct.field(default_factory=dict)  # for each token, in addition to its log-probability
    head: Params = struct.field(default_factory=dict)  # the teacher's output head, if `tokens` has "hidden" states


class Batch(struct.PyTreeNode):
    """A branch's answers in one step, scored and ranked."""

    prompts: Prompts  # with the student's template
    index: jax.Array  # int32[B], row number of each prompt in its source
    rollout: Rollout
    log_probs: LogProbs
    selection: Selection
    teacher: TeacherRecord = TeacherRecord()

    def after_gradient(self) -> "Batch":
        """The batch without the arrays that only the gradient needs."""
        return self.replace(rollout=self.rollout.replace(residuals=()), teacher=TeacherRecord())


class TrainState(struct.PyTreeNode):
    """Everything that an update changes: the trained parameters and the optimizer's state."""

    step: jax.Array  # int32[], updates done or skipped
    params: Params  # the trained parameters; frozen ones are not included
    moments: dict[str, Any]  # Adam states: {"shared": ...}, or one for each branch by name; and stored gradients
    average: Params = struct.field(default_factory=dict)  # float32, of the parameters over the updates; {}: none
    objectives: dict[str, Record] = struct.field(default_factory=dict)  # float32[], of branches whose objective adapts

    @property
    def evaluated(self) -> Params:
        """The trained parameters that are evaluated and exported: their average, if there is one, in their dtype."""
        if not self.average:
            return self.params
        return jax.tree.map(lambda average, p: average.astype(p.dtype), self.average, self.params)


class KVCache(struct.PyTreeNode):
    """Keys and values of earlier tokens. No query attends to a slot whose position is `EMPTY`."""

    keys: tuple[jax.Array, ...]  # for each layer that has its own, [B, G, S, K]
    values: tuple[jax.Array, ...]  # the same
    positions: jax.Array  # int32[B, S], position of each slot's token in its row, or EMPTY
    residuals: Residuals = ()


# Names of a layer's parts among the parameters
ATTENTION, GLOBAL_ATTENTION = "attention", "global_attention"  # the second: of layers without a window, if different
# Of layers that use the keys and values of an earlier layer with the attention before the colon
SHARING = {ATTENTION: "sharing_attention", GLOBAL_ATTENTION: "sharing_global_attention"}
ATTENTIONS = (*SHARING, *SHARING.values())  # all of these names
MLP, WIDE_MLP = "mlp", "wide_mlp"  # the second: of layers that use the keys and values of another, if different
EMPTY = 2**30  # later than the position of any token, so that the causal mask excludes the slot


class LanguageModel(Protocol):
    """The methods of a model that the steps use. Hashable: it is a static argument of every compiled function.

    `models.transformer.Model` is the only implementation.
    """

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of its arrays; None: one device."""

    @property
    def dtype(self) -> str:
        """The dtype of activations and matrix products."""

    @property
    def head_axes(self) -> dict[str, tuple[str | None, ...]]:
        """The logical axes of the parameters that `logits` reads."""

    def __hash__(self) -> int: ...

    def on(self, mesh: Mesh | None) -> "LanguageModel":
        """The same model on another mesh of the same devices."""

    def hidden(
        self, params: Params, tokens_BS: jax.Array, so_far: Params | None = None, residuals: Residuals = ()
    ) -> jax.Array:
        """Final hidden states `[B, S, D]` of complete rows. Attention is causal, so right-padding has no effect.

        Args:
          so_far: a gradient like `params["layers"]`, float32. If given, the derivative with respect to `so_far` is
            `so_far` plus the gradient of `params["layers"]`.
          residuals: the residual stream of these tokens under these parameters, only together with `so_far`. The
            layers are then not computed in the forward pass.
        """

    def for_decoding(self, params: Params) -> Params:
        """The parameters in the form for `prefill`, `decode` and `logits`: cast once, with the layers unstacked and
        adapters merged. Kernels in int8 stay as they are, and adapters beside them too.
        """

    @property
    def layer_attention(self) -> tuple[str, ...]:
        """For each layer, the name of its attention among the parameters, such as ATTENTION."""

    def layer_for_decoding(self, layers: Params, i: jax.Array | int, attention: str = ATTENTION) -> Params:
        """Layer i of `for_decoding`, whose attention has this name, from the stacked parameters of all layers."""

    def others_for_decoding(self, others: Params) -> Params:
        """`for_decoding` of parameters that belong to no layer."""

    @property
    def decoding_shardings(self) -> Params | None:
        """The shardings of the result of `for_decoding`, as a tree like it; None: one device."""

    def prefill(
        self, params: Params, tokens_BP: jax.Array, lengths_B: jax.Array, keep_residuals: bool = False
    ) -> tuple[jax.Array, KVCache]:
        """Hidden states `[B, P, D]` of the prompts, and a cache of P slots (padding slots EMPTY)."""

    def decode(
        self, params: Params, token_B: jax.Array, position_B: jax.Array, cache: KVCache, slot: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """Hidden states `[B, D]` of one more token per row, and the cache with this token written at `slot`."""

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """float32 logits `[..., V]` of hidden states `[..., D]`; reads only the parameters in `head_axes`."""
