"""A model between the specialised and the original one: the weighted mean of their parameters, without any training.

    python -m camopd_jax.interpolate --config=configs/quickstart.py --weight=0.3 --out=between

--weight is the original model's share. The folder that comes out is what `evaluate --checkpoint` takes. The cheapest
way to get general ability back, and so what a trained model has to beat (WiSE-FT, arXiv 2109.01903).
"""

import jax
from absl import flags
from etils import epath

from camopd_jax import cli, engine
from camopd_jax.config import TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.export import write_folder
from camopd_jax.models import hf
from camopd_jax.processes import first
from camopd_jax.sharding import make_mesh


def interpolate(config: TrainConfig, weight: float, out: str) -> None:
    """Writes `weight * original + (1 - weight) * specialised` of a config's two models as a Hugging Face folder.

    Raises:
      UserError: if the two are not of one shape.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    general, specialised = (
        engine.load(engine.find(name, f"config.{field}"), mesh, config.compute, dtype="float32", context=1)
        for field, name in (("general_model", config.general_model), ("specialised_model", config.specialised_model))
    )
    if general.model.config != specialised.model.config:
        raise UserError(
            f"config.specialised_model: its architecture is not that of {config.general_model}; only a model made "
            "from the original can be averaged with it"
        )
    mean = jax.jit(lambda a, b: jax.tree.map(lambda x, y: weight * x + (1 - weight) * y, a, b))
    provenance = {
        "method": f"interpolation with {weight:g} of the original model",
        "general_model": config.general_model,
        "general_fingerprint": hf.fingerprint(general.folder),
        "specialised_model": config.specialised_model,
        "specialised_fingerprint": hf.fingerprint(specialised.folder),
    }
    write_folder(epath.Path(out), specialised.with_params(mean(general.params, specialised.params)), provenance)


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
        engine.start(cli.processes())
        interpolate(config, flags.FLAGS.weight, out)
        if first():
            print(f"written: {out}")

    cli.run(main)
