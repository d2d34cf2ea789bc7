"""The text of a new config file, in the style of configs/: each value with a comment that says where it is from."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from camopd_jax.config.schema import Benchmark, TrainConfig
from camopd_jax.data import templates
from camopd_jax.data.pipeline import SELF
from camopd_jax.models.peft_settings import is_adapter
from camopd_jax.planning.costs import weights
from camopd_jax.planning.survey import Survey

if TYPE_CHECKING:
    from camopd_jax.planning.new_run import Draft

GIB = 2**30
AXES = {"recovery": "general", "review": "domain"}  # of each branch's benchmark, and in the names of its files
WIDTH = 116
JAX_SHARE = 0.75  # of a GPU's memory: what JAX takes by default


def prompts_file(branch: str) -> str:
    return f"{AXES[branch]}_prompts.jsonl"


def questions_file(branch: str) -> str:
    return f"{AXES[branch]}_test.jsonl"


def render(draft: "Draft", folder: Path, commands: Sequence[str]) -> str:
    """The config file.

    Args:
      folder: where it will be.
      commands: to run next.
    """
    body = [*_models(draft), *_prompts(draft, folder), *_method(draft), *_sizes(draft), *_evaluation(draft)]
    lines = [*_head(draft, folder, commands), *("    " + line if line else "" for line in body), "    return config"]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH - 4, initial_indent="# ", subsequent_indent="# ", break_long_words=False)


def _text(value: str) -> str:
    """A string as Python, in double quotes."""
    return json.dumps(value, ensure_ascii=False)


def _head(draft: "Draft", folder: Path, commands: Sequence[str]) -> Iterator[str]:
    size = weights(draft.models["specialised"].config) / 1e6
    stage = max(draft.sizes.memory, key=draft.sizes.memory.__getitem__)
    on = f"{len(draft.where.devices)} {draft.where.platform.upper()} device{'s' * (len(draft.where.devices) > 1)}"
    yield '"""Gives a fine-tuned model its general ability back and keeps its domain. Written by `camopd init`.'
    yield ""
    for command in commands:
        yield f"    {_plain(command)}"
    yield ""
    yield f"Models   {size:,.1f} M parameters each, {draft.models['specialised'].config.num_layers} layers"
    memory = f"{draft.sizes.peak / GIB:.2f} of {draft.hbm / GIB:.2f} GiB at most, in {stage}, on {on}"
    yield f"Memory   {memory}: an estimate, as of `plan`"
    if draft.where.platform == "gpu" and draft.sizes.peak > JAX_SHARE * draft.hbm:
        yield "         JAX takes 75 % of a GPU's memory by default: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
    yield "Fields   camopd_jax/config/schema.py describes all, docs/hyperparameters.md says what to change first"
    yield '"""'
    yield ""
    if any(one.questions for one in draft.surveys.values()):
        yield "from pathlib import Path"
        yield ""
    yield "from camopd_jax.config import TrainConfig, default"
    yield ""
    if any(one.questions for one in draft.surveys.values()):
        yield "HERE = Path(__file__).parent"
        yield ""
    yield ""
    yield "def get_config():"
    yield "    config = default(TrainConfig)"


def _plain(text: str) -> str:
    """A text that may stand in a docstring."""
    return text.replace("\\", "\\\\").replace('"""', r"\"\"\"")


def _models(draft: "Draft") -> Iterator[str]:
    config, folder = draft.config, draft.models["specialised"].folder
    yield f"config.general_model = {_text(config.general_model)}"
    yield f"config.specialised_model = {_text(config.specialised_model)}"
    if is_adapter(folder):
        yield from _comment(
            "It is a LoRA adapter: its matrices are trained and exported; the base weights are loaded once and stay as "
            "they are (docs/lora.md)."
        )
    if config.adapter is not None:
        yield from _comment("To train all weights does not fit in memory: a new LoRA adapter is trained and exported.")
        yield f"config.adapter = dict(rank={config.adapter.rank}, alpha={config.adapter.alpha:g})"
    if config.compute.teacher == "int8":
        yield 'config.compute.teacher = "int8"  # the frozen weights, which do not fit in bfloat16'


