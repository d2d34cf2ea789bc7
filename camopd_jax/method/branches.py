"""The models of a run, and the branches that they teach."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from camopd_jax.config.schema import TrainConfig
from camopd_jax.data import templates
from camopd_jax.data.pipeline import PromptStream
from camopd_jax.data.templates import Tokenizers
from camopd_jax.inference import loading
from camopd_jax.inference.loading import Loaded
from camopd_jax.inference.model_check import check_log_probs
from camopd_jax.method.objectives import Objective
from camopd_jax.method.setup import Setup, check_model
from camopd_jax.models import hf
from camopd_jax.runtime.mesh import rows_of_process
from camopd_jax.runtime.offload import Offloaded
from camopd_jax.types import LanguageModel, Params


class Teacher:
    """A frozen model. Once it is offloaded, its parameters are on the devices between `fetch` and `release` alone."""

    def __init__(self, model: LanguageModel, params: Params):
        self.model = model
        self._params = params
        self._offloaded: Offloaded | None = None

    def offload(self) -> None:
        """Moves the parameters to host memory, if they are not there yet."""
        if self._offloaded is None:
            self._offloaded, self._params = Offloaded(self._params), None

    def fetch(self) -> Params:
        """The parameters on the devices. A copy that has to be made goes on while other work is asked for."""
        return self._params if self._offloaded is None else self._offloaded.fetch()

    def release(self) -> None:
        """Gives up the parameters' place on the devices, if they are offloaded."""
        if self._offloaded is not None:
            self._offloaded.release()


@dataclass(frozen=True)
class Branch:
    """What a branch has for itself."""

    name: str
    prompts: PromptStream  # of the host
    teacher: Teacher
    objective: Objective


@dataclass(frozen=True)
class Models:
    """A run's models. The student starts as a copy of the specialised one."""

    general: Loaded
    specialised: Loaded
    student: Loaded
    others: dict[str, Loaded]  # further teachers, as branches name them
    warnings: tuple[str, ...]  # on their tokenizers

    def teacher(self, name: str) -> Loaded:
        """The model that a branch's `teacher` names."""
        return {"general": self.general, "specialised": self.specialised, **self.others}[name]

    def provenance(self, config: TrainConfig) -> dict[str, str]:
        """Where the models come from, for checkpoints and model cards."""
        facts = {
            "general_model": config.general_model,
            "general_fingerprint": hf.fingerprint(self.general.folder),
            "specialised_model": config.specialised_model,
            "specialised_fingerprint": hf.fingerprint(self.specialised.folder),
        }
        for name, loaded in self.others.items():
            branches = [branch for branch, of in config.branches.items() if of.teacher == name]
            facts |= {f"teacher_of_{branches[0]}": name, f"{branches[0]}_fingerprint": hf.fingerprint(loaded.folder)}
        return facts


def teacher_names(config: TrainConfig) -> dict[str, str]:
    """Of each model that teaches or that the student starts as: the field that names it, by what branches call it."""
    names = {"general": "config.general_model", "specialised": "config.specialised_model"}
    for branch, of in config.branches.items():
        names.setdefault(of.teacher, f"config.branches.{branch}.teacher")
    return names


def find_models(config: TrainConfig) -> dict[str, Path]:
    """The folders of `teacher_names`.

    Raises:
      UserError: for one that is not there.
    """
    return {name: find_model(config, name, field) for name, field in teacher_names(config).items()}


def find_model(config: TrainConfig, name: str, field: str, files: Sequence[str] = loading.CHECKPOINT) -> Path:
    """The folder of one of `teacher_names`, with these files."""
    own = {"general": config.general_model, "specialised": config.specialised_model}
    return loading.find(own.get(name, name), field, files)


def load_models(setup: Setup) -> Models:
    """Reads the models onto the mesh.

    Raises:
      UserError: for checkpoints that are not there or broken, for tokenizers that differ, and for models that the mesh
        does not divide.
    """
    config = setup.config
    folders = find_models(config)
    student = folders["specialised"]
    others = [folder for name, folder in folders.items() if name != "specialised"]
    warnings = [templates.check_same_tokenizer(student, folder) for folder in others]
    configs = {name: loading.model_config(folder, setup.context) for name, folder in folders.items()}
    for model in configs.values():
        check_model(model, setup.mesh, config.compute, setup.dtype)
    vocab = min(model.vocab_size for model in configs.values())

    def load(folder: Path, dtype: str) -> Loaded:
        return loading.load(
            folder, setup.mesh, config.compute, dtype=dtype, context=setup.context, output_vocab_size=vocab
        )

    teachers = {name: load(folder, setup.teacher_dtype) for name, folder in folders.items()}
    return Models(
        general=teachers.pop("general"),
        specialised=teachers.pop("specialised"),
        student=load(student, config.compute.params),
        others=teachers,
        warnings=tuple(warning for warning in warnings if warning),
    )


def check_models(setup: Setup, models: Models, branches: dict[str, Branch]) -> None:
    """Checks every model on prompts that it will read.

    Raises:
      UserError: naming the model whose log-probabilities are not finite, or depend on other rows of their batch.
    """
    config = setup.config
    own = {"general": config.general_model, "specialised": config.specialised_model}
    for name, field in teacher_names(config).items():
        taught = [
            prompt.teacher
            for key, branch in branches.items()
            if config.branches[key].teacher == name
            for prompt in branch.prompts.first
        ]
        student = [prompt.student for branch in branches.values() for prompt in branch.prompts.first]
        check_log_probs(models.teacher(name), f"{field} = {own.get(name, name)}", taught or student)


def make_teachers(config: TrainConfig, models: Models) -> dict[str, Teacher]:
    """Of each branch its teacher; branches that name the same model share one."""
    by_name = {branch.teacher: models.teacher(branch.teacher) for branch in config.branches.values()}
    teachers = {name: Teacher(loaded.model, loaded.params) for name, loaded in by_name.items()}
    return {name: teachers[branch.teacher] for name, branch in config.branches.items()}


def make_branches(
    setup: Setup, models: Models, teachers: dict[str, Teacher], rows: dict[str, int], seed: int
) -> dict[str, Branch]:
    """The branches of a config, in its order.

    Args:
      rows: prompts of each branch's batch.
      seed: of the order of the prompts.
    """
    config = setup.config

    def branch(number: int, name: str) -> Branch:
        rollout = dataclasses.replace(config.rollout, batch_size=rows[name])
        teacher = models.teacher(config.branches[name].teacher)
        own_rows = rows_of_process(setup.mesh, rows[name])
        prompts = PromptStream(
            config.branches[name].prompts,
            rollout,
            Tokenizers(models.student.tokenizer, teacher.tokenizer),
            len(config.branches) * seed + number,
            own_rows,
            f"config.branches.{name}.prompts",
        )
        return Branch(name, prompts, teachers[name], setup.objectives[name])

    return {name: branch(number, name) for number, name in enumerate(config.branches)}
