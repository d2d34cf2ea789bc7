"""The recipe for getting as much back as possible, from two models and the prompts of your domain.

Prompts    those of your domain. The original model writes the general ones itself, before the first step; name files
           of your own in place of "self" if you have them (`python -m camopd_jax.prompts self` writes a file to add).
Command    python -m camopd_jax.train --config=configs/recover.py --workdir=runs/recover
Models     the original model, and a fine-tune of it with the same architecture
Benchmarks give those of your domain, with axis "domain": they choose the best checkpoint.
Hardware   sizes for 8 chips and a model of 1 to 8 billion parameters; `doctor` checks them, `plan` finds others.
Measured   on the quickstart's models, five seeds: 94 % of the loss back on the skills of the prompts at hand and 100 %
           on the others, once prompts cover them too, and 96 % of the domain kept; vanilla 87, 99 and 97 %. With four
           times the steps and the settings for long runs below, 96, 100 and 99 % (docs/results.md, "Prompts that the
           original writes itself").
Not run    on models of this size.
"""

from camopd_jax.config import TrainConfig, default


def get_config():
    config = default(TrainConfig)
    config.general_model = "models/original"
    config.specialised_model = "models/specialised"
    config.branches.recovery.prompts.source = "self"  # into WORKDIR/self_prompts/recovery: read them
    config.branches.recovery.prompts.writing.rows = 10_000
    config.branches.review.prompts.source = "data/domain.jsonl"
    # Prompts decide what comes back: the skills that only the self-written ones covered went from 36 to 100 %. A start
    # between the models helps what no prompt covers (68 instead of 36 %) and costs up to 4 % of the domain, before the
    # first step. "auto" measures that and was careful: it chose 0.05 there.
    config.start.interpolation = 0.1
    # With the divergence over the full vocabulary, and half of the answers in place of the few with 80 % of the gap
    # mass, 95 instead of 87 % came back where prompts covered it, at the same number of steps and sampled answers.
    for branch in config.branches.values():
        branch.objective = "reverse_kl"
        branch.selection.keep = "fraction"
        branch.selection.mass = 0.5
        branch.steps = 1  # as many reviews as recoveries: 98 instead of 97 % of the domain was kept
    # For long runs (there: 720 steps and more), every answer and a stronger review, with review.scale = 8. They keep
    # 99 instead of 96 % of the domain, and take more steps to bring back as much.
    # A warm-up on the teachers' answers made no difference on the quickstart's models, where the student's own answers
    # are in the right form from the start. It is worth a trial where they are not: 84 updates at 1e-5 in DN-MOPD.
    config.warm_up.steps = 0
    # After 240 steps of the quickstart the gap of recovery still fell; a run says so at its end.
    config.steps = 400
    config.optimizer.learning_rate = 2e-6
    config.optimizer.schedule = "cosine"  # ends without the noise of the last steps, so no average is needed
    config.rollout.batch_size = 64
    config.rollout.max_prompt_tokens = 1024
    config.rollout.max_response_tokens = 1024
    config.mesh.fsdp = -1
    config.mesh.data = 1
    config.checkpoints.every = 40
    config.checkpoints.export = "best"  # the highest recovery that keeps the domain up to one standard error
    config.evaluation.every = 40
    config.evaluation.patience = 4  # ends the run after 160 steps without a new best checkpoint
    config.evaluation.questions = 128
    config.evaluation.benchmarks = (
        dict(name="ifeval", task="ifeval", max_response_tokens=1024),
        dict(name="gsm8k", task="gsm8k", limit=200, max_response_tokens=1024),
        dict(name="domain", task="exact", axis="domain", source="data/domain_test.jsonl"),
    )
    return config
