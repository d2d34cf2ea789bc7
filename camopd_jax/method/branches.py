"""The three models of a run, and the two branches that they teach."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh

from camopd_jax.config.schema import TrainConfig
from camopd_jax.data import templates
from camopd_jax.data.pipeline import PromptStream
from camopd_jax.data.templates import Tokenizers
from camopd_jax.inference import loading
from camopd_jax.inference.loading import Loaded
from camopd_jax.method.loop import Branch
from camopd_jax.models import hf
from camopd_jax.runtime.mesh import rows_of_process

STREAMS = {"recovery": "general", "review": "domain"}  # of each branch: its prompts' field of a TrainConfig


@dataclass(frozen=True)
class Models:
    """A run's models. The student starts as a copy of the specialised one."""

    general: Loaded
    specialised: Loaded
    student: Loaded
    warning: str | None  # on their tokenizers

    def provenance(self, config: TrainConfig) -> dict[str, str]:
        """Where the two come from, for checkpoints and model cards."""
        return {
            "general_model": config.general_model,
            "general_fingerprint": hf.fingerprint(self.general.folder),
            "specialised_model": config.specialised_model,
            "specialised_fingerprint": hf.fingerprint(self.specialised.folder),
        }


def load_models(config: TrainConfig, mesh: Mesh) -> Models:
    """Reads the three onto the mesh.

    Raises:
      UserError: for checkpoints that are not there or broken, and for tokenizers that differ.
    """
    general = loading.find(config.general_model, "config.general_model")
    specialised = loading.find(config.specialised_model, "config.specialised_model")
    warning = templates.check_same_tokenizer(specialised, general)
    context = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    vocab = min(loading.model_config(folder, context).vocab_size for folder in (general, specialised))

    def load(folder: Path, dtype: str) -> Loaded:
        return loading.load(folder, mesh, config.compute, dtype=dtype, context=context, output_vocab_size=vocab)

    teacher = loading.teacher_dtype(config.compute)
    return Models(load(general, teacher), load(specialised, teacher), load(specialised, config.compute.params), warning)


def make_branches(
    config: TrainConfig, models: Models, mesh: Mesh, rows: dict[str, int], seed: int
) -> dict[str, Branch]:
    """Recovery: general prompts and the original model. Review: domain prompts and the specialised one.

    Args:
      rows: prompts of each branch's batch.
      seed: of the order of the prompts.
    """
    teachers = {"recovery": models.general, "review": models.specialised}
    if config.method.domain_teacher == "general":
        teachers["review"] = models.general

    def branch(name: str, stream: str, number: int) -> Branch:
        rollout = dataclasses.replace(config.rollout, batch_size=rows[name])
        tokenizers = Tokenizers(models.student.tokenizer, teachers[name].tokenizer)
        mine = rows_of_process(mesh, rows[name])
        prompts = PromptStream(
            getattr(config, stream), rollout, tokenizers, 2 * seed + number, mine, f"config.{stream}"
        )
        return Branch(prompts, teachers[name].model, teachers[name].params)

    return {name: branch(name, stream, number) for number, (name, stream) in enumerate(STREAMS.items())}
