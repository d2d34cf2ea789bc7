"""A LoRA fine-tune of a 4B model, recovered on one card of 24 GB: one set of base weights serves all three roles.

Command    python -m camopd_jax.train --config=configs/lora_4b_24gb.py --workdir=runs/lora_4b
Models     Qwen3-4B-Instruct-2507, and a PEFT adapter of it: r 16 on all matrices of the layers.
Memory     by the estimate of `plan`, which is not compiled: 8 GiB for weights and Adam, 15 GiB in the gradient, at
           most 20 GiB, while the student answers: the weights with the adapter merged, and a cache of 32 x 1,024
           tokens. A new adapter on a full fine-tune does not fit: 28 GiB.
Not run    on a GPU, nor with these models; the tests run configs of this form on tiny models.
"""

from camopd_jax.config import TrainConfig, default


def get_config():
    config = default(TrainConfig)
    config.general_model = "Qwen/Qwen3-4B-Instruct-2507"
    config.specialised_model = "models/medical_lora"  # adapter_config.json names the general model as its base
    config.branches.recovery.prompts.source = "data/general/general.jsonl"
    config.branches.review.prompts.source = "data/medical/medical.jsonl"
    config.steps = 120
    config.rollout.batch_size = 32
    config.rollout.max_prompt_tokens = 512
    config.rollout.max_response_tokens = 512
    config.optimizer.learning_rate = 2e-5  # ten times the default: adapters need larger steps than all weights
    config.optimizer.micro_batch = 2
    config.compute.teacher = config.compute.matmul = "bfloat16"
    return config
