"""Supervised fine-tuning: makes the specialised model where there is none yet.

    python -m camopd_jax.sft --config=configs/smollm2_sft.py --workdir=runs/smollm2_medical

Next-token cross-entropy on the answers, token mean over each batch. Same models, data, checkpoints and
export as the main job; the work directory ends with export/, which `camopd_jax.train` takes as
`specialised_model`. The same command goes on from the last checkpoint; SIGTERM saves one first.
"""

from absl import flags

from camopd_jax.config.schema import SftConfig
from camopd_jax.runs.fine_tuning import sft
from camopd_jax.runtime import cli
from camopd_jax.runtime.start import start

if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the run, made if it is not there; gs:// paths work.")
    read_config = cli.config_flag(SftConfig)
    cli.define_processes()

    def main() -> None:
        workdir = cli.required("workdir", "runs/sft")
        config = read_config()
        start(cli.processes())
        sft(config, workdir)

    cli.run(main)
