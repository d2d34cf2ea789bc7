"""A LoRA specialist of the quickstart's generalist, for docs/lora.md.

Command   python -m camopd_jax.sft --config=configs/lora_quickstart_sft.py --workdir=runs/lora_specialist
Then      python -m camopd_jax.train --config=configs/quickstart.py:camopd --workdir=runs/lora
              --config.specialised_model=runs/lora_specialist/export --config.optimizer.learning_rate=2e-3
Data      the questions of the domain's benchmark with their answers. The adapter learns the form of the answers and not
          the domain, and loses the general skills: enough to show the commands and what comes back.
"""

from pathlib import Path

from camopd_jax.config import SftConfig, default

FILES = Path(__file__).parents[1] / "examples" / "quickstart"


def get_config():
    config = default(SftConfig)
    config.model = str(FILES / "generalist")
    config.data.source = str(FILES / "eval_domain.jsonl")
    config.answer = "Final answer: {letter}"
    config.steps = 60
    config.max_tokens = 128
    config.optimizer.learning_rate = 3e-3
    config.adapter = dict(rank=8, alpha=16)
    config.checkpoints.every = 60
    config.evaluation.benchmarks = tuple(
        dict(name=name, source=str(FILES / f"eval_{name}.jsonl"), axis=axis, task=task, max_response_tokens=32)
        for name, axis, task in (("covered", "general", "exact"), ("domain", "domain", "choice"))
    )
    return config
