"""What a run is, as frozen dataclasses. A config file's `ConfigDict` becomes one of them at the edge.

`TrainConfig` is the main job, `SftConfig` supervised fine-tuning. Every field is documented here and
nowhere else; a key that is not a field is refused by name, with the nearest field as a hint.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_collections

from camopd_jax.config.build import build
from camopd_jax.config.build import default as default  # what config files start from
from camopd_jax.errors import UserError


@dataclass(frozen=True)
class Template:
    """How a request is put before a model."""

    system: str | None = None  # system prompt set before the conversation, unless the row has its own
    options: dict[str, Any] = field(default_factory=dict)  # passed on to the chat template


@dataclass(frozen=True)
class Stream:
    """A set of prompts, and how student and teacher read them."""

    source: str = ""  # .jsonl or .parquet file, several with commas between, or the name of a `datasets` dataset
    split: str = "train"  # of a `datasets` dataset
    limit: int | None = None  # only the first rows
    template: Template = Template()
    teacher_template: Template | None = None  # None: the student's
    too_long: Literal["drop", "truncate"] = "drop"  # a prompt above the cap: drop and count, or cut its front


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one may be -1: what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class RolloutConfig:
    batch_size: int = 64  # prompts a step, one answer each
    max_prompt_tokens: int = 512
    max_response_tokens: int = 512
    temperature: float = 1.0  # 0: greedy. Anything but 1 makes the update slightly off-policy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    smallest_bucket: int = 64  # prompt and answer lengths are padded to this times a power of two
    # The student's log-probabilities of its answers: a forward pass of their own, or what the sampler knew of them.
    # The two are checked against each other now and then. "auto": the sampler's where products are float32
    student_logprobs: Literal["auto", "forward", "sampler"] = "auto"
    # The devices while they answer; tensor 0: as in config.mesh. Weights that are split by fsdp are gathered for every
    # token: by default each tensor group has a copy
    mesh: MeshConfig = MeshConfig(tensor=0)
    places: int = 0  # answered at one time; the other prompts wait and enter as places get free. 0: the whole batch
    shrinks: bool = False  # whether a batch goes on as half a batch when half its answers are done
    score_batch: int = 0  # answers in one forward pass that scores them; 0: config.optimizer.micro_batch


@dataclass(frozen=True)
class Phase:
    """One branch of the method: how its answers are ranked, how many are kept, how hard it pulls."""

    score: Literal["absolute_gap", "positive_gap"] = "absolute_gap"  # Eq 6 and Eq 7
    mass: float = 0.8  # rho: the share that is kept; 1: all
    scale: float = 1.0  # r: factor on the advantage (Eq 9)
    # Which answers are kept. mass: the smallest set with a share of the gap mass (Eq 8). Controls: fraction, that share
    # of the rows, by falling score; random, as many rows as by mass, drawn by lot
    keep: Literal["mass", "fraction", "random"] = "mass"


@dataclass(frozen=True)
class Method:
    """CaMOPD. The defaults are the paper's."""

    # alternate: each step is a recovery or a review. mixed: each step is both, in one gradient over a batch that is
    # split recovery_steps : review_steps between the streams (vanilla multi-teacher distillation, Eq 3)
    schedule: Literal["alternate", "mixed"] = "alternate"
    recovery_steps: int = 3  # n_g: recovery updates before each review update (Eq 5)
    review_steps: int = 1
    recovery: Phase = Phase("absolute_gap", 0.8, 2.0)
    review: Phase = Phase("positive_gap", 0.8, 1.0)
    advantage_clip: float | None = None  # the gap is clipped to +- this; the paper names no clip
    importance_gate: tuple[float, float] | None = None  # w_t = pi/mu inside, 0 outside (MiMo form); None: w_t = 1
    normalise: Literal["sequence", "token"] = "sequence"  # token mean in each answer first (the paper), or over all
    moments: Literal["shared", "separate"] = "shared"  # one Adam state for both phases (the paper), or one each
    # Who answers the prompts: the student, and the gaps say what it learns of that; or each branch's teacher, and the
    # answers are learnt by heart (the control of distillation on teachers' answers)
    answers: Literal["student", "teacher"] = "student"
    domain_teacher: Literal["specialised", "general"] = "specialised"  # general: one teacher for both streams
    # In a mixed step: the plain sum of both gradients, or without what of each opposes the other (PCGrad)
    conflict: Literal["sum", "pcgrad"] = "sum"


@dataclass(frozen=True)
class Optimizer:
    """AdamW with a warm-up and a constant or cosine learning rate."""

    learning_rate: float = 2e-6
    schedule: Literal["constant", "cosine"] = "constant"  # cosine falls to 0 at the last step
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0  # global gradient norm; None: no clipping
    micro_batch: int = 8  # sequences in one forward and backward


