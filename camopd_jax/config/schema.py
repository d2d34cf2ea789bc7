"""All config fields, as frozen dataclasses. A config file's `ConfigDict` is converted to one of them when it is read.

`TrainConfig` is the config of the main job, `SftConfig` of supervised fine-tuning. Every field is documented here and
nowhere else. The limits of a number are part of its type (`annotated_types`); a text after them explains a special
value. Numbers must be finite. An unknown key is refused by name, with the nearest field as a hint. `Free` fields may
change when a run is started again on its work directory; in all others it must keep its values.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt

Count = Annotated[int, Gt(0)]
Seed = Annotated[int, Ge(0), Lt(2**31)]
Share = Annotated[float, Gt(0), Le(1)]
AUTO: Literal["auto"] = "auto"


class MayChange:
    """Marks the type of a field that changes no mathematics of a run, only its rounding, speed, memory or records."""


T = TypeVar("T")
Free = Annotated[T, MayChange()]


@dataclass(frozen=True)
class Template:
    """How a conversation is converted to a model's text."""

    system: str | None = None  # system prompt added to conversations that have none
    options: dict[str, Any] = field(default_factory=dict)  # passed to the chat template


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are sampled; the default is the model's own distribution. The filters are applied in this order."""

    temperature: Annotated[float, Ge(0), "0: greedy"] = 1.0
    top_k: Annotated[int, Ge(0), "0: off"] = 0  # keep the k most likely tokens
    top_p: Annotated[float, Gt(0), Le(1), "1: off"] = 1.0  # keep the most likely tokens up to this total probability
    min_p: Annotated[float, Ge(0), Lt(1), "0: off"] = 0.0  # drop tokens below this share of the highest probability

    @staticmethod
    def of(settings: "Sampling") -> "Sampling":
        """These four fields of a subclass's settings: a hashable static argument of compiled functions."""
        return Sampling(
            temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p
        )


@dataclass(frozen=True)
class Writing:
    """Prompts that the branch's teacher writes before the first step, into WORKDIR/self_prompts/BRANCH."""

    rows: Annotated[int, Ge(1)] = 10_000  # prompts to write
    shortest: Annotated[int, Ge(1)] = 3  # words; shorter texts are dropped
    sampling: Sampling = Sampling()
    scripts: tuple[str, ...] = ()  # of the letters, such as "latin"; (): any
    clusters: Annotated[int, Ge(0), "0: off"] = 0  # spread over this many clusters of the model's hidden states


@dataclass(frozen=True)
class Stream:
    """A set of prompts, and how student and teacher read them."""

    # Files of rows or patterns with *, separated by commas; a folder; or the name of a `datasets` dataset, with
    # configuration and revision if needed: "openai/gsm8k:main@cc7b047"; self: the branch's teacher writes them first
    source: str = ""
    writing: Writing = Writing()  # of source "self"
    split: str = "train"  # of a `datasets` dataset
    limit: Annotated[int, Gt(0), "None: all"] | None = None  # use only this many rows, the first ones
    template: Template = Template()  # of the student
    teacher_template: Template | None = None  # None: the same as the student's
    too_long: Literal["drop", "truncate"] = "drop"  # prompts longer than the cap: drop (and count), or cut their start
    # How often prompts are drawn. "": all equally; gap: in proportion to the gap between the two models, mean over the
    # prompt's source or cluster, which the run measures first (workdir/prompt_map_BRANCH.json); else a file that
    # `prompts map` wrote
    weights: str = ""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one size may be -1: all remaining devices."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1  # of mixtures of experts: each group of devices has some of the experts, and all of its rows


@dataclass(frozen=True, kw_only=True)
class TeacherSampling(Sampling):
    """The teacher's part in sampling. Temperature and filters are those of the tokens that "speculative" redraws."""

    alpha: Annotated[float, Ge(0), Le(1)] = 0.2  # the teacher's part of the distribution of "mixed"
    accept_top_k: Count = 25  # "speculative" keeps a token that is among this many most likely ones of the teacher
    temperature: Annotated[float, Ge(0), "0: greedy"] = 0.2
    top_p: Annotated[float, Gt(0), Le(1), "1: off"] = 0.5


