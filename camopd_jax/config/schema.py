"""What a run is, as frozen dataclasses. A config file's `ConfigDict` becomes one of them at the edge.

`TrainConfig` is the main job, `SftConfig` supervised fine-tuning. Every field is documented here and nowhere else. A
number's limits stand in its type (`annotated_types`), and a text after them says what a special value means; numbers
are finite. A key that is not a field is refused by name, with the nearest field as a hint.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

Count = Annotated[int, Gt(0)]
Seed = Annotated[int, Ge(0), Lt(2**31)]
Share = Annotated[float, Gt(0), Le(1)]


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
    limit: Annotated[int, Gt(0), "None: all"] | None = None  # only the first rows
    template: Template = Template()
    teacher_template: Template | None = None  # None: the student's
    too_long: Literal["drop", "truncate"] = "drop"  # a prompt above the cap: drop and count, or cut its front


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one may be -1: what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; the default is the model's own distribution. The filters act in this order."""

    temperature: Annotated[float, Ge(0), "0: greedy"] = 1.0
    top_k: Annotated[int, Ge(0), "0: off"] = 0  # keep the k likeliest tokens
    top_p: Annotated[float, Gt(0), Le(1), "1: off"] = 1.0  # keep the likeliest that together reach this probability
    min_p: Annotated[float, Ge(0), Lt(1), "0: off"] = 0.0  # keep those with this share of the likeliest's probability

    @staticmethod
    def of(settings: "Sampling") -> "Sampling":
        """The four fields alone, of settings that have more: hashable, for compiled functions."""
        return Sampling(
            temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p
        )


@dataclass(frozen=True)
class RolloutConfig(Sampling):
    """How the student answers, and how the answers are scored. A temperature other than 1 and any filter make the
    update slightly off-policy.
    """

    batch_size: Count = 64  # prompts a step, one answer each
    max_prompt_tokens: Count = 512
    max_response_tokens: Count = 512
    smallest_bucket: Count = 64  # prompt and answer lengths are padded to this times a power of two
    # The student's log-probabilities of its answers: a forward pass of their own, or those that the sampler computed.
    # The two are compared now and then. "auto": the sampler's where products are float32
    student_logprobs: Literal["auto", "forward", "sampler"] = "auto"
    # The devices while they answer; tensor 0: as in config.mesh. Weights that are split by fsdp are gathered for every
    # token: by default each tensor group has a copy
    mesh: MeshConfig = MeshConfig(tensor=0)
    # Answers in progress at one time; the other prompts wait and enter as answers end
    concurrency: Annotated[int, Ge(0), "0: the whole batch"] = 0
    shrinks: bool = False  # whether a batch goes on as half a batch when half its answers are done
    # Answers in one forward pass that scores them
    score_batch: Annotated[int, Ge(0), "0: config.optimizer.micro_batch"] = 0


@dataclass(frozen=True)
class SelectionConfig:
    """Which answers of a batch an update learns from."""

    by: Literal["absolute_gap", "positive_gap"] = "absolute_gap"  # an answer's gap mass: Eq 6, or Eq 7
    mass: Share = 0.8  # rho, the share that is kept; 1: all
    # mass: the smallest set of answers with that share of the gap mass (Eq 8). Controls: fraction, that share of the
    # answers, by falling gap mass; random, as many answers as by mass, drawn by lot
    keep: Literal["mass", "fraction", "random"] = "mass"


@dataclass(frozen=True)
class BranchConfig:
    """One source of the training signal: prompts, the teacher of the answers to them, and how hard it pulls."""

    prompts: Stream = Stream()
    teacher: str = "general"  # "general" or "specialised": that model of the config; else a Hugging Face folder or name
    # What pulls the student toward the teacher: a name of camopd_jax/method/objectives, with its options in
    # parentheses, as in "jsd(beta=0.1)"
    objective: str = "sampled_token"
    selection: SelectionConfig = SelectionConfig()
    scale: Annotated[float, Gt(0)] = 1.0  # r: factor on the pull (Eq 9)
    steps: Annotated[int, Ge(0)] = 1  # n: updates in a row in each cycle (Eq 5); in a mixed step, parts of its batch


def _paper() -> dict[str, BranchConfig]:
    """The paper's two branches."""
    return {
        "recovery": BranchConfig(teacher="general", selection=SelectionConfig("absolute_gap"), scale=2.0, steps=3),
        "review": BranchConfig(teacher="specialised", selection=SelectionConfig("positive_gap"), scale=1.0, steps=1),
    }


