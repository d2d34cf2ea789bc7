"""The weighted mean of the parameters of the specialised and the original model, without training.

    python -m camopd_jax.interpolate --config=configs/quickstart.py --weight=0.3 --out=between

--weight is the original model's share. The result is a Hugging Face folder, which `evaluate --checkpoint` takes. It is
the cheapest way to get general ability back, so the baseline for trained models (WiSE-FT, arXiv 2109.01903).
"""

from absl import flags
from etils import epath

from camopd_jax.config.schema import TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.runs.interpolation import interpolate
from camopd_jax.runtime import cli
from camopd_jax.runtime.distributed import is_primary
from camopd_jax.runtime.start import start

if __name__ == "__main__":
    flags.DEFINE_float("weight", 0.5, "Share of the original model.", 0.0, 1.0)
    flags.DEFINE_string("out", None, "Folder to write; must not exist.")
    read_config = cli.config_flag(TrainConfig)
    cli.define_processes()

    def main() -> None:
        out = cli.required("out", "between")
        if epath.Path(out).exists():
            raise UserError(f"--out: {out} exists; give a new folder")
        config = read_config()
        start(cli.processes())
        interpolate(config, flags.FLAGS.weight, out)
        if is_primary():
            print(f"written: {out}")

    cli.run(main)
