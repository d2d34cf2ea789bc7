"""Arrays that no compiled program should have: what they would cost grows with the layers or with the answers."""

import math

from camopd_jax.planning.hlo import Module
from camopd_jax.rollout.head import tokens_at_once
from camopd_jax.runtime.mesh import batch_shards


def unwanted(module, program, made):
    """Shapes of gathered stacks and of whole logits in a program of a plan."""
    stage, model, setup = program.name.split(":")[0], made.student.config, made.setup
    stacks, logits, vocab = set(), set(), model.output_vocab_size or model.vocab_size
    if stage in ("score", "gradient", "update"):
        stacks = gathered_stacks(module, model.num_layers)
    if stage in ("score", "gradient"):
        size = setup.score_batch if stage == "score" else setup.config.optimizer.micro_batch
        rows, tensor = size // batch_shards(setup.mesh), setup.mesh.shape["tensor"]
        tokens = rows * setup.config.rollout.max_response_tokens
        at_once = max(rows, tokens_at_once(setup.config.compute.logits_chunk, vocab, tensor))
        if tokens > max(at_once, model.hidden_size):  # of fewer tokens, the head itself looks like logits
            logits = whole_logits(module, tokens, (vocab, -(-vocab // tensor)))
    return stacks | logits


def gathered_stacks(module: Module, layers: int) -> set[str]:
    """Shapes of all-gathers of a parameter of all layers at once, `[L, ...]`: the scan should gather one at a time."""

    def stacked(dims):
        wide = [d for d in dims if d != 1]
        return len(wide) >= 3 and wide[0] == layers

    gathers = (i for i in module.instructions() if i.opcode in ("all-gather", "all-gather-start"))
    return {i.shape.split("{")[0] for i in gathers if any(stacked(dims) for _, dims in i.arrays)}


def whole_logits(module: Module, tokens: int, vocab: tuple[int, ...]) -> set[str]:
    """Shapes of arrays with logits of all `tokens` of one chip at once, `[B, T, V]` in any order and grouping.

    Args:
      vocab: the vocabulary's size, complete and as one chip has it.
    """

    def logits(dims):
        return any(v in dims and math.prod(dims) >= tokens * v for v in vocab)

    return {i.shape.split("{")[0] for i in module.instructions() if any(logits(dims) for _, dims in i.arrays)}
