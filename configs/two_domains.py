"""A model of two domains, with one specialist for each: general ability comes back, both domains are kept.

Shows      a third branch. The student starts as the medical specialist. On law prompts the law specialist teaches it,
           on medical prompts its own frozen copy, on general prompts the original model.
Command    python -m camopd_jax.train --config=configs/two_domains.py --workdir=runs/two_domains
Models     three checkpoints with the same tokenizer: the original, and two fine-tunes of it.
Cycle      recovery, recovery, recovery, review, law, law; each branch has its own update, so gradients never mix.
Not run    with real models; the tests run a config of this form on tiny models.
"""

from camopd_jax.config import TrainConfig, default


def get_config():
    config = default(TrainConfig)
    config.general_model = "models/original"
    config.specialised_model = "models/medical"
    config.branches.recovery.prompts.source = "data/general/general.jsonl"
    config.branches.review.prompts.source = "data/medical/medical.jsonl"
    config.branches.law = dict(
        teacher="models/law",  # a Hugging Face folder or hub name
        prompts=dict(source="data/law/law.jsonl"),
        selection=dict(by="positive_gap"),
        steps=2,
    )
    config.steps = 240
    config.optimizer.learning_rate = 2e-6
    return config
