"""Times what each objective costs: scoring an answer with the teacher, and the gradient.

    python benchmarks/objectives.py --rounds=5

Two random models of a vocabulary that is large beside the rest, as small models have. Every objective scores and
differentiates the same answers, as in a run in float32: the teacher's forward pass with what the objective stores, the
second pass of the student where it has one, and the gradient. All alternate in one process; prints medians, and the
median over rounds of the time against that of `sampled_token` in the same round, as a markdown table.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from camopd_jax.method.gradient import GradientAccumulator, Loss, LossInputs
from camopd_jax.method.objectives import OBJECTIVES, StudentReading, TeacherReading, objective
from camopd_jax.method.tokens import Tokens
from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.rollout.head import head_params
from camopd_jax.rollout.masks import length_mask
from camopd_jax.rollout.score import micro_batches, score_batch
from camopd_jax.runtime.start import start
from camopd_jax.types import LogProbs, Prompts, Record, Rollout, Sequences, TeacherRecord

flags.DEFINE_integer("vocab", 32768, "Vocabulary.")
flags.DEFINE_integer("width", 256, "Width of the model.")
flags.DEFINE_integer("layers", 4, "Layers.")
flags.DEFINE_integer("rows", 8, "Answers.")
flags.DEFINE_integer("prompt", 32, "Tokens of every prompt.")
flags.DEFINE_integer("answer", 64, "Tokens of every answer.")
flags.DEFINE_integer("rounds", 5, "Rounds of alternation, after one that compiles.")
flags.DEFINE_list("objectives", list(OBJECTIVES), "With their default options; sampled_token is always measured.")


class Measured:
    """One objective on given answers."""

    def __init__(self, name: str, model: Model, student, teacher, sequences: Sequences):
        self.of = objective(name, "--objectives")
        self.model, self.student, self.teacher, self.sequences = model, student, teacher, sequences
        self.reads = model if self.of.teacher_logits else None
        self.accumulator = GradientAccumulator(Loss(model, self.of, self.reads), None, 0)
        self.parts = list(micro_batches(None, sequences, len(sequences.lengths), 32))
        self.head = head_params(model, teacher) if self.reads else {}
        self.seconds: dict[str, list[float]] = {"score": [], "gradient": []}
        self.stored = 0  # numbers per token

    def score(self) -> Record:
        """The teacher's pass, the second pass of the student if there is one, and the constants from both."""
        record = score_batch(self.model, self.teacher, self.sequences, self.parts, 0, TeacherReading(self.of))
        log_probs, stored = record["log_prob"], record
        if self.of.second_pass:
            reading, given = StudentReading(self.of, self.reads), TeacherRecord(record, self.head)
            read = score_batch(self.model, self.student, self.sequences, self.parts, 0, reading, given)
            gaps = LogProbs(read.pop("log_prob"), log_probs)
            stored = record | read
            record = stored | self.constants(gaps, stored)
        elif self.of.has_constants:  # with the teacher's log-probabilities as the student's and the sampler's
            rollout = Rollout(self.sequences.tokens, self.sequences.lengths, log_probs, jnp.zeros(()), jnp.ones(()))
            record = record | self.of.constants(LogProbs(log_probs, log_probs), rollout)
        self.stored = sum(array[0, 0].size for array in stored.values())
        return jax.block_until_ready({name: array for name, array in record.items() if name != "log_prob"})

    def constants(self, gaps: LogProbs, record: Record) -> Record:
        trained = length_mask(self.sequences.lengths, self.sequences.tokens.shape[1])
        tokens = Tokens(self.sequences.tokens, trained, self.sequences.lengths, gaps, record, None)
        return self.of.compare(tokens, self.of.initial_state())

    def run(self) -> None:
        begun = time.perf_counter()
        record = self.score()
        scored = time.perf_counter()
        weights = jnp.full(self.sequences.tokens.shape, 1 / self.sequences.tokens.size)
        inputs = LossInputs(self.sequences, weights, record)
        jax.block_until_ready(self.accumulator(self.student, self.student, inputs, self.parts, self.head))
        self.seconds["score"].append(scored - begun)
        self.seconds["gradient"].append(time.perf_counter() - scored)

    def totals(self) -> np.ndarray:
        """Seconds of each round after the first, which compiles."""
        return np.sum([seconds[1:] for seconds in self.seconds.values()], axis=0)


def main(_) -> None:
    start()
    v = flags.FLAGS
    model = Model(from_hf(dict(model_type="llama", vocab_size=v.vocab, hidden_size=v.width,
                               intermediate_size=4 * v.width, num_hidden_layers=v.layers, num_attention_heads=4,
                               num_key_value_heads=4)))  # fmt: skip
    student, teacher = (jax.jit(model.init)(jax.random.key(seed)) for seed in (0, 1))
    random = np.random.default_rng(0)

    def tokens(slots: int) -> jax.Array:
        return jnp.asarray(random.integers(0, v.vocab, (v.rows, slots)), jnp.int32)

    lengths = jnp.full(v.rows, v.answer, jnp.int32)
    sequences = Sequences(Prompts(tokens(v.prompt), jnp.full_like(lengths, v.prompt)), tokens(v.answer), lengths)
    names = ["sampled_token", *(name for name in v.objectives if name != "sampled_token")]
    every = {name: Measured(name, model, student, teacher, sequences) for name in names}
    for _ in range(1 + v.rounds):
        for one in every.values():
            one.run()
    sampled = every["sampled_token"].totals()
    print("| objective | score, s | gradient, s | against `sampled_token` | needs: stored numbers and more |")
    print("|---|---|---|---|---|")
    for name, one in every.items():
        score, gradient = (statistics.median(seconds[1:]) for seconds in one.seconds.values())
        needs = f"{one.stored} per token"
        needs += ", the teacher's head" if one.reads else ""
        needs += ", a second pass of the student" if one.of.second_pass else ""
        ratio = statistics.median(one.totals() / sampled)
        print(f"| `{name}` | {score:.2f} | {gradient:.2f} | {ratio:.2f} | {needs} |")


if __name__ == "__main__":
    app.run(main)
