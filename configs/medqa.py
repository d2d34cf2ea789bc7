"""CaMOPD on medicine: the paper's second scenario (arXiv 2605.27115, Tables 2 and 6).

Reproduces   II-Medical-8B (student and domain teacher; SFT + DAPO on Qwen3-8B) regains general ability from
             Qwen3-8B (general teacher) and keeps its medical ability.
Command      python -m camopd_jax.train --config=configs/medqa.py --workdir=gs://BUCKET/medqa
Prompts      python -m camopd_jax.data.recipe general --out=data/general
             10K of nvidia/Nemotron-Post-Training-Dataset-v1, in proportion to the sizes of its categories
             python -m camopd_jax.data.recipe medical --out=data/medical
             4K MedMCQA, 3K MedReason, 2K English Medical-R1-Distill-Data, 1K m23k-tokenized
Benchmarks   IFEval, GSM8K (200 questions), MedQA-USMLE, from the hub, before and after; the first 64 questions of
             each every 40 steps. The paper's other benchmarks: python -m camopd_jax.lm_eval, or their own harnesses.
Hardware     the paper: 32 H100, about 7 hours. Here: all devices, tensor 8 and fsdp over the rest.
Expected     the paper (single runs): mean of nine general benchmarks 41.02 -> 45.84 (teacher 53.36; IFEval
             48.98 -> 59.89), mean of two medical ones 54.54 -> 54.71.
Not run      at full size: it needs the two 8B checkpoints and the memory of accelerators.

From the paper: models, prompts, batch size, steps, learning rate, caps, schedule, mass, r. Chosen here, because
the paper does not state them: AdamW's betas and no weight decay, gradient clip 1.0, no warm-up, sampling at
temperature 1 and top-p 1, Qwen3's thinking template.
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
    # For 64 v6e chips (v6e:8x8): fsdp 8 x tensor 8, half the batch answers at a time, four rows of a micro-batch per
    # chip. The sizes also divide on 256 chips. For others, see docs/plans.md or run `plan --search`.
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
