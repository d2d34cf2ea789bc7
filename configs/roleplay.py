"""CaMOPD on role-play: the paper's first scenario (arXiv 2605.27115, Tables 1 and 3).

Reproduces   Qwen3-4B-Instruct-2507 (general teacher) gives general ability back to its own SFT on CoSER
             (student and domain teacher) without losing the role-play one.
Command      python -m camopd_jax.train --config=configs/roleplay.py --workdir=gs://BUCKET/roleplay \\
                 --config.specialised_model=DIR_OF_YOUR_COSER_SFT
             The paper does not publish its SFT, nor that SFT's hyper-parameters; camopd_jax.sft makes one.
Prompts      python -m camopd_jax.data.recipe general --out=data/general
             10K of nvidia/Nemotron-Post-Training-Dataset-v1, by its categories' shares
             python -m camopd_jax.data.recipe roleplay --out=data/roleplay
             the 10K CoSER conversations with most turns, the first n-1 turns as prompt (roleplay.jsonl); the others,
             for the SFT, whole (roleplay_sft.jsonl)
Benchmarks   IFEval and GSM8K (200), from the hub, before and after. Role-play by a judge: name one in
             config.evaluation.judge and add dict(name="roleplay", task="roleplay", axis="domain", source=...)
Hardware     the paper: 32 H100, about 7 hours. Here: a mesh of fsdp x tensor over what is there.
Expected     the paper (single runs): mean of nine general benchmarks 30.88 -> 49.07 (teacher 53.39), CoSER
             mean 41.08 -> 45.00; vanilla MOPD 43.78 and 42.86.
Not run here this config at full size: it needs the 4B checkpoints and an accelerator's memory.

From the paper and chosen here: as in configs/medqa.py.
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
    # For 64 v6e chips (v6e:8x8): 8 x 8, half the batch answered at a time, four rows of a gradient on a chip. All of
    # it divides on 256 chips too; docs/plans.md has the flags for others, and `plan --search` finds them.
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
