"""Gradients of single answers: coherence within a set of answers, and conflict between two branches.

With `g_i` the gradient of the loss of answer i, the bracket of Eq 9:

    coherence   Coh(A) = |sum_A g_i| / sum_A |g_i| of a set A of answers       (arXiv 2605.27115, section 4.4)
    GCG         (Coh(selected) - Coh(all)) / Coh(all): the gain by selection. Smaller sets are more coherent (n
                orthogonal gradients: 1 / sqrt(n)), so the gain over random sets of the same size is computed too
    signal      |sum_A g_i| / |A|: the norm of the gradient of an update on A
    conflict    g . d and cos(g, d) of the first two branches' mean gradients; survives = |g + d| / (|g| + |d|), the
                share of their norms that remains in a mixed step

Only the gradients of one micro-batch and one sum for each set are in memory at a time. With `sketch > 0`, sums are
smaller than the model: they consist of a random projection of each matrix's gradient.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from camopd_jax.config.schema import Diagnostics, TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.method.gradient import Loss, LossInputs, weighted_loss
from camopd_jax.method.select import random_subset
from camopd_jax.method.token_weights import branch_weights
from camopd_jax.method.weights import loss_record, token_weights
from camopd_jax.models import partition
from camopd_jax.models.products import einsum
from camopd_jax.rollout.sampling import row_keys
from camopd_jax.runtime.buckets import Widths
from camopd_jax.types import ATTENTION, ATTENTIONS, MLP, WIDE_MLP, Batch, Params, Record

SETS = ("selected", "all")
RANDOM_SETS = 4  # random sets of as many answers as were selected: the baseline for a set of that size
Named = dict[str, jax.Array]  # arrays by parameter name, such as "layers.attention.query.kernel"


def measure(
    params: Params,
    batches: dict[str, Batch],
    key: jax.Array,
    states: Mapping[str, Record] = MappingProxyType({}),
    *,
    losses: dict[str, Loss],
    config: TrainConfig,
) -> dict[str, Any]:
    """Norms and inner products of the gradients of the branches' answers under the same parameters.

    Args:
      params: all parameters of the model.
      batches: of each branch.
      key: for the random sets and the random projection.
      states: of the objectives that have one, by branch.
      losses: of each branch, with models without a mesh, so that the compiler chooses the sharding.

    Returns:
      "branches": for each branch, arrays float32[2 + RANDOM_SETS] with an entry for each of SETS and each random set:
      "sum", the norm of the sum of the set's gradients; "lengths", the sum of their norms; "count", the set's size.
      "products": for each of SETS, the inner products of the first two branches' mean gradients by group (`products`);
      empty if there is only one branch. "squares": for each branch and set, the squared norm of the mean gradient by
      group.
    """
    means: dict[str, list[Named]] = {}
    result: dict[str, Any] = {"branches": {}, "squares": {}, "products": {}}
    for number, (branch, batch) in enumerate(batches.items()):
        keys = jax.random.split(jax.random.fold_in(key, number), RANDOM_SETS)
        random = [random_subset(batch.selection, one).weights for one in keys]
        sets_AB = jnp.stack([batch.selection.weights, jnp.ones_like(random[0]), *random])
        inputs = answer_inputs(batch, losses[branch], config, branch, states.get(branch, {}))
        sums, lengths_B = set_gradients(losses[branch], params, inputs, batch.teacher.head, sets_AB, key, config)
        counts = jnp.sum(sets_AB, axis=1)
        squares = jax.vmap(lambda one: total(products(one, one)))(sums)
        lengths_A = einsum("ab,b->a", sets_AB, lengths_B)
        result["branches"][branch] = {"sum": jnp.sqrt(squares), "lengths": lengths_A, "count": counts}
        means[branch] = [{name: s[i] / counts[i] for name, s in sums.items()} for i in range(len(SETS))]
        result["squares"][branch] = {name: products(m, m) for name, m in zip(SETS, means[branch], strict=True)}
    if len(means) > 1:
        first, second = list(means.values())[:2]
        result["products"] = {name: products(g, d) for name, g, d in zip(SETS, first, second, strict=True)}
    return result


def answer_inputs(
    batch: Batch, loss: Loss, config: TrainConfig, branch: str, state: Record | None = None
) -> LossInputs:
    """All answers of a batch, each with the weights of its own loss, the bracket of Eq 9."""
    selection = batch.selection
    alone = selection.replace(weights=jnp.ones_like(selection.weights), count=jnp.int32(1))
    scale, changes = config.branches[branch].scale, branch_weights(config, branch, loss.objective)
    keys = row_keys(config.seed, jnp.int32(0), batch.index, config.rollout.answers_per_prompt)
    one = batch.replace(selection=alone)
    weights = token_weights(one, config.method, loss.objective, scale, changes, keys)
    record = loss_record(one, loss.objective, state or {})
    return LossInputs(batch.rollout.after(batch.prompts), weights, record)


def set_gradients(
    loss: Loss,
    params: Params,
    inputs: LossInputs,
    teacher_head: Params,
    sets_AB: jax.Array,
    key: jax.Array,
    config: TrainConfig,
) -> tuple[Named, jax.Array]:
    """The sum of the gradients of each set of answers, and the norm of every answer's gradient.

    Args:
      sets_AB: float32[A, B], 1 if an answer is in a set.

    Returns:
      {parameter: float32[A, ...]}, or projections of the sums float32[A, (L,) sketch]; and float32[B].
    """
    settings, sequences = config.diagnostics, inputs.sequences
    trained = partition.trained(params, config.optimizer.trained)
    chosen, rebuild = select_parameters(trained, settings)
    slots = sequences.prompts.tokens.shape[1], sequences.tokens.shape[1]
    widths = Widths(sum(slots), slots[1], config.compute.logits_chunk)

    def of_answer(chosen: Named, answer: LossInputs) -> jax.Array:
        answer = jax.tree.map(lambda array: array[None], answer)
        return weighted_loss(loss, partition.merge(params, rebuild(chosen)), answer, teacher_head, widths)[0]

    micro = settings.micro_batch
    pieces = jax.tree.map(lambda x: x.reshape(-1, micro, *x.shape[1:]), (inputs, sets_AB.T))

    def add(sums: Named, piece: tuple[LossInputs, jax.Array]) -> tuple[Named, jax.Array]:
        answers, member_MA = piece
        grads = jax.vmap(jax.grad(of_answer), in_axes=(None, 0))(chosen, answers)
        grads = {name: g.astype(jnp.float32) for name, g in grads.items()}
        squares_M = sum(jnp.sum(jnp.square(g).reshape(micro, -1), axis=1) for g in grads.values())
        if settings.sketch:
            grads = sketch(grads, settings.sketch, key)
        sums = {name: sums[name] + einsum("ma,m...->a...", member_MA, g) for name, g in grads.items()}
        return sums, jnp.sqrt(squares_M)

    one = jax.eval_shape(lambda: {name: jnp.zeros((1, *p.shape), jnp.float32) for name, p in chosen.items()})
    if settings.sketch:
        one = jax.eval_shape(lambda g: sketch(g, settings.sketch, key), one)
    zeros = {name: jnp.zeros((len(sets_AB), *s.shape[1:]), jnp.float32) for name, s in one.items()}
    sums, lengths = jax.lax.scan(add, zeros, pieces)
    return sums, lengths.reshape(-1)


def select_parameters(params: Params, settings: Diagnostics) -> tuple[Named, Callable[[Named], Params]]:
    """The parameters to measure, by name, and a function that rebuilds the tree of all parameters from them.

    Raises:
      UserError: if no parameter name contains one of the texts in `settings.parameters`.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [".".join(key.key for key in path) for path, _ in leaves]
    words = [word.strip() for word in settings.parameters.split(",") if word.strip()]
    chosen = {n: p for n, (_, p) in zip(names, leaves, strict=True) if not words or any(w in n for w in words)}
    if not chosen:
        raise UserError(
            f"config.diagnostics.parameters is {settings.parameters!r}, which matches no parameter name; the names are "
            f"{', '.join(names)}"
        )

    def rebuild(chosen: Named) -> Params:
        values = [chosen.get(name, p) for name, (_, p) in zip(names, leaves, strict=True)]
        return jax.tree_util.tree_unflatten(structure, values)

    return chosen, rebuild


