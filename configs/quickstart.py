"""The full job in about two minutes on 2 CPU cores, with nothing to download.

Command   python -m camopd_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
          The settings are those of configs/recover.py. The paper's: --config=configs/quickstart.py:camopd
Models    examples/quickstart/: a generalist of 0.3M parameters that learnt six text skills (reverse, sort, shift,
          add, double, swap), and a copy of it fine-tuned on an invented pharmacopoeia, which knows the domain but
          whose accuracy on the skills fell to 70 %. examples/quickstart/make.py trained both from scratch.
Prompts   four of the six skills. The other two (double, swap) are in no prompt, because real prompts never cover
          all abilities of a model either.
"""

from pathlib import Path

from camopd_jax.config import TrainConfig, default

FILES = Path(__file__).parents[1] / "examples" / "quickstart"


def get_config(method="recover"):
    """The config of a method: "recover", which docs/results.md favours, or "camopd", as the paper has it."""
    config = default(TrainConfig)
    config.general_model = str(FILES / "generalist")
    config.specialised_model = str(FILES / "specialist")
    config.branches.recovery.prompts.source = str(FILES / "general_prompts.jsonl")
    config.branches.review.prompts.source = str(FILES / "domain_prompts.jsonl")
    config.steps = 240
    config.rollout.batch_size = 64
    config.rollout.max_prompt_tokens = 64
    config.rollout.max_response_tokens = 32
    config.rollout.smallest_bucket = 16
    config.optimizer.learning_rate = 2e-4
    config.optimizer.schedule = "cosine"  # with a constant rate, rounding alone moves the domain by a few points
    config.optimizer.micro_batch = 16
    config.checkpoints.every = 60
    if method == "recover":
        config.start.interpolation = 0.1
        for branch in config.branches.values():
            branch.objective = "reverse_kl"
            branch.selection.keep = "fraction"
            branch.selection.mass = 0.5
            branch.steps = 1
    elif method != "camopd":
        raise ValueError(f"{method} is no method of this file; give recover or camopd")
    config.evaluation.batch_size = 96
    config.evaluation.benchmarks = tuple(
        dict(name=name, source=str(FILES / f"eval_{name}.jsonl"), axis=axis, task=task, max_response_tokens=32)
        | dict(covered=name != "uncovered")
        for name, axis, task in (
            ("covered", "general", "exact"),
            ("uncovered", "general", "exact"),
            ("domain", "domain", "choice"),
        )
    )
    return config
