"""The methods that CaMOPD is compared with. Each is the same run with other values in some fields of its config."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from camopd_jax.config.schema import (
    BranchConfig,
    Method,
    RolloutConfig,
    Start,
    TeacherSampling,
    TrainConfig,
    WarmUp,
)


@dataclass(frozen=True)
class NamedMethod:
    """A method to compare: a description, and the fields of a `TrainConfig` that differ from CaMOPD's."""

    about: str
    changes: dict[str, Any] = field(default_factory=dict)


_BRANCHES = ("recovery", "review")


def _both(field_name: str, value: Any) -> dict[str, Any]:
    return {f"branches.{branch}.{field_name}": value for branch in _BRANCHES}


_ONE_TO_ONE = _both("steps", 1)
_MIXED = {"method.schedule": "mixed", **_ONE_TO_ONE}
_EVERY_ANSWER = _both("selection.mass", 1.0)
_EQUAL_PULL = {"branches.recovery.scale": 1.0}
_CROSS_ENTROPY = {"method.answers": "teacher", **_both("objective", "cross_entropy")}
_TEACHERS_ANSWERS = {**_CROSS_ENTROPY, **_EVERY_ANSWER, **_EQUAL_PULL}
_AVERAGE = {"optimizer.average": 0.95}
_WARM_UP = {"warm_up.steps": 20}
_HALF = {**_both("selection.keep", "fraction"), **_both("selection.mass", 0.5)}
_START = {"start.interpolation": 0.1}
_RECOVER = {**_both("objective", "reverse_kl"), **_ONE_TO_ONE, **_START}
_VANILLA = {**_MIXED, **_EVERY_ANSWER, **_EQUAL_PULL}
_TOKEN_MEAN = {"method.normalise": "token"}
_EXPLORED = {
    "rollout.answers_per_prompt": 4, "rollout.exploration": (1.5, 0.9), **_both("selection.keep", "density"),
}  # fmt: skip


def _vanilla(
    about: str, objective: str = "sampled_token", weights: tuple[str, ...] = (), **rollout: float | str
) -> NamedMethod:
    """Vanilla with another objective or token weights in both branches, and with other fields of the rollout."""
    changes = _both("objective", objective) | _both("weights", weights)
    changes |= {f"rollout.{name}": value for name, value in rollout.items()}
    return NamedMethod(f"vanilla with {about}", {**_VANILLA, **changes})


