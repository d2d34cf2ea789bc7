"""Arithmetic of a run: FLOPs, bytes, the least seconds that the chips' limits allow, and an estimate of memory.

FLOPs are counted from the model, not by the compiler: 2 per weight of a matrix product and token (twice that again in a
backward pass), and 4 x heads x head width per pair of positions in attention.
"""

import dataclasses
import math
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from camopd_jax.method import schedule
from camopd_jax.method.optimizer import LAST_GRADIENT, moment_names
from camopd_jax.method.setup import Setup
from camopd_jax.models import fused
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.partition import trained
from camopd_jax.models.quantised import INT8
from camopd_jax.models.rows import WeightRow
from camopd_jax.models.weights import leaf_dtype, table, tree_of
from camopd_jax.planning.arrays import ModelShapes
from camopd_jax.planning.topology import Chip
from camopd_jax.rollout.generate import refill_size, rings
from camopd_jax.rollout.head import tokens_at_once
from camopd_jax.runtime.mesh import batch_shards, expert_shards

# FLOPs of a forward and a backward pass, in forward passes, by config.compute.remat
PASSES = {"none": 3, "dots": 3, "block": 4, "rollout": 3}


@cache
def weights(config: ModelConfig, rule: str | None = None) -> int:
    """Parameters of a model; with a rule, those that it trains (`config.optimizer.trained`)."""
    sizes = tree_of({row.path: math.prod(row.shape(config.num_layers)) for row in table(config)})
    return sum(jax.tree.leaves(sizes if rule is None else trained(sizes, rule)))


@cache
def weight_bytes(config: ModelConfig, dtype: str, experts: bool = False) -> int:
    """Bytes of a model's parameters in a dtype, except its kernels in int8 and their scales.

    Args:
      experts: count only those of experts.
    """
    return sum(_bytes(row, config, dtype) for row in table(config) if row.experts or not experts)


def _bytes(row: WeightRow, config: ModelConfig, dtype: str) -> int:
    return math.prod(row.shape(config.num_layers)) * jnp.dtype(leaf_dtype(config, row, dtype)).itemsize


