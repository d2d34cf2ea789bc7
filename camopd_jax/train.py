"""Gives a specialised model its general ability back (CaMOPD): the main job.

    python -m camopd_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m camopd_jax.train --config=configs/medqa.py --workdir=gs://bucket/medqa \\
        --config.optimizer.learning_rate=1e-6

The config names two Hugging Face checkpoints (the original model and the specialised one) and two files
of prompts. The work directory gets config.json, metrics.jsonl, tensorboard/, samples.jsonl,
selection.jsonl, eval.jsonl, checkpoints/ and, at the end, report.html and export/, the recovered model as
a Hugging Face folder.

The same command continues from the last checkpoint; on SIGTERM the run writes a checkpoint before it ends.
"""

from contextlib import nullcontext
from functools import partial

from absl import flags

from camopd_jax.config.schema import TrainConfig
from camopd_jax.planning import ahead
from camopd_jax.planning.memory import prepare_run
from camopd_jax.runs.training import train
from camopd_jax.runtime import cli
from camopd_jax.runtime.distributed import is_primary
from camopd_jax.runtime.progress import work
from camopd_jax.runtime.start import start

if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the run, created if needed; may be a gs:// path.")
    read_config = cli.config_flag(TrainConfig)
    cli.define_processes()

    def main() -> None:
        workdir = cli.required("workdir", "runs/quickstart")
        config = read_config()
        start(cli.processes())
        with work("choosing the compute settings"):
            choice = prepare_run(config, workdir)
        if choice.values and is_primary():
            print(choice, flush=True)
        known = partial(ahead.known_programs, choice.config)
        with ahead.compiling(known) if ahead.is_on(choice.config) else nullcontext(lambda: None) as wait:
            train(choice.config, workdir, wait)

    cli.run(main)