# CaMOPD, its parts and its controls: the study of docs/results.md
_STUDY = {
    "camopd": NamedMethod("CaMOPD as the paper has it: alternating 3:1, mass 0.8, pull 2 and 1"),
    "vanilla": NamedMethod("vanilla MOPD: both streams in each step 1:1, every answer, equal pull", _VANILLA),
    # -------------------------------------------------- CaMOPD's parts: vanilla with one, CaMOPD without one
    "mixed-3-1": NamedMethod("vanilla with prompts 3:1", {**_VANILLA, "branches.recovery.steps": 3}),
    "alternating": NamedMethod("CaMOPD without selection", _EVERY_ANSWER),
    "alternating-r1": NamedMethod("CaMOPD without selection, equal pull", {**_EVERY_ANSWER, **_EQUAL_PULL}),
    "camopd-r1": NamedMethod("CaMOPD, equal pull", _EQUAL_PULL),
    "selection": NamedMethod("vanilla with selection", {**_MIXED, **_EQUAL_PULL}),
    "pull-2": NamedMethod("vanilla with pull 2 of recovery", {**_MIXED, **_EVERY_ANSWER}),
    # ------------------------------------------------------------------------------------ its settings
    "camopd-1-1": NamedMethod("CaMOPD alternating 1:1", _ONE_TO_ONE),
    "camopd-5-1": NamedMethod("CaMOPD alternating 5:1", {"branches.recovery.steps": 5}),
    "mass-0.6": NamedMethod("CaMOPD with mass 0.6", _both("selection.mass", 0.6)),
    # ------------------------------------------------------------------------- which answers are kept
    "half": NamedMethod("CaMOPD keeping the half with the largest gaps", _HALF),
    "random": NamedMethod("CaMOPD keeping as many answers, chosen at random", _both("selection.keep", "random")),
    "scores-swapped": NamedMethod(
        "CaMOPD ranking recovery by positive gaps and review by absolute ones",
        {"branches.recovery.selection.by": "positive_gap", "branches.review.selection.by": "absolute_gap"},
    ),
    # --------------------------------------------------------------------------------- the optimizer
    "moments": NamedMethod("CaMOPD with Adam moments for each branch", {"method.moments": "separate"}),
    "no-clip": NamedMethod("CaMOPD without clipping of the gradient's norm", {"optimizer.clip_norm": None}),
    "no-clip-r1": NamedMethod("CaMOPD without clipping, equal pull", {**_EQUAL_PULL, "optimizer.clip_norm": None}),
    "vanilla-no-clip": NamedMethod("vanilla without clipping", {**_VANILLA, "optimizer.clip_norm": None}),
    "pcgrad": NamedMethod("vanilla with PCGrad", {**_VANILLA, "method.conflict": "pcgrad"}),
    # ------------------------------------------------------------------------------------ one teacher
    "recovery-only": NamedMethod("recovery in every step", {"branches.recovery.steps": 1, "branches.review.steps": 0}),
    "review-only": NamedMethod("review in every step", {"branches.recovery.steps": 0}),
    "one-teacher": NamedMethod("vanilla with the original model teaching both streams",
                               {**_VANILLA, "branches.review.teacher": "general"}),
    # -------------------------------------------------------------------------------- teachers' answers
    "distillation": NamedMethod("cross-entropy on the original model's answers to general prompts",
                                {**_TEACHERS_ANSWERS, "branches.recovery.steps": 1, "branches.review.steps": 0}),
    "replay-50": NamedMethod("cross-entropy on teachers' answers, 50 % of them general",
                             {**_TEACHERS_ANSWERS, **_MIXED}),
    "replay-12": NamedMethod("cross-entropy on teachers' answers, 12.5 % of them general",
                             {**_TEACHERS_ANSWERS, **_MIXED, "branches.review.steps": 7}),
}  # fmt: skip

