"""A LoRA fine-tune of an 8B model, recovered on one card of 24 GB: one set of base weights in int8 serves all roles.

Command    python -m camopd_jax.train --config=configs/lora_8b_24gb.py --workdir=runs/lora_8b
Models     Qwen3-8B, and a PEFT adapter of it: r 16 on all matrices of the layers.
Memory     what `plan --topology=v6e:1x1 --hbm_gib=24 --programs=decode` says, compiled for one TPU chip: 21.4 GiB while
           the student answers, with 16 x 1,024 tokens in its cache; 21.0 while prompts enter free lanes (refill), 20.4
           in prefill, 10.6 in the gradient, 9.7 while scoring, 9.5 in the update. In bfloat16 the estimate is 33.7 GiB.
Not run    on a GPU, nor with these models; the tests run configs of this form on tiny models.
"""

from camopd_jax.config import TrainConfig, default


def get_config():
    config = default(TrainConfig)
    config.general_model = "Qwen/Qwen3-8B"
    config.specialised_model = "models/medical_lora"  # adapter_config.json names the general model as its base
    config.branches.recovery.prompts.source = "data/general/general.jsonl"
    config.branches.review.prompts.source = "data/medical/medical.jsonl"
    config.steps = 120
    config.rollout.batch_size = 32
    config.rollout.concurrency = 16
    config.rollout.max_prompt_tokens = 512
    config.rollout.max_response_tokens = 512
    config.optimizer.learning_rate = 2e-5  # ten times the default: adapters need larger steps than all weights
    config.optimizer.micro_batch = 2
    config.compute.teacher = "int8"
    config.compute.matmul = "bfloat16"
    return config