@cache
def matrix_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of the weights in matrix products, as `matrix_weights` counts them."""
    kernels = sum(_bytes(row, config, dtype) for row in table(config) if row.path[-1] == "kernel")
    return kernels + config.vocab_size * config.hidden_size * jnp.dtype(dtype).itemsize


@cache
def matrix_weights(config: ModelConfig, per_token: bool = False) -> int:
    """Weights in matrix products: all kernels and the head, without the embedding's look-up.

    Args:
      per_token: of the experts, count only those of one token.
    """
    kernels = 0
    for row in table(config):
        if row.path[-1] == "kernel":
            size = math.prod(row.shape(config.num_layers))
            if per_token and row.experts and config.routing:
                size = size * config.routing.per_token // row.experts
            kernels += size
    return kernels + config.vocab_size * config.hidden_size


@cache
def expert_weights(config: ModelConfig, rule: str | None = None) -> int:
    """Of `weights`, those of experts."""
    rows = {row.path: math.prod(row.shape(config.num_layers)) * (row.experts > 0) for row in table(config)}
    sizes = tree_of(rows)
    return sum(jax.tree.leaves(sizes if rule is None else trained(sizes, rule)))


def weights_on_chip(config: ModelConfig, mesh: Mesh, rule: str | None = None) -> float:
    """The mean of `weights` that one chip has, of parameters that the mesh splits."""
    return _on_chip(weights(config, rule), expert_weights(config, rule), mesh)


def bytes_on_chip(config: ModelConfig, mesh: Mesh, dtype: str) -> float:
    """The mean of `weight_bytes` that one chip has."""
    return _on_chip(weight_bytes(config, dtype), weight_bytes(config, dtype, experts=True), mesh)


def _on_chip(everything: int, of_experts: int, mesh: Mesh) -> float:
    others = everything - of_experts
    return (others + of_experts / expert_shards(mesh)) / (mesh.shape["fsdp"] * mesh.shape["tensor"])


def forward_flops(config: ModelConfig, batch: int, start: int, end: int, logits: int) -> float:
    """Of `batch` rows, positions start..end, with logits at `logits` positions of each."""
    pairs = (end - start) * (start + 1 + end) // 2
    head = config.vocab_size * config.hidden_size
    dense = 2 * ((matrix_weights(config, per_token=True) - head) * (end - start) + head * logits)
    head_dims = sum(config.of_attentions[name].head_dim for name in config.layer_attention)
    return batch * (dense + 4 * head_dims * config.num_heads * pairs)


def _widest(config: ModelConfig) -> ModelConfig:
    """The config with the widest heads of any layer."""
    return max(config.of_attentions.values(), key=lambda of: of.head_dim)


def cache_bytes(config: ModelConfig, item_bytes: int) -> int:
    """Keys and values of one token."""
    of_layers = [config.of_attentions[name] for name in config.layer_attention]
    return 2 * item_bytes * sum(of.num_kv_heads * of.head_dim for of in of_layers if not of.shares_keys)


# ------------------------------------------------------------------------------ counts of a step


def lanes_of(setup: Setup, rows: int) -> int:
    """Answers in progress at a time, of a batch of `rows`."""
    return min(setup.config.rollout.concurrency or rows, rows)


def refills(setup: Setup, rows: int) -> tuple[int, int]:
    """(how often waiting answers take free lanes, how many at a time)."""
    lanes = lanes_of(setup, rows)
    entering = refill_size(lanes, batch_shards(setup.rollout_mesh) * setup.config.rollout.answers_per_prompt)
    return math.ceil((rows - lanes) / entering), entering


def waves_of(setup: Setup, rows: int) -> int:
    """Answers that a lane gives one after the other, if all have one length."""
    return math.ceil(rows / lanes_of(setup, rows))


@cache
def slots_read(waves: int, prompt: int, answer: int, cap: int) -> int:
    """Slots of the cache that the turns of one lane read in all: prompt and ring, which grows in the first wave."""
    sizes = np.array(list(rings(cap)))
    first = sizes[np.searchsorted(sizes, np.arange(1, answer + 1))]  # slots of the ring at each turn
    return int(waves * answer * prompt + first.sum() + (waves - 1) * answer * first[-1])


def kept_rows(setup: Setup, branch: str) -> int:
    """The most rows that a selection keeps; by gap mass, at most that share of the rows has that share of the mass."""
    rule, rows = setup.config.branches[branch].selection, setup.rows[branch]
    return rows if rule.keep == "density" else math.ceil(rule.mass * rows)


# ------------------------------------------------------------------------------- seconds at the limits


class Work(NamedTuple):
    """FLOPs and bytes of a stage of a step."""

    flops: float  # of the model, on all chips together
    done: float  # FLOPs with what remat computes again
    read: float  # bytes from HBM, on each chip
    received: float  # bytes from other chips, on each chip

    def plus(self, other: "Work", times: float = 1) -> "Work":
        return Work(*(a + times * b for a, b in zip(self, other, strict=True)))

    def limits(self, chip: Chip, chips: int) -> dict[str, float]:
        """Seconds of products, HBM and links, each at its peak."""
        received = self.received / (chip.ici_bandwidth / 2)
        return {"products": self.done / chips / chip.flops, "HBM": self.read / chip.hbm_bandwidth, "links": received}

    def seconds(self, chip: Chip, chips: int) -> float:
        """Of the slowest of the three, with which the others overlap."""
        return max(self.limits(chip, chips).values())


class Answering(NamedTuple):
    """How a batch is answered."""

    rows: int  # answers
    prompts: int
    lanes: int  # answers in progress at a time
    prefills: int  # calls that read prompts
    cap: int  # tokens of the longest answer that there may be


class Share:
    """One chip's share of a model on a mesh. In bytes."""

    def __init__(self, model: ModelConfig, mesh: Mesh, dtype: str):
        self.item, self.shards = jnp.dtype(dtype).itemsize, batch_shards(mesh)
        self.fsdp, self.tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
        self.expert, self.model = expert_shards(mesh), model
        self.weights = bytes_on_chip(model, mesh, dtype)
        absent = weight_bytes(model, dtype, experts=True) * (1 - 1 / self.expert)
        self.multiplied = (matrix_bytes(model, dtype) - absent) / self.tensor  # weights in a chip's products
        self.gathered = self.multiplied * (1 - 1 / self.fsdp)  # of these, what other chips send
        # Received for a token of the batch: activations are summed twice a layer, there and back around a ring
        ring = self.tensor * self.expert
        self.summed = 4 * model.num_layers * model.hidden_size * self.item * (1 - 1 / ring) / self.shards
        # Activations of a token in the middle of a layer: those of the widths that are split, and all
        feed_forward = max(of.feed_forward_size for of in model.of_attentions.values())
        if model.routing is not None:
            feed_forward = model.intermediate_size * model.routing.per_token + (model.dense_size or 0)
        self.wide = 2 * (feed_forward + model.num_heads * _widest(model).head_dim) / self.tensor * self.item
        self.live = 4 * model.hidden_size * self.item + self.wide

    def work(self, flops: float, calls: int, tokens: int, read: float = 0) -> Work:
        """Forward passes in `calls` calls over `tokens` tokens in all, which also read `read` bytes of the cache."""
        received = calls * self.gathered + tokens * self.summed
        return Work(flops, self.done(flops, tokens), calls * self.multiplied + read, received)

    def answering(self, batch: Answering, prompt: int, answer: int) -> dict[str, Work]:
        """The stages of a batch whose prompts have `prompt` tokens each, and whose answers `answer`."""
        waves = math.ceil(batch.rows / batch.lanes)
        slot = cache_bytes(self.model, self.item) * batch.lanes / (self.tensor * self.shards)  # of all lanes
        prefill = forward_flops(self.model, batch.prompts, 0, prompt, 0)
        decode = forward_flops(self.model, batch.rows, prompt, prompt + answer, answer)
        read = slot * slots_read(waves, prompt, answer, batch.cap)
        return {
            "prefill": self.work(prefill, batch.prefills, batch.prompts * prompt, slot * prompt),
            "decode": self.work(decode, waves * answer, batch.rows * answer, read),
        }

    def done(self, flops: float, tokens: int) -> float:
        """FLOPs on all chips: groups of chips with other experts repeat what is not the experts'."""
        of_experts = 0
        if self.model.routing is not None:
            active = expert_weights(self.model) * self.model.routing.per_token // self.model.routing.experts
            of_experts = 2 * active * tokens
        return flops + (self.expert - 1) * (flops - of_experts)