@dataclass(frozen=True)
class RolloutConfig(Sampling):
    """How the student answers, and how the answers are scored. A temperature other than 1 or any filter makes the
    update slightly off-policy.
    """

    batch_size: Count = 64  # prompts per step
    # Answers to each prompt, which is computed once for them. The other numbers here and micro_batch count answers
    answers_per_prompt: Count = 1
    # (temperature, top-p) of a prompt's answers after the first, as in UC-MOPD (1.5, 0.9); None: those of the first
    exploration: tuple[float, float] | None = None
    # Who samples a token. student: the student S alone. mixed: both models, from alpha T + (1 - alpha) S with T the
    # teacher's distribution, as in MiniLLM. speculative: the student, and the teacher where it does not accept the
    # student's token, as in Speculative KD. The last two need both models and a cache of each (docs/objectives.md)
    sampler: Literal["student", "mixed", "speculative"] = "student"
    teacher_sampling: TeacherSampling = TeacherSampling()  # of samplers other than student
    max_prompt_tokens: Count = 512
    max_response_tokens: Count = 512
    smallest_bucket: Count = 64  # prompt and answer lengths are padded to this times a power of two
    # Where the student's log-probabilities of its answers come from. forward: a separate forward pass; sampler: those
    # computed during sampling, compared with a forward pass every 16 steps; auto: sampler if products are float32, else
    # forward
    student_logprobs: Literal["auto", "forward", "sampler"] = "auto"
    # The mesh during sampling; tensor or expert 0: the same as in config.mesh. Weights sharded by fsdp would be
    # gathered for every token, so by default each group of tensor and expert devices has a full copy
    mesh: Free[MeshConfig] = MeshConfig(tensor=0, expert=0)
    # Answers in progress at a time; the other prompts wait, and each starts when answers end
    concurrency: Free[Annotated[int, Ge(0), "0: the whole batch"]] = 0
    shrinks: Free[bool] = False  # whether the batch is halved when half of its answers are complete
    # Answers scored in one forward pass
    score_batch: Free[Annotated[int, Ge(0), "0: config.optimizer.micro_batch"]] = 0


@dataclass(frozen=True)
class SelectionConfig:
    """Which answers of a batch are trained on."""

    # The gap mass of an answer: the mean of |gap| over its tokens (Eq 6), or of max(gap, 0) (Eq 7)
    by: Literal["absolute_gap", "positive_gap"] = "absolute_gap"
    mass: Share = 0.8  # rho, the share to keep; 1: all answers
    # mass: the smallest set of answers with this share of the gap mass (Eq 8). For comparison, fraction: this share of
    # the answers, those with the largest gap mass; random: as many answers as mass would keep, chosen at random;
    # density: of several answers to a prompt, the first and those whose mean positive gap is not below its (UC-MOPD)
    keep: Literal["mass", "fraction", "random", "density"] = "mass"


@dataclass(frozen=True)
class BranchConfig:
    """One source of the training signal: prompts, the teacher for their answers, and the loss."""

    prompts: Stream = Stream()
    # "general" or "specialised": that model of the config; else a Hugging Face folder or hub name
    teacher: str = "general"
    # The loss toward the teacher: sampled_token, cross_entropy, reverse_kl, forward_kl, jsd, tide, adakd or a top-K
    # objective, with options in parentheses, as in "jsd(beta=0.1)" (docs/objectives.md)
    objective: str = "sampled_token"
    # Constant weights and masks of tokens, in this order: top_d, reopold, tide_excess, overlong, unlikely, iw_opd,
    # uc_mopd, hardest or exclude, as in ("reopold(lam=0.17)", "iw_opd") (docs/objectives.md)
    weights: tuple[str, ...] = ()
    selection: SelectionConfig = SelectionConfig()
    scale: Annotated[float, Gt(0)] = 1.0  # r: factor on the loss (Eq 9)
    # n: consecutive steps in each cycle (Eq 5); with config.method.schedule "mixed", the share of each batch
    steps: Annotated[int, Ge(0)] = 1
    # Global norm to which this branch's gradients are clipped, so that a scale above 1 is not cancelled
    clip_norm: Annotated[float, Gt(0), "None: config.optimizer.clip_norm"] | None = None
    # Another branch: what raises its loss, by its last gradient, is removed from each update (UP-MOPD); "": off
    project_against: str = ""


