"""The configs of runs: frozen dataclasses, built from the `ConfigDict` that a config file returns.

Config files need two names from here:

    from camopd_jax.config import TrainConfig, default
"""

from camopd_jax.config.build import default as default
from camopd_jax.config.schema import SftConfig as SftConfig
from camopd_jax.config.schema import TrainConfig as TrainConfig
