"""The models of a run, and its branches."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from camopd_jax.config.schema import TrainConfig
from camopd_jax.data import templates
from camopd_jax.data.pipeline import AnsweredStream, PromptStream
from camopd_jax.data.templates import Tokenizers
from camopd_jax.inference import loading
from camopd_jax.inference.loading import Loaded
from camopd_jax.inference.model_check import check_log_probs
from camopd_jax.method.objectives import Objective
from camopd_jax.method.setup import Setup, check_model, check_start
from camopd_jax.models import hf
from camopd_jax.models.peft_settings import base_folder, is_adapter
from camopd_jax.runtime.mesh import rows_of_process
from camopd_jax.runtime.offload import Offloaded
from camopd_jax.types import LanguageModel, Params


class Teacher:
    """A frozen model. If it is offloaded, its parameters are on the devices only between `fetch` and `release`."""

    def __init__(self, model: LanguageModel, params: Params):
        self.model = model
        self._params = params  # if offloaded, those that stay on the devices; None in place of the others
        self._offloaded: Offloaded | None = None

    def offload(self, others: Sequence[Params] = ()) -> None:
        """Moves the parameters to host memory, unless they are there.

        Args:
          others: all parameters of the other models. Arrays that are among them too stay on the devices.
        """
        if self._offloaded is not None:
            return
        shared = {id(array) for array in jax.tree.leaves(others)}
        own = jax.tree.map(lambda array: None if id(array) in shared else array, self._params)
        self._params = jax.tree.map(lambda array: array if id(array) in shared else None, self._params)
        self._offloaded = Offloaded(own)

    def fetch(self) -> Params:
        """The parameters on the devices. Returns at once; a copy from the host runs in the background."""
        if self._offloaded is None:
            return self._params
        own, shared = self._offloaded.fetch(), self._params
        return jax.tree.map(lambda a, b: b if a is None else a, own, shared, is_leaf=lambda leaf: leaf is None)

    @property
    def params(self) -> Params:
        """The parameters, or if it is offloaded, those that stay on the devices."""
        return self._params

    def release(self) -> None:
        """Frees the parameters' memory on the devices, if they are offloaded."""
        if self._offloaded is not None:
            self._offloaded.release()


@dataclass(frozen=True)
class Branch:
    """The prompts, teacher and objective of a branch."""

    name: str
    prompts: PromptStream | AnsweredStream  # this process's rows of each batch
    teacher: Teacher
    objective: Objective


@dataclass(frozen=True)
class Models:
    """The models of a run. The student is a copy of the specialised model, until `runs.start` moves it to its start."""

    general: Loaded
    specialised: Loaded
    student: Loaded
    others: dict[str, Loaded]  # further teachers, by their names in the branches
    warnings: tuple[str, ...]  # about the models and their tokenizers

    def teacher(self, name: str) -> Loaded:
        """The model with the name in a branch's field `teacher`."""
        return {"general": self.general, "specialised": self.specialised, **self.others}[name]

    def provenance(self, config: TrainConfig) -> dict[str, str]:
        """Names and fingerprints of the models, for checkpoints and model cards."""
        facts = {
            "general_model": config.general_model,
            "general_fingerprint": loading.fingerprint(self.general.folder),
            "specialised_model": config.specialised_model,
            "specialised_fingerprint": loading.fingerprint(self.specialised.folder),
        }
        for name, loaded in self.others.items():
            branches = [branch for branch, of in config.branches.items() if of.teacher == name]
            facts |= {
                f"teacher_of_{branches[0]}": name,
                f"{branches[0]}_fingerprint": loading.fingerprint(loaded.folder),
            }
        return facts


def teacher_names(config: TrainConfig) -> dict[str, str]:
    """The models to load: {name in the branches: config field that gives it}. The student starts as "specialised"."""
    names = {"general": "config.general_model", "specialised": "config.specialised_model"}
    for branch, of in config.branches.items():
        names.setdefault(of.teacher, f"config.branches.{branch}.teacher")
    return names


def find_models(config: TrainConfig) -> dict[str, Path]:
    """The folder of each model in `teacher_names`.

    Raises:
      UserError: if a model does not exist.
    """
    return {name: find_model(config, name, field) for name, field in teacher_names(config).items()}


def find_model(config: TrainConfig, name: str, field: str, files: Sequence[str] = loading.CHECKPOINT) -> Path:
    """The folder of one model in `teacher_names`; from the hub, only these files are downloaded."""
    return loading.find(model_source(config, name), field, files)


def model_source(config: TrainConfig, name: str) -> str:
    """The Hugging Face folder or hub name of one model in `teacher_names`."""
    return {"general": config.general_model, "specialised": config.specialised_model}.get(name, name)