def _paper() -> dict[str, BranchConfig]:
    """The paper's two branches."""
    return {
        "recovery": BranchConfig(teacher="general", selection=SelectionConfig("absolute_gap"), scale=2.0, steps=3),
        "review": BranchConfig(teacher="specialised", selection=SelectionConfig("positive_gap"), scale=1.0, steps=1),
    }


@dataclass(frozen=True)
class Method:
    """CaMOPD: the settings that its branches share. The defaults are the paper's."""

    # alternate: each step trains one branch. mixed: each step trains all branches with one gradient; the batch is split
    # between them in proportion to their `steps` (vanilla multi-teacher distillation, Eq 3)
    schedule: Literal["alternate", "mixed"] = "alternate"
    # How `steps` that do not divide a mixed batch are met. exact: they have to divide it; over_steps: the branch with
    # the most steps has the same rows in every step, and of the others as many are trained as their shares need, none
    # in some steps (1 % of a batch of 64)
    split: Literal["exact", "over_steps"] = "exact"
    # The gap is clipped to +- this; the paper names no clip
    advantage_clip: Annotated[float, Gt(0), "None: no clip"] | None = None
    # Bounds on the ratio of a token's probability when scored to that when sampled: its weight w_t is the ratio within
    # them, 0 outside (MiMo form); None: w_t = 1
    importance_gate: tuple[float, float] | None = None
    # sequence: mean over each answer's tokens, then over answers (the paper); token: mean over all tokens
    normalise: Literal["sequence", "token"] = "sequence"
    moments: Literal["shared", "separate"] = "shared"  # one Adam state for all branches (the paper), or one for each
    # Who answers the prompts: the student, or each branch's teacher (distillation on teachers' answers, for comparison;
    # needs objective cross_entropy)
    answers: Literal["student", "teacher"] = "student"
    # How a mixed step combines the branches' gradients: their sum; or PCGrad, which first removes from each gradient
    # the components that oppose the others
    conflict: Literal["sum", "pcgrad"] = "sum"
    # How a mixed step scales the branches' gradients, besides by `scale`. gap_spread: by the standard deviation of all
    # gaps over that of the branch's gaps, within 1/4 and 4 (DN-MOPD)
    balance: Literal["none", "gap_spread"] = "none"


@dataclass(frozen=True)
class Start:
    """The student's weights before the first step."""

    # lambda: the student begins at specialised + lambda (original - specialised); the teachers are unchanged. auto: a
    # few values are tried first, and the one with the highest recovery among those that keep the domain up to one
    # standard error is used, by the run's benchmarks or, without any, by the likelihood of both teachers' answers to
    # prompts of their branches. The trials are in workdir/start.jsonl
    interpolation: Literal["auto"] | Annotated[float, Ge(0), Le(1), "0: the specialised model"] = 0.0


@dataclass(frozen=True)
class WarmUp:
    """The first steps of a run: cross-entropy on answers that each branch's teacher gave to prompts of the branch.

    The branches take turns as in the other steps; every answer is used, with equal pull of the branches. The answers
    are sampled once, as in a rollout, into workdir/teacher_answers. The steps after the warm-up begin with the first
    branch and at the start of the learning rate's schedule; Adam's moments go on.
    """

    steps: Annotated[int, Ge(0), "0: no warm-up"] = 0  # of config.steps, the first ones
    # In the warm-up, with the optimizer's schedule over its steps
    learning_rate: Annotated[float, Ge(0), "None: that of config.optimizer"] | None = None
    prompts: Count = 1024  # of each branch, that its teacher answers; only as many as the steps use