# Objectives, token weights and updates of other papers (docs/objectives.md), with vanilla's schedule if they have none
_NEIGHBOURS = {
    "reverse-kl": _vanilla("reverse KL over the full vocabulary (GKD, arXiv 2306.13649)", "reverse_kl"),
    "forward-kl": _vanilla("forward KL over the full vocabulary (GKD, arXiv 2306.13649)", "forward_kl"),
    "jsd": _vanilla("Jensen-Shannon divergence (GKD, arXiv 2306.13649)", "jsd"),
    "teacher-top-k": NamedMethod(
        "vanilla with the teacher's top 32, renormalised, and top-p 0.9 (Revisiting OPD, arXiv 2603.25562)",
        {**_VANILLA, **_both("objective", "teacher_top_k"), "rollout.top_p": 0.9},
    ),
    "corrected-top-k": _vanilla("the teacher's top 64 and mass correction (MOPD, arXiv 2606.30406)", "corrected_top_k"),
    "binned-top-k": _vanilla("the teacher's top 16 and one bin for the rest (TA-OPD)", "binned_top_k"),
    "student-top-k": _vanilla("the student's top 16 (Rethinking OPD, arXiv 2604.13016)", "student_top_k"),
    "tide-deficit": _vanilla("TIDE's deficit on every token (arXiv 2608.09836)", "tide_deficit"),
    "tide": NamedMethod(
        "vanilla with TIDE's excess and deficit, each on a fifth of the tokens, mean over tokens (arXiv 2608.09836)",
        {**_VANILLA, **_both("objective", "tide"), **_TOKEN_MEAN},
    ),
    "selectkd": _vanilla("tokens accepted by the teacher's top 5 (SelecTKD, arXiv 2510.24021)", "selectkd"),
    # -------------------------------------------------------------------- sampling with the teacher
    "minillm": _vanilla("MiniLLM's objective, answers from 0.2 T + 0.8 S (arXiv 2306.08543)",
                        "minillm", sampler="mixed"),
    "speculative-kd": _vanilla(
        "forward KL on tokens that the teacher accepts or redraws (Speculative KD, arXiv 2410.11325)",
        "forward_kl",
        sampler="speculative",
        temperature=0.5,
        top_p=0.5,
    ),
    # ---------------------------------------------------------------------------- weights of tokens
    "top-d": _vanilla("the gap toward a mixture of both models (TOP-D)", weights=("top_d",)),
    "reopold": _vanilla("gaps of at least -1.59 (Relaxed OPD, arXiv 2603.11137)", weights=("reopold",)),
    "tide-excess": _vanilla("TIDE's excess on a fifth of the tokens (arXiv 2608.09836)", weights=("tide_excess",)),
    "iw-opd": _vanilla("weights that fall along the answer (IW-OPD)", weights=("iw_opd",)),
    "uc-mopd": _vanilla("UC-MOPD's random mask (arXiv 2608.26735), without its explorations", weights=("uc_mopd",)),
    "uc-mopd-explored": NamedMethod(
        "vanilla with UC-MOPD's mask, a quarter of the prompts, 3 explorations of each (arXiv 2608.26735)",
        {**_VANILLA, **_both("weights", ("uc_mopd",)), **_EXPLORED},
    ),
    "dapo": NamedMethod(
        "vanilla with DAPO's mean over tokens and its penalty on answers over 16,384 tokens (arXiv 2503.14476)",
        {**_VANILLA, **_both("weights", ("overlong",)), **_TOKEN_MEAN},
    ),
    "hardest": _vanilla("the half of the tokens with the largest gaps (after AdaKD, arXiv 2510.11615)",
                        weights=("hardest",)),
    "adakd": NamedMethod(
        "vanilla with reverse KL on the hardest tokens, their temperatures, token mean (AdaKD, arXiv 2510.11615)",
        {**_VANILLA, **_both("objective", "adakd"), **_TOKEN_MEAN},
    ),
    "no-teacher": _vanilla("advantage -0.5 on the fifth least likely for the student: no teacher",
                           weights=("unlikely",)),
    # ---------------------------------------------------------------------------- teachers' answers
    "replay-1": NamedMethod(
        "cross-entropy on teachers' answers, 1 % of them general (arXiv 2502.06042)",
        {**_TEACHERS_ANSWERS, **_MIXED, "branches.review.steps": 99, "method.split": "over_steps"},
    ),
    # -------------------------------------------------------------------------- updates of branches
    "dn-mopd": NamedMethod("vanilla with branches scaled by the spread of their gaps (DN-MOPD)",
                           {**_VANILLA, "method.balance": "gap_spread"}),
    "clip-2-1": NamedMethod("CaMOPD with a clip of its own for recovery, at the norm 2",
                            {"branches.recovery.clip_norm": 2.0}),
    "up-mopd": NamedMethod("CaMOPD without clipping, recoveries projected against the last review gradient (UP-MOPD)",
                           {"branches.recovery.project_against": "review", "optimizer.clip_norm": None}),
}  # fmt: skip

# Options for more recovery, alone and in combination, and what docs/results.md favours of all. A falling learning rate
# is the config's, for all methods
_OPTIONS = {
    "recover": NamedMethod(
        "CaMOPD 1:1 with reverse KL, keeping the half with the largest gaps, from a start with 10 % of the original",
        {**_RECOVER, **_HALF},
    ),
    "recover-review-8": NamedMethod("recover with every answer and pull 8 of review, for long runs",
                                    {**_RECOVER, **_EVERY_ANSWER, "branches.review.scale": 8.0}),
    "start-0.1": NamedMethod("CaMOPD from a start with 10 % of the original model", _START),
    "vanilla-start-0.1": NamedMethod("vanilla from a start with 10 % of the original model", {**_VANILLA, **_START}),
    "warm-up": NamedMethod("CaMOPD, the first 20 steps of it cross-entropy on teachers' answers", _WARM_UP),
    "vanilla-warm-up": NamedMethod("vanilla, the first 20 steps of it cross-entropy on teachers' answers",
                                   {**_VANILLA, **_WARM_UP}),
    "average": NamedMethod("CaMOPD, its result the exponential average of the weights", _AVERAGE),
    "vanilla-average": NamedMethod("vanilla, its result the exponential average of the weights",
                                   {**_VANILLA, **_AVERAGE}),
    "start-0.1-average": NamedMethod("CaMOPD with the start of start-0.1 and the average", {**_START, **_AVERAGE}),
    "vanilla-start-0.1-average": NamedMethod("vanilla with the start of start-0.1 and the average",
                                             {**_VANILLA, **_START, **_AVERAGE}),
}  # fmt: skip