def load_models(setup: Setup) -> Models:
    """Loads the models onto the mesh.

    Raises:
      UserError: for missing or damaged checkpoints, different tokenizers, and models that the mesh does not divide.
    """
    config = setup.config
    folders = find_models(config)
    student = folders["specialised"]
    loading.check_adapter(config.adapter, student, "config.specialised_model")
    others = [folder for name, folder in folders.items() if name != "specialised"]
    shared = templates.shared_vocabulary(student, others)
    of_pair = loading.pair_warning(folders["general"], student)
    configs = {name: loading.model_config(folder, setup.context) for name, folder in folders.items()}
    for model in configs.values():
        check_model(model, setup.mesh, config.compute, setup.dtype)
    check_start(config, configs, student)
    vocab = min(model.vocab_size for model in configs.values())
    vocab = vocab if shared.size is None else min(vocab, shared.size)

    def load(folder: Path, dtype: str) -> Loaded:
        return loading.load(
            folder, setup.mesh, config.compute, dtype=dtype, context=setup.context, output_vocab_size=vocab
        )

    teachers = load_teachers(folders, setup.teacher_dtype, load)
    if config.adapter is not None:
        trained = loading.with_trained_adapter(teachers["specialised"], student, config)
    elif teachers["specialised"].adapter is not None:
        trained = loading.with_trained_matrices(teachers["specialised"], config.compute.params)
    else:
        trained = load(student, config.compute.params)
    return Models(
        general=teachers.pop("general"),
        specialised=teachers.pop("specialised"),
        student=trained,
        others=teachers,
        warnings=shared.warnings + (() if of_pair is None else (of_pair,)),
    )


def load_teachers(folders: dict[str, Path], dtype: str, load: Callable[[Path, str], Loaded]) -> dict[str, Loaded]:
    """Loads frozen models. Adapters of the same base model share its arrays, also with that model itself.

    Args:
      folders: by name.
      load: loads a folder that is no adapter, in a dtype.
    """
    loaded = {name: load(folder, dtype) for name, folder in folders.items() if not is_adapter(folder)}
    bases = {} if len(loaded) == len(folders) else {hf.fingerprint(of.folder): of for of in loaded.values()}
    for name, folder in folders.items():
        if is_adapter(folder):
            base = base_folder(folder)
            key = hf.fingerprint(base)
            bases[key] = bases.get(key) or load(base, dtype)
            loaded[name] = loading.with_adapter(bases[key], folder, dtype)
    return {name: loaded[name] for name in folders}


def check_models(setup: Setup, models: Models, branches: dict[str, Branch]) -> None:
    """Checks every model on prompts that it will read.

    Raises:
      UserError: naming the model whose log-probabilities are not finite, or depend on other rows of their batch.
    """
    config = setup.config
    read_by_student = [prompt.student for branch in branches.values() for prompt in branch.prompts.first]
    for name, field in teacher_names(config).items():
        taught = [
            prompt.teacher
            for key, branch in branches.items()
            if config.branches[key].teacher == name
            for prompt in branch.prompts.first
        ]
        check_log_probs(models.teacher(name), f"{field} = {model_source(config, name)}", taught or read_by_student)


def make_teachers(config: TrainConfig, models: Models) -> dict[str, Teacher]:
    """The teacher of each branch. Branches with the same model share one `Teacher`."""
    by_name = {branch.teacher: models.teacher(branch.teacher) for branch in config.branches.values()}
    teachers = {name: Teacher(loaded.model, loaded.params) for name, loaded in by_name.items()}
    return {name: teachers[branch.teacher] for name, branch in config.branches.items()}


def offload_teachers(teachers: Iterable[Teacher], student: Params) -> None:
    """Moves teachers to host memory, except for the arrays that they share with each other or the student."""
    every = {teacher: teacher.params for teacher in teachers}
    for teacher in every:
        teacher.offload([student, *(params for other, params in every.items() if other is not teacher)])


def make_branches(
    setup: Setup, models: Models, teachers: dict[str, Teacher], rows: dict[str, int], seed: int
) -> dict[str, Branch]:
    """The branches of a config, in its order.

    Args:
      rows: answers in a batch of each branch.
      seed: for the order of the prompts.
    """
    config = setup.config

    def branch(number: int, name: str) -> Branch:
        rollout = dataclasses.replace(config.rollout, batch_size=rows[name] // config.rollout.answers_per_prompt)
        teacher = models.teacher(config.branches[name].teacher)
        own_rows = rows_of_process(setup.mesh, rows[name])
        prompts = PromptStream(
            config.branches[name].prompts,
            rollout,
            Tokenizers(models.student.reader, teacher.reader),
            len(config.branches) * seed + number,
            own_rows,
            f"config.branches.{name}.prompts",
        )
        return Branch(name, prompts, teachers[name], setup.objectives[name])

    return {name: branch(number, name) for number, name in enumerate(config.branches)}
