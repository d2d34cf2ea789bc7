"""The laptop study: CaMOPD, its parts and its controls (camopd_jax/config/methods.py) on the quickstart's models.

Command    python -m camopd_jax.compare --config=configs/sandbox.py --workdir=runs/sandbox --seeds=5
Models     those of configs/quickstart.py, with its prompts and its settings of rollout and optimizer.
Questions  examples/sandbox/: 400 each for the covered skills, the uncovered skills and the domain, in no other file.
Budget     120 steps of 64 sampled answers for every method.
Hardware   2 CPU cores: an hour and a half, or six minutes with --quick. docs/results.md has the results.
"""

from pathlib import Path

from camopd_jax.config import TrainConfig, default

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = EXAMPLES / "quickstart"
QUESTIONS = EXAMPLES / "sandbox"


def get_config():
    config = default(TrainConfig)
    config.general_model = str(MODELS / "generalist")
    config.specialised_model = str(MODELS / "specialist")
    config.branches.recovery.prompts.source = str(MODELS / "general_prompts.jsonl")
    config.branches.review.prompts.source = str(MODELS / "domain_prompts.jsonl")
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
        dict(name=name, source=str(QUESTIONS / f"{name}.jsonl"), axis=axis, task=task, max_response_tokens=32)
        for name, axis, task in (
            ("covered", "general", "exact"),
            ("uncovered", "general", "exact"),
            ("domain", "domain", "choice"),
        )
    )
    return config
