"""CaMOPD on role-play: the paper's first scenario (arXiv 2605.27115, Tables 1 and 3).

Reproduces   an SFT of Qwen3-4B-Instruct-2507 on CoSER (student and domain teacher) regains general ability from
             Qwen3-4B-Instruct-2507 (general teacher) and keeps its role-play ability.
Command      python -m camopd_jax.train --config=configs/roleplay.py --workdir=gs://BUCKET/roleplay \\
                 --config.specialised_model=DIR_OF_YOUR_COSER_SFT
             The paper publishes neither its SFT nor the hyper-parameters of it; camopd_jax.sft can make one.
Prompts      python -m camopd_jax.data.recipe general --out=data/general
             10K of nvidia/Nemotron-Post-Training-Dataset-v1, in proportion to the sizes of its categories
             python -m camopd_jax.data.recipe roleplay --out=data/roleplay
             the 10K CoSER conversations with the most turns, without their last turn (roleplay.jsonl); the other
             conversations, complete, for the SFT (roleplay_sft.jsonl)
Benchmarks   IFEval and GSM8K (200 questions), from the hub, before and after. Role-play needs a judge: set
             config.evaluation.judge and add dict(name="roleplay", task="roleplay", axis="domain", source=...)
Hardware     the paper: 32 H100, about 7 hours. Here: all devices, tensor 8 and fsdp over the rest.
Expected     the paper (single runs): mean of nine general benchmarks 30.88 -> 49.07 (teacher 53.39), CoSER
             mean 41.08 -> 45.00; vanilla MOPD 43.78 and 42.86.
Not run      at full size: it needs the two 4B checkpoints and the memory of accelerators.

What is from the paper and what was chosen here is the same as in configs/medqa.py.
"""

from camopd_jax.config import TrainConfig, default


def get_config():
    config = default(TrainConfig)
    config.general_model = "Qwen/Qwen3-4B-Instruct-2507"
    config.specialised_model = "runs/coser_sft/export"
    config.branches.recovery.prompts.source = "data/general/general.jsonl"
    config.branches.review.prompts.source = "data/roleplay/roleplay.jsonl"
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
    config.evaluation.benchmarks = (
        dict(name="ifeval", task="ifeval", max_response_tokens=8192),
        dict(name="gsm8k", task="gsm8k", limit=200, max_response_tokens=8192),
    )
    return config
