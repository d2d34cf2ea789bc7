"""The methods that CaMOPD is compared with. Each is the same run with other values in some fields of its config."""

from dataclasses import asdict, dataclass, field
from typing import Any

from camopd_jax.config.schema import Method


@dataclass(frozen=True)
class Control:
    """A method to compare: what it is, and the fields of a `TrainConfig` that make it."""

    about: str
    changes: dict[str, Any] = field(default_factory=dict)


_ONE_TO_ONE = {"method.recovery_steps": 1, "method.review_steps": 1}
_MIXED = {"method.schedule": "mixed", **_ONE_TO_ONE}
_EVERY_ANSWER = {"method.recovery.mass": 1.0, "method.review.mass": 1.0}
_EQUAL_PULL = {"method.recovery.scale": 1.0}
_TEACHERS_ANSWERS = {"method.answers": "teacher", **_EVERY_ANSWER, **_EQUAL_PULL}
_VANILLA = {**_MIXED, **_EVERY_ANSWER, **_EQUAL_PULL}

CONTROLS = {
    "camopd": Control("CaMOPD as the paper has it: alternating 3:1, mass 0.8, pull 2 and 1"),
    "vanilla": Control("vanilla MOPD: both streams in each step 1:1, every answer, equal pull", _VANILLA),
    # ------------------------------------------------------------------ its parts, one at a time and left out
    "mixed-3-1": Control("vanilla with prompts 3:1", {**_VANILLA, "method.recovery_steps": 3}),
    "alternating": Control("CaMOPD without selection", _EVERY_ANSWER),
    "alternating-r1": Control("CaMOPD without selection, equal pull", {**_EVERY_ANSWER, **_EQUAL_PULL}),
    "camopd-r1": Control("CaMOPD, equal pull", _EQUAL_PULL),
    "selection": Control("vanilla with selection", {**_MIXED, **_EQUAL_PULL}),
    "pull-2": Control("vanilla with pull 2 of recovery", {**_MIXED, **_EVERY_ANSWER}),
    # ------------------------------------------------------------------------------------ its settings
    "camopd-1-1": Control("CaMOPD alternating 1:1", _ONE_TO_ONE),
    "camopd-5-1": Control("CaMOPD alternating 5:1", {"method.recovery_steps": 5}),
    "mass-0.6": Control("CaMOPD with mass 0.6", {"method.recovery.mass": 0.6, "method.review.mass": 0.6}),
    # ------------------------------------------------------------------------- which answers are kept
    "half": Control("CaMOPD keeping the half with the largest gaps", {
        f"method.{branch}.{name}": value
        for branch in ("recovery", "review") for name, value in (("keep", "fraction"), ("mass", 0.5))}),
    "random": Control("CaMOPD keeping as many answers as it does, drawn by lot",
                      {"method.recovery.keep": "random", "method.review.keep": "random"}),
    "scores-swapped": Control("CaMOPD ranking recovery by positive gaps and review by absolute ones",
                              {"method.recovery.score": "positive_gap", "method.review.score": "absolute_gap"}),
    # --------------------------------------------------------------------------------- the optimizer
    "moments": Control("CaMOPD with Adam moments for each phase", {"method.moments": "separate"}),
    "no-clip": Control("CaMOPD without clipping of the gradient's norm", {"optimizer.clip_norm": None}),
    "no-clip-r1": Control("CaMOPD without clipping, equal pull", {**_EQUAL_PULL, "optimizer.clip_norm": None}),
    "vanilla-no-clip": Control("vanilla without clipping", {**_VANILLA, "optimizer.clip_norm": None}),
    "pcgrad": Control("vanilla with PCGrad", {**_VANILLA, "method.conflict": "pcgrad"}),
    # ------------------------------------------------------------------------------------ one teacher
    "recovery-only": Control("recovery in every step", {"method.recovery_steps": 1, "method.review_steps": 0}),
    "review-only": Control("review in every step", {"method.recovery_steps": 0}),
    "one-teacher": Control("vanilla with the original model teaching both streams",
                           {**_VANILLA, "method.domain_teacher": "general"}),
    # -------------------------------------------------------------------------------- teachers' answers
    "distillation": Control("cross-entropy on the original model's answers to general prompts",
                            {**_TEACHERS_ANSWERS, "method.recovery_steps": 1, "method.review_steps": 0}),
    "replay-50": Control("cross-entropy on teachers' answers, 50 % of them general", {**_TEACHERS_ANSWERS, **_MIXED}),
    "replay-12": Control("cross-entropy on teachers' answers, 12.5 % of them general",
                         {**_TEACHERS_ANSWERS, **_MIXED, "method.review_steps": 7}),
}  # fmt: skip

QUICK = ("camopd", "vanilla", "alternating", "random", "recovery-only", "distillation")

INTERPOLATION = "interpolation"  # of the two models' parameters; compared as a method, but not a run
AGAINST = ("vanilla", "camopd")  # whom every method is compared with


def method_of(config: dict[str, Any]) -> str | None:
    """The name of the method that a run's resolved config makes; None if it is none of these."""
    clips = config["optimizer"].get("clip_norm") is not None
    for name, control in CONTROLS.items():
        method = asdict(Method())
        for field_name, value in control.changes.items():
            block, *path, last = field_name.split(".")
            if block == "method":
                part = method
                for step in path:
                    part = part[step]
                part[last] = value
        if clips == ("optimizer.clip_norm" not in control.changes) and config["method"].items() <= method.items():
            return name
    return None