@dataclass(frozen=True)
class Method:
    """CaMOPD: what its branches share. The defaults are the paper's."""

    # alternate: each step is of one branch. mixed: each step is of all, in one gradient over a batch that is split
    # between them in proportion to their `steps` (vanilla multi-teacher distillation, Eq 3)
    schedule: Literal["alternate", "mixed"] = "alternate"
    # The gap is clipped to +- this; the paper names no clip
    advantage_clip: Annotated[float, Gt(0), "None: no clip"] | None = None
    importance_gate: tuple[float, float] | None = None  # w_t = pi/mu inside, 0 outside (MiMo form); None: w_t = 1
    normalise: Literal["sequence", "token"] = "sequence"  # token mean in each answer first (the paper), or over all
    moments: Literal["shared", "separate"] = "shared"  # one Adam state for all branches (the paper), or one each
    # Who answers the prompts: the student; or each branch's teacher, as in distillation on teachers' answers (a
    # control, whose objective is cross_entropy)
    answers: Literal["student", "teacher"] = "student"
    # In a mixed step: the plain sum of the gradients, or without what of each opposes the others (PCGrad)
    conflict: Literal["sum", "pcgrad"] = "sum"


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
    micro_batch: Count = 8  # sequences in one forward and backward
    # Which parameters are trained: "all", or a regular expression that is searched for in names such as
    # layers.attention.query.kernel. The others are frozen: no gradient, no moments, no place in a checkpoint
    trained: str = "all"


@dataclass(frozen=True)
class Compute:
    """Precision and memory. "auto" is bfloat16 on TPU and GPU and float32 on CPU."""

    params: Literal["float32", "bfloat16"] = "float32"  # the student's master weights
    teacher: Literal["auto", "float32", "bfloat16"] = "auto"  # the teachers' weights
    matmul: Literal["auto", "float32", "bfloat16"] = "auto"
    # What the backward pass computes again: none; dots: all but the products; block: every layer; rollout: every layer,
    # from what entered it while the student answered, so that there is no forward pass. That is kept from the rollout
    # to the gradient: 4 bytes x (layers + 1) x model width for every token of the batch
    remat: Literal["none", "dots", "block", "rollout"] = "block"
    # How whole rows attend (scoring, updates, prefill; decoding is always plain). fused: Pallas on TPU, cuDNN on GPU,
    # refused where neither takes the model; xla: plainly; auto: fused where it can be and rows are long enough
    attention: Literal["auto", "xla", "fused"] = "auto"
    # What waits in host memory while it is idle: a teacher except while it scores, Adam's moments except for the
    # update. ahead: each comes back while the stage before computes; late: moments only when the gradient is complete,
    # so that they never lie beside its activations, at the price of a copy that nothing hides
    offload: Literal["off", "ahead", "late"] = "off"
    # Tokens of one chip whose logits exist at one time; the head is gathered once for all
    logits_chunk: Annotated[int, Ge(0), "0: as many as 256 MiB hold"] = 0

    @property
    def offloads(self) -> bool:
        return self.offload != "off"


@dataclass(frozen=True)
class Checkpoints:
    every: Count = 20  # steps; one is always written at the end
    keep_last: Count = 2
    # Where evaluation.every > 0. Best: the most that came back among those whose domain is kept up to one standard
    # error; while there is none, the one that keeps most. Runs of `sft`: the highest mean accuracy
    keep_best: Annotated[int, Ge(0)] = 1
    export: Literal["last", "best"] = "last"  # which one becomes workdir/export


@dataclass(frozen=True)
class Benchmark(Sampling):
    """Questions, how they are asked and how the answers are graded."""

    name: str = ""
    # Its rules: evals/tasks.py. exact: the whole answer; choice: the letter after the last "Final answer:"; likelihood:
    # how likely the model holds a given answer
    task: str = "exact"
    source: str = ""  # as of a Stream; "": the task's own dataset
    split: str = ""  # of a `datasets` dataset; "": the task's own
    axis: Literal["general", "domain"] = "general"
    limit: Annotated[int, Gt(0), "None: all"] | None = None  # only the first questions
    max_response_tokens: Count = 64
    instruction: str | None = None  # put behind each question; None: the task's own
    answer: str = "{answer}"  # of task likelihood: the given answer, row fields in braces
    template: Template = Template()
    samples: Count = 1  # answers to a question; its score is their mean
    temperature: Annotated[float, Ge(0), "0: greedy"] = field(default=0.0, kw_only=True)


