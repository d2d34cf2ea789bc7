"""A study of methods on a small real model: SmolLM2-135M-Instruct and its medical fine-tune.

First      python -m camopd_jax.sft --config=configs/smollm2_sft.py --workdir=runs/smollm2_medical
Command    python -m camopd_jax.compare --config=configs/smollm2_study.py --workdir=runs/smollm2_study --seeds=3 \\
               --methods=vanilla,camopd,recover --rates=5e-5
           benchmarks/gpu_study.sh runs both commands on one GPU.
Data       as in configs/smollm2.py. The questions of MedMCQA are also prompts of the domain: they measure what is kept.
General    the likelihood of GSM8K's solutions, of which this fine-tune loses two thirds (15 standard errors); IFEval,
           where the original follows only 14 % of the prompts: eval.jsonl has the share of instructions.
Domain     MedQA by letter, which is mostly the form of the answer; and the likelihood of the right option's letter and
           text, for MedQA and MedMCQA.
Budget     40 steps of 32 answers for every method.
Not run    at this size; docs/results.md has 12 steps of 8 answers.
"""

from camopd_jax.config import TrainConfig, default


def get_config():
    config = default(TrainConfig)
    config.general_model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.specialised_model = "runs/smollm2_medical/export"
    config.branches.recovery.prompts.source = "data/general_open.jsonl"
    config.branches.review.prompts.source = "data/medqa_dev.jsonl,data/medmcqa.jsonl"
    config.steps = 40
    config.rollout.batch_size = 32
    config.rollout.max_prompt_tokens = 256
    config.rollout.max_response_tokens = 128
    config.optimizer.learning_rate = 5e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.micro_batch = 8
    config.checkpoints.every = 40
    config.checkpoints.keep_best = 0
    config.log.trackers = ()
    config.evaluation.batch_size = 64
    option = dict(task="likelihood", answer="{answer}. {answer_text}", axis="domain", max_response_tokens=128)
    config.evaluation.benchmarks = (
        dict(name="gsm8k_solutions", task="likelihood", source="data/gsm8k_test.jsonl", answer="{solution}", limit=640,
             max_response_tokens=256),
        dict(name="ifeval", task="ifeval", source="data/ifeval.jsonl", max_response_tokens=256),
        dict(name="medqa", task="medqa", source="data/medqa_test.jsonl", limit=640, max_response_tokens=64,
             axis="domain"),
        dict(name="medqa_options", source="data/medqa_test.jsonl", limit=640, **option),
        dict(name="medmcqa_options", source="data/medmcqa.jsonl", limit=640, **option),
    )  # fmt: skip
    return config
