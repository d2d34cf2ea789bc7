"""camopd_jax: gives a specialised LLM its general ability back, from prompts alone."""

__version__ = "0.2.0.dev0"