def _prompts(draft: "Draft", folder: Path) -> Iterator[str]:
    config = draft.config
    yield ""
    for branch in config.branches:
        field, one = f"config.branches.{branch}.prompts.source", draft.surveys.get(branch)
        if one is None:
            yield from _comment(
                "The original model writes the general prompts before the first step (docs/prompts.md)."
            )
            yield f"{field} = {_text(SELF)}"
            continue
        low, high = one.lengths.min(), one.lengths.max()
        yield from _comment(f"{len(one.rows)} prompts of {low} to {high} tokens, median {one.prompt_length(0.5)}")
        yield f"{field} = " + (f"str(HERE / {_text(prompts_file(branch))})" if one.questions else _text(one.source))
    yield from _template(draft)


def _template(draft: "Draft") -> Iterator[str]:
    """What the chat template makes of a prompt, and its options."""
    student, general = draft.models["specialised"], draft.models["general"]
    row = draft.surveys["review"].rows[0]
    ids = templates.prompt_ids(student.tokenizer, row, draft.config.branches["review"].prompts.template)
    text = student.tokenizer.decode(ids)
    shown = repr(text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}")
    yield from _comment("A domain prompt as the student reads it. It must look as in your fine-tuning:")
    yield from _comment(shown)
    if "messages" not in row:
        yield from _comment('Its row has "prompt" and not "messages": the chat template is not applied.')
        return
    system = 'template.system = "..." would add a system prompt to conversations without one'
    yield from _comment(f"config.branches.review.prompts.{system}")
    if student.tokenizer.chat_template != general.tokenizer.chat_template:
        yield from _comment("The chat templates of the two models differ: each model reads the prompts with its own.")
    if "enable_thinking" in str(student.tokenizer.chat_template):
        yield from _comment("The template knows answers with and without reasoning. Without:")
        for branch in draft.config.branches:
            yield f"# config.branches.{branch}.prompts.template.options = dict(enable_thinking=False)"


def _method(draft: "Draft") -> Iterator[str]:
    config = draft.config
    of = config.branches["recovery"]
    yield ""
    yield from _comment(
        "The recipe that recovered most in measurements on small models (docs/results.md). Without the lines "
        "of start and branches, it is the paper's method."
    )
    if config.start.interpolation:
        yield f"config.start.interpolation = {config.start.interpolation}  # begins a tenth of the way to the original"
    yield "for branch in config.branches.values():"
    yield f"    branch.objective = {_text(of.objective)}"
    yield f"    branch.selection.keep, branch.selection.mass = {_text(of.selection.keep)}, {of.selection.mass}"
    yield f"    branch.steps = {of.steps}  # recovery and review in turn"
    yield f"config.steps = {config.steps}  # a run says at its end if the gap was still falling"
    yield from _comment(
        "The learning rate matters most: measured 2e-4 for 0.3M parameters and 1e-5 for 135M, the paper's 2e-6 for 4B "
        "and 8B; this is the nearest" + (", times ten for an adapter" if _trains_adapter(draft) else "")
    )
    yield f"config.optimizer.learning_rate = {config.optimizer.learning_rate:.3g}"
    yield f"config.optimizer.schedule = {_text(config.optimizer.schedule)}"


def _trains_adapter(draft: "Draft") -> bool:
    return draft.config.adapter is not None or is_adapter(draft.models["specialised"].folder)


def _sizes(draft: "Draft") -> Iterator[str]:
    config = draft.config
    rollout, default, mesh = config.rollout, TrainConfig("", ""), config.mesh
    yield ""
    yield f"config.rollout.batch_size = {rollout.batch_size}  # prompts of a step"
    longer = {name: int((one.lengths > rollout.max_prompt_tokens).sum()) for name, one in draft.surveys.items()}
    dropped = ", ".join(f"{n} prompts of {name} are longer and are left out" for name, n in longer.items() if n)
    yield f"config.rollout.max_prompt_tokens = {rollout.max_prompt_tokens}  # " + (dropped or "all prompts fit")
    yield from _comment(_answer_comment(draft.surveys))
    yield f"config.rollout.max_response_tokens = {rollout.max_response_tokens}"
    yield from _comment(
        "By the memory estimate. If memory runs out: a smaller micro_batch (in the gradient), a smaller concurrency "
        "(while answers are sampled), shorter answers (docs/own_model.md)."
    )
    yield f"config.optimizer.micro_batch = {config.optimizer.micro_batch}"
    yield f"config.compute.remat = {_text(config.compute.remat)}"
    if rollout.concurrency:
        yield f"config.rollout.concurrency = {rollout.concurrency}  # answers in progress at a time"
    for axis in ("fsdp", "tensor", "expert"):
        if (size := getattr(mesh, axis)) != 1:
            yield f"config.mesh.{axis} = {size}"
    if rollout.mesh.tensor not in (0, mesh.tensor):
        yield f"config.rollout.mesh.tensor = {rollout.mesh.tensor}"
    if config.evaluation.batch_size != default.evaluation.batch_size:
        yield f"config.evaluation.batch_size = {config.evaluation.batch_size}"