def step_work(setup: Setup, models: ModelShapes, answer: int) -> dict[str, Work]:
    """The stages of a step, the mean over the cycle of the branches, where every prompt has its cap's length and every
    answer `answer` tokens. The move of the weights to the rollout's mesh is left out: it takes a small part of a step.
    """
    total: dict[str, Work] = {}
    phases = schedule.phases(setup.config)
    for branch in setup.config.branches:
        often = phases.get(schedule.MIXED, phases.get(branch, 0.0))
        for name, work in _branch_work(setup, models, branch, answer).items():
            total[name] = total.get(name, Work(0, 0, 0, 0)).plus(work, often)
    read = 7 * _trained_bytes(setup, models)  # reads parameters, two moments and gradient; writes all but the gradient
    return total | {"update": Work(0, 0, read, 0)}


def step_seconds(setup: Setup, models: ModelShapes, answer: int, chip: Chip) -> float:
    """Of a step at the chips' limits."""
    return sum(work.seconds(chip, setup.mesh.size) for work in step_work(setup, models, answer).values())


def _trained_bytes(setup: Setup, models: ModelShapes) -> float:
    """Of the trained parameters, in float32, on one chip."""
    return 4 * weights_on_chip(models.student, setup.mesh, setup.config.optimizer.trained)