@dataclass(frozen=True)
class Judge:
    """The language model that marks tasks `roleplay` and `writing`. Its key: OPENAI_API_KEY in the environment."""

    endpoint: str = ""  # of an OpenAI-compatible server, as in "http://localhost:8000/v1"
    model: str = ""


@dataclass(frozen=True)
class Evaluation:
    every: Annotated[int, Ge(0), "0: only before and after"] = 0  # steps
    # The first of each benchmark, for evaluations between the steps
    questions: Annotated[int, Gt(0), "None: all"] | None = None
    # End after this many evaluations in a row without a new best (`Checkpoints`)
    patience: Annotated[int, Ge(0), "0: off"] = 0
    batch_size: Count = 64
    seed: Seed = 0
    answers: str = ""  # folder of answers that several runs share, by fingerprint; "": in the work directory
    benchmarks: tuple[Benchmark, ...] = ()
    judge: Judge = Judge()


@dataclass(frozen=True)
class Diagnostics:
    """Of gradients (analysis/gradients.py), on prompts of their own: a run is the same with and without them."""

    every: Annotated[int, Ge(0), "0: off"] = 0  # steps, and before the first
    rows: Count = 64  # answers of each branch
    # Only parameters whose name holds one of these words, commas between, as in "attention.output,mlp"; "": all
    parameters: str = ""
    # Numbers kept of each matrix's gradient, by a random projection: little memory, an error of about sqrt(2 / sketch).
    # Take an odd number: it folds no matrix along its columns
    sketch: Annotated[int, Ge(0), "0: the gradients themselves, exact"] = 0
    micro_batch: Count = 4  # answers whose gradients are in memory at one time


@dataclass(frozen=True)
class Log:
    samples: Annotated[int, Ge(0)] = 2  # rollouts of a step written to samples.jsonl
    selection: bool = True  # a line a step in selection.jsonl: every answer's prompt, gap mass, length, entropy, losses
    tensorboard: bool = True
    report: bool = True  # report.html at the end


@dataclass(frozen=True)
class TrainConfig:
    """`python -m camopd_jax.train`."""

    general_model: str  # Hugging Face folder or hub name of the original model
    specialised_model: str  # the same of the specialised one: the student starts as a copy of it
    branches: dict[str, BranchConfig] = field(default_factory=_paper)  # by name, in their order within a cycle
    steps: Count = 120
    seed: Seed = 0
    rollout: RolloutConfig = RolloutConfig()
    method: Method = Method()
    optimizer: Optimizer = Optimizer()
    compute: Compute = Compute()
    mesh: MeshConfig = MeshConfig()
    checkpoints: Checkpoints = Checkpoints()
    evaluation: Evaluation = Evaluation()
    diagnostics: Diagnostics = Diagnostics()
    log: Log = Log()
    max_skipped: Count = 5  # stop after this many non-finite updates in a row


@dataclass(frozen=True)
class SftConfig:
    """`python -m camopd_jax.sft`: next-token cross-entropy on the answers."""

    model: str  # Hugging Face folder or hub name
    data: Stream  # rows with "messages" that end with an assistant turn, or with "messages" and "answer"
    answer: str = "{answer}"  # what the model shall say, where a row has no assistant turn; row fields in braces
    steps: Count = 100
    seed: Seed = 0
    batch_size: Count = 32
    max_tokens: Count = 512  # prompt and answer together; longer rows are dropped and counted
    smallest_bucket: Count = 64
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)
    compute: Compute = Compute()
    mesh: MeshConfig = MeshConfig()
    checkpoints: Checkpoints = Checkpoints()
    evaluation: Evaluation = Evaluation()
    log: Log = Log()
    max_skipped: Count = 5


Config = TrainConfig | SftConfig

# Fields of earlier versions, by their last word, and what they are now.
MOVED = {
    "general": "branches.recovery.prompts",
    "domain": "branches.review.prompts",
    "recovery": "branches.recovery (score is selection.by, mass is selection.mass, keep is selection.keep)",
    "review": "branches.review (score is selection.by, mass is selection.mass, keep is selection.keep)",
    "recovery_steps": "branches.recovery.steps",
    "review_steps": "branches.review.steps",
    "domain_teacher": "branches.review.teacher",
    "places": "rollout.concurrency",
}