def _answer_comment(surveys: dict[str, Survey]) -> str:
    parts = [
        f"99 % of the answers in the {AXES[name]} file have at most {length} tokens"
        for name, one in surveys.items()
        if (length := one.answer_length()) is not None
    ]
    if len(parts) < len(AXES):
        parts.append("512, or what the models' maximum leaves, where the data give no answers")
    return "; ".join(parts) + ". An answer that is cut has no end to learn from; longer caps take more memory."


def _evaluation(draft: "Draft") -> Iterator[str]:
    config = draft.config
    evaluation = config.evaluation
    yield ""
    yield f"config.checkpoints.every = {config.checkpoints.every}"
    if evaluation.every:
        yield f'config.checkpoints.export = "{config.checkpoints.export}"  # which keeps the domain and has most back'
        yield f"config.evaluation.every = {evaluation.every}"
        yield f"config.evaluation.questions = {evaluation.questions}  # during training"
        yield f"config.evaluation.patience = {evaluation.patience}  # evaluations without a new best, then the run ends"
    if evaluation.benchmarks:
        yield from _comment(
            "Questions held out of your files. If your fine-tuning has seen them, use others: the domain looks better "
            "than it is."
        )
    missing = [axis for axis in AXES.values() if axis not in {one.axis for one in evaluation.benchmarks}]
    for axis in missing:
        yield from _comment(_NO_BENCHMARK[axis])
    if missing:
        yield from _comment("After adding one (docs/evaluation.md), let it choose the best checkpoint:")
        yield '# config.checkpoints.export, config.evaluation.every, config.evaluation.patience = "best", 40, 4'
    yield "config.evaluation.benchmarks = ("
    for one, branch in ((one, _branch(one.axis)) for one in evaluation.benchmarks):
        fields = f"name={_text(one.name)}, task={_text(one.task)}, axis={_text(one.axis)}, covered=True"
        yield from (f"    # {line}" for line in textwrap.wrap(_TASKS[one.task], WIDTH - 10))
        yield "    dict("
        yield f"        {fields},"
        yield f"        source=str(HERE / {_text(questions_file(branch))}),"
        yield f"        max_response_tokens={one.max_response_tokens},"
        if one.answer != Benchmark.answer:
            yield f"        answer={_text(one.answer)},"
        yield "    ),"
    for axis in missing:
        yield from (f"    # {line}" for line in _EXAMPLES[axis])
    yield ")"


def _branch(axis: str) -> str:
    return next(branch for branch, name in AXES.items() if name == axis)


_TASKS = {
    "choice": 'the letter after the last "Final answer:" counts; if your model answers otherwise, set '
    'instruction="..." or task="exact"',
    "gsm8k": 'asks for the form "Final answer: <number>" and compares the number',
    "exact": "the answer must be equal to the given one",
    "likelihood": "nothing is sampled: the likelihood of the given answers, which are too long to be repeated exactly",
}
_NO_BENCHMARK = {
    "general": "No general file with answers was given, so nothing measures what came back. Add benchmarks of what you "
    "miss, such as these from the hub (pip install 'camopd_jax[eval]'):",
    "domain": "The domain file has too few answers to hold questions out, so nothing measures what was kept. Add a "
    'file of rows with a prompt and an "answer":',
}
_EXAMPLES = {
    "general": (
        'dict(name="ifeval", task="ifeval", max_response_tokens=1024),',
        'dict(name="gsm8k", task="gsm8k", limit=200, max_response_tokens=1024),',
    ),
    "domain": ('dict(name="domain", task="exact", axis="domain", source="data/domain_test.jsonl"),',),
}
