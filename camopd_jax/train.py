"""Gives a specialised model its general ability back (CaMOPD): the main job.

    python -m camopd_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m camopd_jax.train --config=configs/medqa.py --workdir=gs://bucket/medqa \\
        --config.optimizer.learning_rate=1e-6

Needs two Hugging Face checkpoints (the original model and the specialised one) and two files of
prompts; the config names them. The work directory then holds config.json, metrics.jsonl,
TensorBoard event files, samples.jsonl, selection.jsonl, eval.jsonl, checkpoints/ and, at the end, export/: the
recovered model as a Hugging Face folder.

Started again with the same command, a run goes on from its last checkpoint; SIGTERM saves one first.
"""

from absl import flags

from camopd_jax.config.schema import TrainConfig
from camopd_jax.runs.training import train
from camopd_jax.runtime import cli
from camopd_jax.runtime.start import start

if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the run, made if it is not there; gs:// paths work.")
    read_config = cli.config_flag(TrainConfig)
    cli.define_processes()

    def main() -> None:
        workdir = cli.required("workdir", "runs/quickstart")
        config = read_config()
        start(cli.processes())
        train(config, workdir)

    cli.run(main)