@dataclass(frozen=True)
class Compute:
    """Precision and memory. "auto" is bfloat16 on TPU and GPU and float32 on CPU."""

    params: Literal["float32", "bfloat16"] = "float32"  # the student's master weights
    teacher: Literal["auto", "float32", "bfloat16"] = "auto"  # the teachers' weights
    matmul: Literal["auto", "float32", "bfloat16"] = "auto"
    # What the backward pass computes again: none; dots: all but the products; block: every layer; rollout: every layer,
    # out of what entered it while the student answered, so that there is no forward pass. That is kept from the rollout
    # to the gradient: 4 bytes x (layers + 1) x model width for every token of the batch
    remat: Literal["none", "dots", "block", "rollout"] = "block"
    # How whole rows attend (scoring, updates, prefill; decoding is always plain). fused: Pallas on TPU, cuDNN on GPU,
    # refused where neither takes the model; xla: plainly; auto: fused where it can be and rows are long enough
    attention: Literal["auto", "xla", "fused"] = "auto"
    # What waits in host memory while it is idle: the teachers but while they score, Adam's moments but for the update.
    # ahead: each comes back while the stage before computes; late: moments only when the gradient is whole, so that
    # both never lie there beside its activations, for a copy that nothing hides. off where the devices have room
    offload: Literal["off", "ahead", "late"] = "off"
    # Tokens of one chip whose logits exist at one time; the head is gathered once for all. 0: as many as 256 MiB hold
    logits_chunk: int = 0


@dataclass(frozen=True)
class Checkpoints:
    every: int = 20  # steps; one is always written at the end
    keep_last: int = 2
    # Where evaluation.every > 0. Best: the highest recovery of those whose retention is at least 1 less one standard
    # error; while there is none, the highest retention. Runs of `sft`: the highest mean accuracy
    keep_best: int = 1
    export: Literal["last", "best"] = "last"  # which one becomes workdir/export


@dataclass(frozen=True)
class Benchmark:
    """Questions, how they are asked and how the answers are graded."""

    name: str = ""
    # Its rules: evals/tasks.py. exact: the whole answer; choice: the letter after the last "Final answer:"; likelihood:
    # how likely the model holds a given answer
    task: str = "exact"
    source: str = ""  # as of a Stream; "": the task's own dataset
    split: str = ""  # of a `datasets` dataset; "": the task's own
    axis: Literal["general", "domain"] = "general"
    limit: int | None = None  # only the first questions
    max_response_tokens: int = 64
    instruction: str | None = None  # put behind each question; None: the task's own
    answer: str = "{answer}"  # of task likelihood: the given answer, row fields in braces
    template: Template = Template()
    samples: int = 1  # answers to a question; its score is their mean
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True)
class Judge:
    """The language model that marks tasks `roleplay` and `writing`. Its key: OPENAI_API_KEY in the environment."""

    endpoint: str = ""  # of an OpenAI-compatible server, as in "http://localhost:8000/v1"
    model: str = ""


@dataclass(frozen=True)
class Evaluation:
    every: int = 0  # steps; 0: only before and after
    questions: int | None = None  # the first of each benchmark, for evaluations between the steps; None: all
    patience: int = 0  # end after this many evaluations in a row without a new best (`Checkpoints`); 0: off
    batch_size: int = 64
    seed: int = 0
    answers: str = ""  # folder of answers that several runs share, by fingerprint; "": in the work directory
    benchmarks: tuple[Benchmark, ...] = ()
    judge: Judge = Judge()


@dataclass(frozen=True)
class Diagnostics:
    """Of gradients (analysis/gradients.py), on prompts of their own: a run is the same with and without them."""

    every: int = 0  # steps, and before the first; 0: off
    rows: int = 64  # answers of each branch
    # Only parameters whose name holds one of these words, commas between, as in "attention.output,mlp"; "": all
    parameters: str = ""
    # Numbers kept of each matrix's gradient, by a random projection: little memory, an error of about sqrt(2 / sketch).
    # Take an odd number: it folds no matrix along its columns. 0: whole gradients, exact
    sketch: int = 0
    micro_batch: int = 4  # answers whose gradients are in memory at one time


@dataclass(frozen=True)
class Log:
    samples: int = 2  # rollouts of a step written to samples.jsonl
    selection: bool = True  # a line a step in selection.jsonl: every answer's prompt, score, length, entropy, losses
    tensorboard: bool = True
    report: bool = True  # report.html at the end