def _branch_work(setup: Setup, models: ModelShapes, branch: str, answer: int) -> dict[str, Work]:
    """Weights that are split over fsdp are gathered in every call: at every turn of decoding, for every micro-batch."""
    config, prompt, rows = setup.config, setup.config.rollout.max_prompt_tokens, setup.rows[branch]
    student, teacher, length = models.student, models.shapes[config.branches[branch].teacher], prompt + answer

    batch = Answering(
        rows=rows,
        prompts=rows // config.rollout.answers_per_prompt,
        lanes=lanes_of(setup, rows),
        prefills=1 + refills(setup, rows)[0],
        cap=config.rollout.max_response_tokens,
    )
    work = {"prefill": Work(0, 0, 0, 0), "decode": Work(0, 0, 0, 0)}
    answering = [teacher if config.method.answers == "teacher" else student]
    for model in answering + ([teacher] if config.rollout.sampler != "student" else []):
        of_model = Share(model, setup.rollout_mesh, setup.dtype).answering(batch, prompt, answer)
        work = {stage: done.plus(of_model[stage]) for stage, done in work.items()}

    calls = math.ceil(rows / setup.score_batch)
    for name, model in {"student": student, "teacher": teacher}.items():
        if name == "teacher" or not setup.trusts_sampler or setup.objectives[branch].second_pass:
            on, flops = Share(model, setup.mesh, setup.dtype), forward_flops(model, rows, 0, length, answer)
            work[f"score {name}"] = on.work(flops, calls, rows * length)

    on, kept = Share(student, setup.mesh, setup.dtype), kept_rows(setup, branch)
    calls = math.ceil(kept / setup.micro_batch)
    frozen = 1 - weights(student, config.optimizer.trained) / weights(student)  # have no gradient of their own
    forward, passes = forward_flops(student, kept, 0, length, answer), PASSES[config.compute.remat] - frozen
    gradient = _trained_bytes(setup, models)  # each chip sums its part, then exchanges it with the other data shards
    exchanged = gradient * (on.fsdp - 1 + 2 * (1 - on.fsdp / on.shards))
    read = calls * (3 * on.multiplied + 2 * gradient)
    received = calls * (2 * on.gathered + exchanged) + passes * kept * length * on.summed
    done = passes * on.done(forward, kept * length)
    return work | {"gradient": Work((3 - frozen) * forward, done, read, received)}


# ------------------------------------------------------------------------------------------ memory


def memory_estimate(setup: Setup, models: ModelShapes) -> dict[str, float]:
    """Bytes on one chip while each of the largest programs runs, from sizes alone.

    Good for leaving out what cannot fit; the compiler has the last word. Weights, caches, gradients and moments are
    counted exactly, activations roughly, and code and teachers' hidden states not at all.
    """
    config, gradients = setup.config, _trained_bytes(setup, models)
    moments = gradients * sum(1 if name.startswith(LAST_GRADIENT) else 2 for name in moment_names(config))
    moments += gradients if config.optimizer.average is not None else 0  # the average is kept and offloaded with them
    gradients *= len(config.branches) if config.method.schedule == schedule.MIXED else 1
    mesh, student = setup.mesh, models.student
    shared = {*models.bases, models.base_of_student}  # models whose base weights are counted elsewhere
    frozen = setup.dtype if setup.teacher_dtype == INT8 else setup.teacher_dtype  # of weights that are not in int8

    def base(shape: ModelConfig, dtype: str) -> float:
        return bytes_on_chip(dataclasses.replace(shape, adapter=()), mesh, dtype)

    def replaced(name: str) -> float:
        rows, shape = models.replaced.get(name, ()), models.shapes[name]
        sizes = [(_bytes(row, shape, frozen), row.experts) for row in rows]
        return _on_chip(sum(n for n, _ in sizes), sum(n for n, experts in sizes if experts), mesh)

    def counted(name: str) -> float:
        """Of a model's weights, those that are counted with another model."""
        if name not in shared:
            return 0.0
        adapter = "specialised" if name == models.bases.get("specialised") else name
        return base(models.shapes[adapter], frozen) - (replaced(adapter) if name != "specialised" else 0.0)

    teachers = [bytes_on_chip(shape, mesh, frozen) - counted(name) for name, shape in models.shapes.items()]
    parameters = bytes_on_chip(student, mesh, config.compute.params)
    if student.adapter:
        parameters += base(student, frozen) - base(student, config.compute.params)
    answering = _rollout_memory(setup, models.student)
    if config.rollout.sampler != "student":  # the student and the teacher that takes most
        beside = [_rollout_memory(setup, models.shapes[branch.teacher]) for branch in config.branches.values()]
        answering = {name: n + max(of[name] for of in beside) for name, n in answering.items()}
    learning = {"gradient": gradients + _gradient_memory(setup, models.student), "update": gradients}
    if setup.keep_residuals:
        answering["decode"] += _stream_bytes(setup, models.student)
        learning["gradient"] += _stream_bytes(setup, models.student)
    if not config.compute.offloads:
        parameters += moments + sum(teachers)
    else:
        answering = {name: n + max(teachers) for name, n in answering.items()}
        learning["gradient"] += moments if config.compute.offload == "ahead" else 0
        learning["update"] += moments
    return {name: parameters + n for name, n in (answering | learning).items()}