def sketch(grads: Named, width: int, key: jax.Array) -> Named:
    """A random projection of each matrix to `width` numbers: multiply by random signs, then fold (a count sketch).

    The expected inner product of two projections is the inner product of the gradients. For one projection of all
    parameters, the relative error of a squared norm would be about `sqrt(2 / width)`. A parameter's signs are the same
    in all layers; different parameters have different signs, so that their errors are independent.

    Args:
      grads: float[M, ...] or, stacked, float[M, L, ...].

    Returns:
      float[M, width] or float[M, L, width]; smaller matrices are returned flat but not projected.
    """
    projected = {}
    for number, (name, g) in enumerate(sorted(grads.items())):
        flat = g.reshape(*g.shape[: 1 + stacked(name)], -1)
        size = flat.shape[-1]
        if size > width:
            folds = -(-size // width)
            signs = jax.random.rademacher(jax.random.fold_in(key, number), (folds * width,), jnp.float32)
            padded = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, folds * width - size)])
            signed = padded * jnp.broadcast_to(signs, padded.shape)
            flat = jnp.sum(signed.reshape(*flat.shape[:-1], folds, width), axis=-2)
        projected[name] = flat
    return projected


def products(a: Named, b: Named) -> Named:
    """Inner products by group: scalars for "embedding", "head" and "final_norm", float32[L] for "layers".

    Parts of layers that some layers do not have are groups of their own, with an entry for each layer that has them:
    the attentions in models with several of them, and feed-forwards of different widths.
    """
    groups: Named = {}
    present = {name.split(".")[1] for name in a if stacked(name)}
    kinds = (set(ATTENTIONS), {MLP, WIDE_MLP})
    apart = {part for names in kinds if present & names - {ATTENTION, MLP} for part in names}
    for name in a:
        axes = tuple(range(stacked(name), a[name].ndim))
        group, part = name.split(".")[:2] if "." in name else (name, "")
        group = part if part in apart else group
        groups[group] = groups.get(group, 0) + jnp.sum(a[name] * b[name], axis=axes)
    return groups


def total(groups: Named) -> jax.Array:
    """The sum of inner products over all groups."""
    return sum((jnp.sum(value) for value in groups.values()), start=jnp.float32(0))


def stacked(name: str) -> int:
    """1 for a parameter whose first axis is the layer, else 0."""
    return int(name.startswith("layers."))