@dataclass(frozen=True)
class Optimizer:
    """AdamW with a warm-up and a constant or cosine learning rate."""

    learning_rate: Annotated[float, Ge(0)] = 2e-6
    schedule: Literal["constant", "cosine"] = "constant"  # cosine falls to 0 at the last step
    warmup_steps: Annotated[int, Ge(0)] = 0
    b1: Annotated[float, Ge(0), Lt(1)] = 0.9
    b2: Annotated[float, Ge(0), Lt(1)] = 0.999
    eps: Annotated[float, Gt(0)] = 1e-8
    weight_decay: Annotated[float, Ge(0)] = 0.0
    clip_norm: Annotated[float, Gt(0), "None: no clipping"] | None = 1.0  # global gradient norm
    # Decay of an exponential average of the trained weights, such as 0.99. The average is evaluated, ranked and
    # exported in place of the weights, which the updates continue to use
    average: Annotated[float, Gt(0), Lt(1), "None: no average"] | None = None
    # Sequences in one forward and backward. auto: the quickest that fits in memory, as for compute.remat
    micro_batch: Free[Literal["auto"] | Count] = 8
    # Which parameters are trained: "all" (but the routers of mixtures of experts), or a regular expression that is
    # searched for in names such as layers.attention.query.kernel. The others are frozen: they have no gradients and no
    # moments and are not saved. ".": all, with routers
    trained: str = "all"


@dataclass(frozen=True)
class Adapter:
    """A new LoRA adapter (arXiv 2106.09685): W + alpha / rank A B replaces a matrix W; only A and B are trained."""

    rank: Count = 16
    alpha: Annotated[float, Gt(0)] = 32.0
    # Hugging Face names of the modules with an adapter, such as "q_proj"; "all-linear": all matrices of the layers
    targets: tuple[str, ...] = ("all-linear",)


@dataclass(frozen=True)
class Compute:
    """Precision and memory. "auto" is bfloat16 on TPU and GPU and float32 on CPU."""

    params: Literal["float32", "bfloat16"] = "float32"  # the student's master weights
    # Frozen weights: of the teachers, and of the base model beside an adapter. int8: the matrices of the layers, with a
    # scale for each output; everything else as matmul says
    teacher: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    # Of matrix products. float32 is float32 on every platform, not TF32 or bfloat16, and so slow on GPUs and TPUs
    matmul: Literal["auto", "float32", "bfloat16"] = "auto"
    # What the backward pass recomputes. none: nothing; dots: all but matrix products; block: every layer; rollout:
    # every layer, from its input during sampling, so that no forward pass is needed. These inputs are kept from the
    # rollout to the gradient: 4 bytes x (layers + 1) x model width for every token of the batch. auto: chosen when a
    # run starts, for the memory of its devices by the plan's arithmetic (docs/memory.md), and kept when it is resumed
    remat: Free[Literal["auto", "none", "dots", "block", "rollout"]] = "block"
    # Attention over full rows (scoring, updates, prefill). fused: Pallas on TPU, cuDNN on GPU, an error if neither
    # supports the model; xla: plain; auto: fused if supported and rows are long enough
    attention: Literal["auto", "xla", "fused"] = "auto"
    # Attention of a new token over the cache, in decoding. fused: a Pallas kernel for GPUs that reads only blocks with
    # tokens that a row sees; tested in Pallas' interpreter, not measured on a GPU yet
    decode_attention: Free[Literal["xla", "fused"]] = "xla"
    # Keeps teachers (except while they score) and Adam's moments (except during the update) in host memory. ahead: each
    # is copied back during the stage before its use; late: moments only when the gradient is complete, so that they are
    # never in memory together with its activations, but their copy takes additional time
    offload: Free[Literal["off", "ahead", "late"]] = "off"
    # Tokens per chip whose logits exist at a time
    logits_chunk: Free[Annotated[int, Ge(0), "0: as many as 256 MiB hold"]] = 0

    # Which programs a GPU's compiler tunes by timing kernels: all, or only those of steps (docs/performance.md)
    autotune: Free[Literal["all", "steps"]] = "all"
    # Whether programs with known shapes are compiled while models are loaded. auto: on a GPU or TPU, by one process
    compile_ahead: Free[Literal["auto", "on", "off"]] = "auto"

    @property
    def offloads(self) -> bool:
        return self.offload != "off"