def _rollout_memory(setup: Setup, model: ModelConfig) -> dict[str, float]:
    """A copy of the weights, the cache (of one layer twice, as it grows) and the activations of prompts that enter."""
    on, rows = Share(model, setup.rollout_mesh, setup.dtype), max(setup.rows.values())
    lanes, (times, entering) = lanes_of(setup, rows), refills(setup, rows)
    slot, own = cache_bytes(model, on.item) / on.tensor / on.shards, model.first_sharing  # a lane's
    cache, prompt = lanes * slot * setup.context, setup.config.rollout.max_prompt_tokens * (slot + on.live / on.shards)
    refill = {"refill": on.weights + cache + entering * prompt} if times else {}
    return {"prefill": on.weights + lanes * prompt, "decode": on.weights + cache * (1 + 1 / own)} | refill


def _stream_bytes(setup: Setup, model: ModelConfig) -> float:
    """The residual stream that stays from the rollout to the gradient."""
    slots = max(setup.rows.values()) / batch_shards(setup.mesh) * setup.context
    return slots * (model.num_layers + 1) * model.hidden_size * jnp.dtype(setup.dtype).itemsize


def _gradient_memory(setup: Setup, model: ModelConfig) -> float:
    """Activations of a micro-batch, with plain attention's scores of one layer; the weights of two layers and of the
    head, where products read a copy that is cast or gathered; and the gradients of what is trained of them.
    """
    on, config, slots = Share(model, setup.mesh, setup.dtype), setup.config, setup.context
    rows, enters = setup.micro_batch / on.shards, model.hidden_size * on.item / on.tensor
    # Results of a layer's products: query, key, value, attention's output, gate and up
    of = _widest(model)
    products = enters + on.wide + (2 * of.num_kv_heads - of.num_heads) * of.head_dim / on.tensor * on.item
    saved = {"none": 4 * enters + 2 * on.wide, "dots": enters + products}.get(config.compute.remat, enters)
    # Of one layer beside its input: forward and backward, and the sums that an adapter's products are added to
    activations = model.num_layers * saved + (3 if model.adapter else 2) * on.live
    second = model.num_layers * model.per_layer_input.size if model.per_layer_input else 0
    activations += 2 * second / on.tensor * on.item  # of the second embedding, with its gradient
    if _attends_plainly(setup, model):
        activations += 4 * model.num_heads / on.tensor * slots

    head = model.vocab_size * model.hidden_size / on.tensor
    layers = 2 * (matrix_weights(model) / on.tensor - head) / model.num_layers
    stored = setup.teacher_dtype if model.adapter else config.compute.params
    copies = [on.item * (on.fsdp > 1 or of != setup.dtype) for of in (stored.replace(INT8, setup.dtype), stored)]
    learnt = _trained_shares(model, config.optimizer.trained)
    read = sum(n * (copy + 4 * part) for n, copy, part in zip((head, layers), copies, learnt, strict=True))
    if model.per_layer_input is not None and "per_layer_embedding" in _trained_names(model, config.optimizer.trained):
        read += 4 * model.per_layer_input.vocab_size * second / on.tensor
    chunk = tokens_at_once(config.compute.logits_chunk, model.vocab_size, on.tensor)
    logits = min(chunk, rows * config.rollout.max_response_tokens) * 8 * model.vocab_size / on.tensor
    return rows * slots * activations + read + logits


def _attends_plainly(setup: Setup, model: ModelConfig) -> bool:
    """Whether the scores of full rows' attention are arrays."""
    no_kernel = any(fused.unsupported_reason(of, setup.mesh, setup.dtype) for of in model.of_attentions.values())
    return no_kernel or setup.config.compute.attention == "xla" or setup.context < fused.SHORTEST


@cache
def _trained_names(model: ModelConfig, rule: str) -> frozenset[str]:
    """The trained parts of a model that are outside its layers."""
    return frozenset(trained(tree_of({row.path: 0 for row in table(model)}), rule))


@cache
def _trained_shares(model: ModelConfig, rule: str) -> tuple[float, float]:
    """The parts of the head's and of the layers' parameters that have a gradient."""
    sizes = tree_of({row.path: math.prod(row.shape(model.num_layers)) for row in table(model)})
    part = trained(sizes, rule)
    of_layers = sum(jax.tree.leaves(part.get("layers", {}))) / sum(jax.tree.leaves(sizes["layers"]))
    return float(("embedding" if model.tied_head else "head") in part), of_layers
