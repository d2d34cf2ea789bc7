"""Supervised fine-tuning: makes the specialised model, if there is none yet.

    python -m camopd_jax.sft --config=configs/smollm2_sft.py --workdir=runs/smollm2_medical

Next-token cross-entropy on the answers, mean over the tokens of each batch. Models, data, checkpoints and
export work as in `camopd_jax.train`, which takes the exported folder, WORKDIR/export, as `specialised_model`.
The same command continues from the last checkpoint; on SIGTERM the run writes a checkpoint before it ends.
"""

from absl import flags

from camopd_jax.config.schema import SftConfig
from camopd_jax.runs.fine_tuning import sft
from camopd_jax.runtime import cli
from camopd_jax.runtime.start import start

if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the run, created if needed; may be a gs:// path.")
    read_config = cli.config_flag(SftConfig)
    cli.define_processes()

    def main() -> None:
        workdir = cli.required("workdir", "runs/sft")
        config = read_config()
        start(cli.processes())
        sft(config, workdir)

    cli.run(main)