@dataclass(frozen=True)
class Checkpoints:
    every: Count = 20  # steps; a checkpoint is always written at the end
    keep_last: Count = 2  # how many of the latest are kept
    # How many of the best are kept as well, if evaluation.every > 0. Best is the highest recovery of general ability
    # among the checkpoints that keep the domain up to one standard error; if none does, the one that keeps most of it.
    # For `sft`: the highest mean accuracy
    keep_best: Annotated[int, Ge(0)] = 1
    export: Literal["last", "best"] = "last"  # which one is exported to workdir/export


@dataclass(frozen=True)
class Benchmark(Sampling):
    """Questions, how they are asked and how the answers are graded."""

    name: str = ""  # in tables and files; each benchmark needs its own
    # How answers are graded, a name of evals/tasks.py. exact: the full answer; choice: the letter after the last "Final
    # answer:"; likelihood: the model's likelihood of a given answer
    task: str = "exact"
    source: str = ""  # as in Stream; "": the task's own dataset
    split: str = ""  # of a `datasets` dataset; "": the task's own
    axis: Literal["general", "domain"] = "general"
    # Whether the prompts of the branches cover what it measures, for the reasons in the outcome at the end of a run
    covered: bool | None = None
    limit: Annotated[int, Gt(0), "None: all"] | None = None  # use only this many questions, the first ones
    max_response_tokens: Count = 64
    instruction: str | None = None  # added after each question; None: the task's own
    answer: str = "{answer}"  # only for task likelihood: the given answer, with row fields in braces
    template: Template = Template()
    samples: Count = 1  # answers per question; the score of the question is their mean
    temperature: Annotated[float, Ge(0), "0: greedy"] = field(default=0.0, kw_only=True)


@dataclass(frozen=True)
class Judge:
    """The language model that grades tasks `roleplay` and `writing`; its key is the environment's OPENAI_API_KEY."""

    endpoint: str = ""  # URL of an OpenAI-compatible server, such as "http://localhost:8000/v1"
    model: str = ""


@dataclass(frozen=True)
class Evaluation:
    every: Annotated[int, Ge(0), "0: only before and after"] = 0  # steps
    # During training, only this many questions of each benchmark, the first ones
    questions: Annotated[int, Gt(0), "None: all"] | None = None
    # Stop the run after this many evaluations in a row without a new best checkpoint (see `Checkpoints`)
    patience: Annotated[int, Ge(0), "0: off"] = 0
    batch_size: Count = 64  # questions answered at a time
    seed: Seed = 0  # of sampled answers
    answers: str = ""  # folder for answers, by model fingerprint, which runs may share; "": workdir/answers
    benchmarks: tuple[Benchmark, ...] = ()
    judge: Judge = Judge()


@dataclass(frozen=True)
class Diagnostics:
    """Measurements of gradients (analysis/gradients.py). They use separate prompts and do not change the run."""

    every: Annotated[int, Ge(0), "0: off"] = 0  # steps; also before the first and after the last step
    rows: Count = 64  # answers of each branch
    # Only parameters whose names contain one of these texts, separated by commas: "attention.output,mlp"; "": all
    parameters: str = ""
    # Size of a random projection of each matrix's gradient, which saves memory; its error is about sqrt(2 / sketch).
    # Use an odd number: with a factor in common with the columns, entries of one column fall into the same sums
    sketch: Annotated[int, Ge(0), "0: the gradients themselves, exact"] = 0
    micro_batch: Count = 4  # answers whose gradients are in memory at a time