METHODS = _STUDY | _NEIGHBOURS | _OPTIONS
QUICK = ("camopd", "vanilla", "alternating", "random", "recovery-only", "distillation")

INTERPOLATION = "interpolation"  # of the two models' parameters: compared like a method, but needs no run
METHOD_NAMES = (*METHODS, INTERPOLATION)
STUDY_METHODS = (*_STUDY, INTERPOLATION)
REFERENCE_METHODS = ("vanilla", "camopd")  # every method is compared with these two


def changes_of(name: str, base: TrainConfig) -> dict[str, Any]:
    """The fields of a config to change for a method. A method with several answers to a prompt has as many answers in a
    step as the config, to fewer prompts.
    """
    changes = METHODS[name].changes
    if answers := changes.get("rollout.answers_per_prompt"):
        total = base.rollout.batch_size * base.rollout.answers_per_prompt
        changes = changes | {"rollout.batch_size": total // answers}
    return changes


_BLOCKS = {"method": Method, "start": Start, "warm_up": WarmUp}  # that make a method, with `branches`


def method_of(config: dict[str, Any]) -> str | None:
    """The name of the method in `METHODS` that a run's resolved config describes; None if there is none."""
    if "branches" not in config or "method" not in config:
        return None  # a config of an earlier version
    # A field or block that an earlier version did not have has its default
    branches = {name: asdict(BranchConfig()) | branch for name, branch in config["branches"].items()}
    blocks = {name: asdict(of()) | config.get(name, {}) for name, of in _BLOCKS.items()}
    actual = _plain({**blocks, "branches": _without_prompts(branches)})
    clips, average = config["optimizer"].get("clip_norm") is not None, config["optimizer"].get("average")
    rollout = asdict(RolloutConfig()) | config.get("rollout", {})
    for name, method in METHODS.items():
        of_optimizer = "optimizer.clip_norm" not in method.changes, method.changes.get("optimizer.average")
        if (clips, average) == of_optimizer and actual == _settings(method) and _samples(rollout, method):
            return name
    return None


def _samples(rollout: dict[str, Any], method: NamedMethod) -> bool:
    """Whether a config's rollout samples as the method does. Temperature and filters are free unless it sets them."""
    wanted = {"sampler": "student"} | {
        name.removeprefix("rollout."): value for name, value in method.changes.items() if name.startswith("rollout.")
    }
    if wanted["sampler"] != "student":
        wanted["teacher_sampling"] = asdict(TeacherSampling())
    actual = _plain(rollout)
    return all(actual[name] == value for name, value in _plain(wanted).items())


def description(config: TrainConfig) -> str:
    """The description of a run's method for a model card."""
    name = method_of(asdict(config))
    if name is not None:
        return "CaMOPD (arXiv 2605.27115)" if name == "camopd" else METHODS[name].about
    if config.optimizer.average is not None:
        updates = replace(config, optimizer=replace(config.optimizer, average=None))
        return f"{description(updates)}, averaged over its updates"
    if config.warm_up != WarmUp():
        return f"{description(replace(config, warm_up=WarmUp()))}, after a warm-up on the teachers' answers"
    if config.start != Start():
        return f"{description(replace(config, start=Start()))}, from a start between the two models"
    order = "in alternation" if config.method.schedule == "alternate" else "in every step"
    teachers = ", ".join(f"{name} ({branch.objective})" for name, branch in config.branches.items())
    answers = "on-policy distillation" if config.method.answers == "student" else "distillation on teachers' answers"
    return f"{answers} with the branches {teachers} {order}"


def _settings(method: NamedMethod) -> dict[str, Any]:
    """The defaults of the config's blocks that make a method, with the method's changes."""
    defaults = asdict(TrainConfig("", ""))
    settings = {block: defaults[block] for block in _BLOCKS} | {"branches": _without_prompts(defaults["branches"])}
    for name, value in method.changes.items():
        block, *path, last = name.split(".")
        if block in settings:
            part = settings[block]
            for step in path:
                part = part[step]
            part[last] = value
    return _plain(settings)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as JSON values, as in a stored config."""
    return json.loads(json.dumps(settings))


def _without_prompts(branches: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {key: v for key, v in branch.items() if key != "prompts"} for name, branch in branches.items()}
