"""CaMOPD on a small real model: SmolLM2-135M-Instruct and its medical fine-tune.

First        python -m camopd_jax.sft --config=configs/smollm2_sft.py --workdir=runs/smollm2_medical
Command      python -m camopd_jax.train --config=configs/smollm2.py --workdir=runs/smollm2
Without hub  --config.general_model=DIR takes a local Hugging Face folder.
Data         JSONL rows with {"messages": [...]}, at the paths below. Any general and medical prompts do; those
             of docs/results.md are self-instruct, T0, Open Assistant, MT-bench and Arena-Hard requests
             (general), MedQA-USMLE's dev split and MedMCQA (domain).
Hardware     2 CPU cores and 24 GiB: two full cycles (8 steps); docs/results.md has the time and the numbers.
"""

from camopd_jax.config import TrainConfig, default


def get_config():
    config = default(TrainConfig)
    config.general_model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.specialised_model = "runs/smollm2_medical/export"
    config.general.source = "data/general_open.jsonl"
    config.domain.source = "data/medqa_dev.jsonl,data/medmcqa.jsonl"
    config.steps = 8
    config.rollout.batch_size = 16
    config.rollout.max_prompt_tokens = 192
    config.rollout.max_response_tokens = 96
    config.optimizer.learning_rate = 1e-5
    config.optimizer.micro_batch = 8
    config.checkpoints.every = 4
    config.log.samples = 4
    return config
