"""Makes the specialised model of configs/smollm2.py: SmolLM2-135M-Instruct, fine-tuned on medical questions.

Command      python -m camopd_jax.sft --config=configs/smollm2_sft.py --workdir=runs/smollm2_medical
Data         JSONL files at the paths below, rows with {"messages": [...], "answer": "C", "answer_text": "Ceftriaxone"}.
             docs/results.md used MedQA-USMLE's dev split and MedMCQA.
"""

from camopd_jax.config import SftConfig, default


def get_config():
    config = default(SftConfig)
    config.model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.data.source = "data/medqa_dev.jsonl,data/medmcqa.jsonl"
    config.answer = "{answer}. {answer_text}\n\nFinal answer: {answer}"
    config.steps = 60
    config.batch_size = 8
    config.max_tokens = 192
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 5
    config.optimizer.micro_batch = 8
    config.checkpoints.every = 30
    return config
