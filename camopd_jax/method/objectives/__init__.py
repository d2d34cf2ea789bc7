"""The objectives by name. A new objective needs a class in a new file and a line in this table."""

from camopd_jax.errors import UserError
from camopd_jax.method.named import named
from camopd_jax.method.objectives.adakd import AdaKD
from camopd_jax.method.objectives.base import Objective as Objective
from camopd_jax.method.objectives.base import StudentReading as StudentReading
from camopd_jax.method.objectives.base import TeacherReading as TeacherReading
from camopd_jax.method.objectives.full_vocabulary import JSD, ForwardKL, ReverseKL
from camopd_jax.method.objectives.minillm import MiniLLM
from camopd_jax.method.objectives.sampled_token import CrossEntropy, SampledToken
from camopd_jax.method.objectives.tide import Tide
from camopd_jax.method.objectives.top_k import (
    TRUNCATED,
    BinnedTopK,
    CorrectedTopK,
    SelecTKD,
    StudentTopK,
    TeacherTopK,
    TideDeficit,
)

OBJECTIVES: dict[str, type[Objective]] = {
    "sampled_token": SampledToken,
    "cross_entropy": CrossEntropy,
    "reverse_kl": ReverseKL,
    "forward_kl": ForwardKL,
    "jsd": JSD,
    "teacher_top_k": TeacherTopK,
    "corrected_top_k": CorrectedTopK,
    "binned_top_k": BinnedTopK,
    "tide_deficit": TideDeficit,
    "tide": Tide,
    "student_top_k": StudentTopK,
    "selectkd": SelecTKD,
    "minillm": MiniLLM,
    "adakd": AdaKD,
}
REFUSED = {"truncated_top_k": TRUNCATED}  # a name that one may look for, and why it is not there


def objective(text: str, field: str) -> Objective:
    """Parses the name of an objective, with options in parentheses.

    >>> objective("jsd(beta=0.1)", "config.branches.recovery.objective")
    JSD(beta=0.1)

    Raises:
      UserError: naming `field`, for an unknown name or option.
    """
    if (name := text.split("(")[0].strip()) in REFUSED:
        raise UserError(f"{field} is {text!r}, which is not offered: it {REFUSED[name]}")
    return named(text, field, OBJECTIVES, "objectives", "jsd(beta=0.1)")
