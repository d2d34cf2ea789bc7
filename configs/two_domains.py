"""A model of two domains: general ability back, both domains kept, with one specialist each.

Shows      a third branch. The student starts as the medical specialist; the law specialist teaches it law on law
           prompts, the medical one's frozen copy keeps medicine, the original model gives general ability back.
Command    python -m camopd_jax.train --config=configs/two_domains.py --workdir=runs/two_domains
Models     three checkpoints of one original: itself, and two fine-tunes of it, by the same tokenizer.
Cycle      recovery, recovery, recovery, review, law, law; each branch has an update of its own: no gradients mix.
Not run here with real models; the tests run a config of this form on tiny ones.
"""

from camopd_jax.config import TrainConfig, default


def get_config():
    config = default(TrainConfig)
    config.general_model = "models/original"
    config.specialised_model = "models/medical"
    config.branches.recovery.prompts.source = "data/general/general.jsonl"
    config.branches.review.prompts.source = "data/medical/medical.jsonl"
    config.branches.law = dict(
        teacher="models/law",  # a Hugging Face folder or hub name of its own
        prompts=dict(source="data/law/law.jsonl"),
        selection=dict(by="positive_gap"),
        steps=2,
    )
    config.steps = 240
    config.optimizer.learning_rate = 2e-6
    return config
