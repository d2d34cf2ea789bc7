"""A LoRA fine-tune of an 8B model, recovered on one card of 80 GB: one set of base weights serves all three roles.

Command    python -m camopd_jax.train --config=configs/lora_8b_one_gpu.py --workdir=runs/lora_8b
Models     Qwen3-8B, and a PEFT adapter of it: r 16 on all matrices of the layers.
Full       if your specialised model is a complete fine-tune, give its folder as specialised_model and set
           config.adapter = dict(rank=16): a new adapter is trained on it. It is in memory beside the original then.
Memory     what `plan` says, compiled for one TPU chip: 15.9 GiB through the whole run, at most 19.0 in the gradient.
           By its estimate, which is not compiled, 45 GiB while the student answers, with 64 x 1,536 tokens in its
           cache; 60 GiB with a new adapter on a full fine-tune; 166 GiB if all weights were trained.
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
    config.rollout.batch_size = 64
    config.rollout.max_prompt_tokens = 512
    config.rollout.max_response_tokens = 1024
    config.optimizer.learning_rate = 2e-5  # ten times the default: adapters need larger steps than all weights
    config.optimizer.micro_batch = 4
    config.compute.teacher = config.compute.matmul = "bfloat16"
    return config