@dataclass(frozen=True)
class TrainConfig:
    """`python -m camopd_jax.train`."""

    general_model: str  # Hugging Face folder or hub name of the original model
    specialised_model: str  # the same of the specialised one: student and domain teacher
    general: Stream  # proxy general prompts
    domain: Stream  # domain prompts
    steps: int = 120
    seed: int = 0
    rollout: RolloutConfig = RolloutConfig()
    method: Method = Method()
    optimizer: Optimizer = Optimizer()
    compute: Compute = Compute()
    mesh: MeshConfig = MeshConfig()
    checkpoints: Checkpoints = Checkpoints()
    evaluation: Evaluation = Evaluation()
    diagnostics: Diagnostics = Diagnostics()
    log: Log = Log()
    max_skipped: int = 5  # stop after this many non-finite updates in a row


@dataclass(frozen=True)
class SftConfig:
    """`python -m camopd_jax.sft`: next-token cross-entropy on the answers."""

    model: str  # Hugging Face folder or hub name
    data: Stream  # rows with "messages" that end with an assistant turn, or with "messages" and "answer"
    answer: str = "{answer}"  # what the model shall say, where a row has no assistant turn; row fields in braces
    steps: int = 100
    seed: int = 0
    batch_size: int = 32
    max_tokens: int = 512  # prompt and answer together; longer rows are dropped and counted
    smallest_bucket: int = 64
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)
    compute: Compute = Compute()
    mesh: MeshConfig = MeshConfig()
    checkpoints: Checkpoints = Checkpoints()
    evaluation: Evaluation = Evaluation()
    log: Log = Log()
    max_skipped: int = 5


Config = TrainConfig | SftConfig

# ------------------------------------------------------------------------------------- reading


def from_config_dict(cls: type, config: ml_collections.ConfigDict) -> Any:
    """Builds and checks a `TrainConfig` or `SftConfig`.

    Raises:
      UserError: naming the field, for unknown, missing or ill-typed keys and for values that cannot be.
    """
    return checked(build(cls, config.to_dict(), "config"))


# ------------------------------------------------------------------------------------- checks


def checked(config: Config) -> Config:
    """The config, whose values can be.

    Raises:
      UserError: naming the field, for one that cannot.
    """

    def need(holds: bool, name: str, mend: str) -> None:
        if not holds:
            raise UserError(f"config.{name} is {_get(config, name)!r}; {mend}")

    def positive(*names: str) -> None:
        for name in names:
            need(_get(config, name) > 0, name, "give a number > 0")

    positive(
        "steps",
        "optimizer.micro_batch",
        "checkpoints.every",
        "checkpoints.keep_last",
        "evaluation.batch_size",
        "max_skipped",
    )
    need(config.compute.logits_chunk >= 0, "compute.logits_chunk", "give a number >= 0 (0: as many as 256 MiB hold)")
    need(config.optimizer.learning_rate >= 0, "optimizer.learning_rate", "give a number >= 0")
    need(
        config.optimizer.clip_norm is None or config.optimizer.clip_norm > 0,
        "optimizer.clip_norm",
        "give a number > 0, or None to turn clipping off",
    )
    for name in ("b1", "b2"):
        need(0 <= getattr(config.optimizer, name) < 1, f"optimizer.{name}", "give a number in [0, 1)")
    need(config.optimizer.warmup_steps >= 0, "optimizer.warmup_steps", "give a number >= 0")
    _check_evaluation(config.evaluation, need)
    if isinstance(config, TrainConfig):
        _check_train(config, need, positive)
    else:
        positive("batch_size", "max_tokens", "smallest_bucket")
        need(config.compute.remat != "rollout", "compute.remat", "fine-tuning answers nothing; give block")
        need(
            config.batch_size % config.optimizer.micro_batch == 0,
            "optimizer.micro_batch",
            f"give a divisor of batch_size = {config.batch_size}",
        )
    return config


def _check_evaluation(config: Evaluation, need) -> None:
    names = [b.name for b in config.benchmarks]
    need(len(set(names)) == len(names), "evaluation.benchmarks", "give each benchmark a name of its own")
    need(config.every >= 0, "evaluation.every", "give a number >= 0 (0: only before and after)")
    need(config.patience >= 0, "evaluation.patience", "give a number >= 0 (0: off)")
    need(config.questions is None or config.questions > 0, "evaluation.questions", "give a number > 0, or None for all")
    for b in config.benchmarks:

        def holds(well: bool, name: str, mend: str, b: Benchmark = b) -> None:
            if not well:
                value = getattr(b, name)
                raise UserError(f"config.evaluation.benchmarks {b.name!r}: {name} is {value!r}; {mend}")

        holds(re.fullmatch(r"[\w.-]+", b.name) is not None, "name", "give one of letters, digits, - and _")
        holds(b.max_response_tokens > 0, "max_response_tokens", "give a number > 0")
        holds(b.samples > 0, "samples", "give a number > 0")
        holds(b.temperature >= 0, "temperature", "give a number >= 0 (0: greedy)")
        holds(b.samples == 1 or b.temperature > 0, "samples", "greedy answers are all alike; 1, or a temperature > 0")
        holds(b.top_k >= 0, "top_k", "give a number >= 0 (0: off)")
        holds(0 < b.top_p <= 1, "top_p", "give a number in (0, 1]")
        holds(0 <= b.min_p < 1, "min_p", "give a number in [0, 1)")


