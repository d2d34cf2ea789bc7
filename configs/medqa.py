"""CaMOPD on medicine: the paper's second scenario (arXiv 2605.27115, Tables 2 and 6).

Reproduces   Qwen3-8B (general teacher) gives general ability back to II-Medical-8B (student and
             domain teacher; SFT + DAPO on Qwen3-8B) without losing the medical one.
Command      python -m camopd_jax.train --config=configs/medqa.py --workdir=gs://BUCKET/medqa
Prompts      python -m camopd_jax.data.recipe general --out=data/general
             10K of nvidia/Nemotron-Post-Training-Dataset-v1, by its categories' shares
             python -m camopd_jax.data.recipe medical --out=data/medical
             4K MedMCQA, 3K MedReason, 2K English Medical-R1-Distill-Data, 1K m23k-tokenized
Benchmarks   IFEval, GSM8K (200), MedQA-USMLE, from the hub, before and after; the first 64 of each every 40 steps.
             The paper's others: python -m camopd_jax.lm_eval, or their own harnesses.
Hardware     the paper: 32 H100, about 7 hours. Here: a mesh of fsdp x tensor over what is there.
Expected     the paper (single runs): mean of nine general benchmarks 41.02 -> 45.84 (teacher 53.36; IFEval
             48.98 -> 59.89), mean of two medical ones 54.54 -> 54.71.
Not run here this config at full size: it needs the two 8B checkpoints and an accelerator's memory.

From the paper: models, prompts, batch, steps, learning rate, caps, schedule, mass, r. Not stated there, and
chosen here: AdamW's betas and no weight decay, gradient clip 1.0, no warm-up, sampling at temperature 1
and top-p 1, Qwen3's thinking template.
"""

from camopd_jax.config import TrainConfig, default


def get_config():
    config = default(TrainConfig)
    config.general_model = "Qwen/Qwen3-8B"
    config.specialised_model = "Intelligent-Internet/II-Medical-8B"
    config.branches.recovery.prompts.source = "data/general/general.jsonl"
    config.branches.review.prompts.source = "data/medical/medical.jsonl"
    config.steps = 120
    config.rollout.batch_size = 512
    config.rollout.max_prompt_tokens = 4096
    config.rollout.max_response_tokens = 32768
    config.rollout.smallest_bucket = 512
    config.optimizer.learning_rate = 2e-6
    # For 64 v6e chips (v6e:8x8): 8 x 8, half the batch answered at a time, four rows of a gradient on a chip. All of
    # it divides on 256 chips too; docs/plans.md has the flags for others, and `plan --search` finds them.
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 8
    config.rollout.concurrency = 256
    config.optimizer.micro_batch = 32
    config.checkpoints.every = 10
    config.evaluation.every = 40
    config.evaluation.questions = 64
    config.evaluation.benchmarks = (
        dict(name="ifeval", task="ifeval", max_response_tokens=8192),
        dict(name="gsm8k", task="gsm8k", limit=200, max_response_tokens=8192),
        dict(name="medqa", task="medqa", axis="domain", max_response_tokens=8192),
    )
    return config
