"""Writes an interpolation of the original and the specialised model."""

from etils import epath

from camopd_jax.config.schema import TrainConfig
from camopd_jax.inference import loading
from camopd_jax.inference.interpolation import check_architectures, interpolated
from camopd_jax.runs.export import write_folder
from camopd_jax.runtime.mesh import mesh_of


def interpolate(config: TrainConfig, weight: float, out: str) -> None:
    """Writes `weight * original + (1 - weight) * specialised` of a config's two models as a Hugging Face folder.

    Args:
      weight: of the original model, in [0, 1].

    Raises:
      UserError: if the two models have different architectures.
    """
    mesh = mesh_of(config.mesh)
    general, specialised = (
        loading.load(loading.find(name, f"config.{field}"), mesh, config.compute, dtype="float32", context=1)
        for field, name in (("general_model", config.general_model), ("specialised_model", config.specialised_model))
    )
    check_architectures(general.model.config, specialised.model.config, config.general_model)
    provenance = {
        "method": f"interpolation with {weight:g} of the original model",
        "general_model": config.general_model,
        "general_fingerprint": loading.fingerprint(general.folder),
        "specialised_model": config.specialised_model,
        "specialised_fingerprint": loading.fingerprint(specialised.folder),
    }
    mean = interpolated(general.params, specialised.params, weight)
    write_folder(epath.Path(out), specialised.with_params(mean), provenance)
