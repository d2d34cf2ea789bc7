"""The laptop study on a second pair of models, whose branches' gradients oppose each other.

Command    python -m camopd_jax.compare --config=configs/sandbox_conflict.py --workdir=runs/conflict --seeds=5
Models     the generalist of configs/quickstart.py, and a copy of it fine-tuned on questions about names, whose answers
           end with a full stop (examples/quickstart/conflict.py). It ends other answers with a full stop too.
Questions  examples/conflict/: 400 each for the covered skills, the uncovered skills and the domain, in no other file.
Budget     as in configs/sandbox.py: 120 steps of 64 sampled answers for every method.
"""

from pathlib import Path

from camopd_jax.config import TrainConfig, default

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = EXAMPLES / "conflict"


def get_config():
    config = default(TrainConfig)
    config.general_model = str(EXAMPLES / "quickstart" / "generalist")
    config.specialised_model = str(FILES / "specialist")
    config.branches.recovery.prompts.source = str(FILES / "general_prompts.jsonl")
    config.branches.review.prompts.source = str(FILES / "domain_prompts.jsonl")
    config.steps = 120
    config.rollout.batch_size = 64
    config.rollout.max_prompt_tokens = 64
    config.rollout.max_response_tokens = 32
    config.rollout.smallest_bucket = 16
    config.optimizer.learning_rate = 2e-4
    config.optimizer.micro_batch = 16
    config.checkpoints.every = 120
    config.checkpoints.keep_best = 0
    config.log.trackers = ()
    config.evaluation.batch_size = 100
    config.evaluation.benchmarks = tuple(
        dict(name=name, source=str(FILES / f"{name}.jsonl"), axis=axis, max_response_tokens=32)
        for name, axis in (("covered", "general"), ("uncovered", "general"), ("domain", "domain"))
    )
    return config
