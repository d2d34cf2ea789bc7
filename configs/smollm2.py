"""CaMOPD on a small real model: SmolLM2-135M-Instruct and its medical fine-tune.

First        python -m camopd_jax.sft --config=configs/smollm2_sft.py --workdir=runs/smollm2_medical
Command      python -m camopd_jax.train --config=configs/smollm2.py --workdir=runs/smollm2
Vanilla      for comparison, the same with --config.method.schedule=mixed --config.branches.recovery.steps=1
             --config.branches.recovery.selection.mass=1 --config.branches.review.selection.mass=1
             --config.branches.review.steps=1 --config.branches.recovery.scale=1:
             multi-teacher distillation with both streams 1:1 in each step and the same cap on sampled tokens
Without hub  --config.general_model=DIR takes a local Hugging Face folder.
Data         JSONL files at the paths below, rows with {"messages": [...]}. Any general and medical prompts will do.
             docs/results.md used self-instruct, T0, Open Assistant, MT-bench and Arena-Hard requests (general),
             MedQA-USMLE's dev split and MedMCQA (domain).
Benchmarks   the likelihood of GSM8K's solutions (a model of this size solves none of its questions), IFEval, and
             MedQA-USMLE's test split, where 135M parameters learn the answer format but no medicine.
Hardware     2 CPU cores and 24 GiB; docs/results.md has times and results. On a CPU, --config.compute.remat=rollout
             makes steps faster: the gradient needs no forward pass.
"""

from camopd_jax.config import TrainConfig, default


def get_config():
    config = default(TrainConfig)
    config.general_model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.specialised_model = "runs/smollm2_medical/export"
    config.branches.recovery.prompts.source = "data/general_open.jsonl"
    config.branches.review.prompts.source = "data/medqa_dev.jsonl,data/medmcqa.jsonl"
    config.steps = 12
    config.rollout.batch_size = 8
    config.rollout.max_prompt_tokens = 128
    config.rollout.max_response_tokens = 64
    config.optimizer.learning_rate = 1e-4
    config.optimizer.micro_batch = 8
    config.checkpoints.every = 12
    config.evaluation.batch_size = 32
    config.evaluation.benchmarks = (
        dict(name="gsm8k_solutions", task="likelihood", source="data/gsm8k_test.jsonl", answer="{solution}", limit=64,
             max_response_tokens=256),
        dict(name="ifeval", task="ifeval", source="data/ifeval.jsonl", limit=64, max_response_tokens=256),
        dict(name="medqa", task="medqa", source="data/medqa_test.jsonl", limit=64, max_response_tokens=64,
             axis="domain"),
    )  # fmt: skip
    config.log.samples = 4
    return config