@dataclass(frozen=True)
class Log:
    samples: Annotated[int, Ge(0)] = 2  # answers of each step written to samples.jsonl
    # A line per step in selection.jsonl, with prompt, gap mass, length, entropy and losses of every answer
    selection: bool = True
    # k of the monitors of agreement between student and teacher on their k likeliest tokens (method/agreement.py)
    agreement: Annotated[int, Ge(0), "0: off"] = 0
    # Where else the figures of metrics.jsonl go, and report.html if files are taken: tensorboard (workdir/tensorboard),
    # wandb, trackio, mlflow; each but the first is an extra of the package (docs/trackers.md). (): nowhere
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ("tensorboard",)
    report: bool = True  # report.html at the end


@dataclass(frozen=True)
class TrainConfig:
    """`python -m camopd_jax.train`."""

    general_model: str  # Hugging Face folder or hub name of the original model
    specialised_model: str  # the same for the specialised model; the student starts as a copy of it (see `Start`)
    branches: dict[str, BranchConfig] = field(default_factory=_paper)  # by name, in the order of a cycle
    steps: Free[Count] = 120  # where the learning rate is constant
    seed: Seed = 0
    rollout: RolloutConfig = RolloutConfig()
    method: Method = Method()
    start: Start = Start()
    warm_up: WarmUp = WarmUp()
    optimizer: Optimizer = Optimizer()
    # Trains a new adapter on the specialised model, which stays as it is. A specialised model that is an adapter itself
    # needs none: its matrices are trained. The frozen weights have the dtype compute.teacher
    adapter: Adapter | None = None
    compute: Compute = Compute()
    mesh: Free[MeshConfig] = MeshConfig()
    checkpoints: Free[Checkpoints] = Checkpoints()
    evaluation: Free[Evaluation] = Evaluation()
    diagnostics: Free[Diagnostics] = Diagnostics()
    log: Free[Log] = Log()
    max_skipped: Free[Count] = 5  # stop after this many non-finite updates in a row


@dataclass(frozen=True)
class SftConfig:
    """`python -m camopd_jax.sft`: next-token cross-entropy on the answers."""

    model: str  # Hugging Face folder or hub name
    data: Stream  # rows with "messages"; a row whose last turn is not the assistant's gets `answer` as answer
    answer: str = "{answer}"  # with row fields in braces
    steps: Free[Count] = 100  # as in TrainConfig
    seed: Seed = 0
    batch_size: Count = 32
    max_tokens: Count = 512  # prompt and answer together; longer rows are dropped and counted
    smallest_bucket: Count = 64
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)
    adapter: Adapter | None = None  # as in TrainConfig
    compute: Compute = Compute()
    mesh: Free[MeshConfig] = MeshConfig()
    checkpoints: Free[Checkpoints] = Checkpoints()
    evaluation: Free[Evaluation] = Evaluation()
    log: Free[Log] = Log()
    max_skipped: Free[Count] = 5


Config = TrainConfig | SftConfig

# Fields of earlier versions, by the last part of their name, and where they are now.
MOVED = {
    "general": "branches.recovery.prompts",
    "domain": "branches.review.prompts",
    "recovery": "branches.recovery (score is selection.by, mass is selection.mass, keep is selection.keep)",
    "review": "branches.review (score is selection.by, mass is selection.mass, keep is selection.keep)",
    "recovery_steps": "branches.recovery.steps",
    "review_steps": "branches.review.steps",
    "domain_teacher": "branches.review.teacher",
    "places": "rollout.concurrency",
    "tensorboard": 'log.trackers: ("tensorboard",), or () for none',
}