def _check_train(config: TrainConfig, need, positive) -> None:
    positive(
        "rollout.batch_size", "rollout.max_prompt_tokens", "rollout.max_response_tokens", "rollout.smallest_bucket"
    )
    need(
        config.rollout.batch_size % config.optimizer.micro_batch == 0,
        "optimizer.micro_batch",
        f"give a divisor of rollout.batch_size = {config.rollout.batch_size}",
    )
    need(
        config.rollout.score_batch == 0
        or (config.rollout.score_batch > 0 and config.rollout.batch_size % config.rollout.score_batch == 0),
        "rollout.score_batch",
        f"give a divisor of rollout.batch_size = {config.rollout.batch_size}, or 0 (as optimizer.micro_batch)",
    )
    need(config.rollout.places >= 0, "rollout.places", "give a number >= 0 (0: the whole batch)")
    keeps = config.compute.remat == "rollout"
    need(not keeps or not config.rollout.places, "rollout.places", "give 0, or another compute.remat than 'rollout'")
    need(not keeps or config.method.answers == "student", "compute.remat", "teachers answer; give block")
    need(config.rollout.temperature >= 0, "rollout.temperature", "give a number >= 0 (0: greedy)")
    need(config.rollout.top_k >= 0, "rollout.top_k", "give a number >= 0 (0: off)")
    need(0 < config.rollout.top_p <= 1, "rollout.top_p", "give a number in (0, 1]")
    need(0 <= config.rollout.min_p < 1, "rollout.min_p", "give a number in [0, 1)")
    need(config.method.recovery_steps >= 0, "method.recovery_steps", "give a number >= 0")
    need(config.method.review_steps >= 0, "method.review_steps", "give a number >= 0")
    need(
        config.method.recovery_steps + config.method.review_steps > 0,
        "method.recovery_steps",
        "recovery_steps and review_steps cannot both be 0",
    )
    if config.method.schedule == "mixed":
        cycle = config.method.recovery_steps + config.method.review_steps
        need(
            config.method.recovery_steps > 0 and config.method.review_steps > 0,
            "method.schedule",
            "recovery_steps and review_steps both have to be > 0 for a mixed batch",
        )
        need(
            config.rollout.batch_size % cycle == 0,
            "rollout.batch_size",
            f"give a multiple of method.recovery_steps + review_steps = {cycle}: a mixed batch is split so",
        )
        need(config.method.moments == "shared", "method.moments", 'a mixed batch has one gradient; give "shared"')
    mixed = config.method.schedule == "mixed"
    need(
        mixed or config.method.conflict == "sum",
        "method.conflict",
        'only two gradients of one step can conflict; give "sum"',
    )
    for name in ("recovery", "review"):
        need(0 < getattr(config.method, name).mass <= 1, f"method.{name}.mass", "give a share in (0, 1]")
    clip, gate = config.method.advantage_clip, config.method.importance_gate
    need(clip is None or clip > 0, "method.advantage_clip", "give a number > 0, or None for no clip")
    need(
        gate is None or 0 <= gate[0] <= 1 <= gate[1],
        "method.importance_gate",
        "give (low, high) with low <= 1 <= high, or None",
    )
    need(
        gate is None or config.method.answers == "student",
        "method.importance_gate",
        "what a teacher answers has no sampler of the student's; give None",
    )
    positive("diagnostics.rows", "diagnostics.micro_batch")
    need(config.diagnostics.every >= 0, "diagnostics.every", "give a number >= 0 (0: off)")
    need(config.diagnostics.sketch >= 0, "diagnostics.sketch", "give a number >= 0 (0: whole gradients)")
    need(
        config.diagnostics.rows % config.diagnostics.micro_batch == 0,
        "diagnostics.micro_batch",
        f"give a divisor of diagnostics.rows = {config.diagnostics.rows}",
    )
    need(bool(config.general.source), "general.source", "name a file or dataset of general prompts")
    need(bool(config.domain.source), "domain.source", "name a file or dataset of domain prompts")


def _get(config: Config, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config
