"""IFEval (arXiv 2311.07911): instructions that a program can check.

The checkers are the official ones, from lm_eval. There are four figures: strict or loose (the answer may also pass
without its first line, last line or asterisks), each by prompt (all its instructions) and by instruction. The grade is
strict by prompt.

Two checkers, for 77 of the 541 prompts, split sentences with NLTK's English Punkt parameters ("punkt_tab"), which NLTK
downloads. If that fails, Punkt works without them: it then treats the point of an abbreviation as the end of a sentence
more often. A line at the start of an evaluation says so.
"""

import contextlib
import functools
import importlib.util
import io
import random
from types import ModuleType

from camopd_jax.errors import UserError
from camopd_jax.evals.task import Grade, Row, Task


def check() -> None:
    """Raises UserError if a package of the checkers is missing."""
    missing = [m for m in ("lm_eval", "nltk", "langdetect", "immutabledict") if importlib.util.find_spec(m) is None]
    if missing:
        raise UserError(f"task ifeval: its checkers need {', '.join(missing)}; pip install 'camopd_jax[eval]'")


def notice() -> str:
    """A line for evaluations without NLTK's English Punkt parameters."""
    if has_punkt():
        return ""
    return (
        "task ifeval: NLTK's punkt_tab is not on this machine; without a network, two of the checkers then split "
        "sentences less exactly. `python -m nltk.downloader punkt_tab` gets it"
    )


@functools.cache
def _checkers() -> ModuleType:
    """The official checkers: `lm_eval.tasks.ifeval.utils`."""
    check()
    import langdetect
    import nltk

    silence = io.StringIO()  # the module downloads punkt_tab on import and prints messages
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        from lm_eval.tasks.ifeval import instructions_util, utils
    langdetect.DetectorFactory.seed = 0  # else its results are random
    if not has_punkt():
        plain = nltk.tokenize.punkt.PunktSentenceTokenizer()
        instructions_util._get_sentence_tokenizer = lambda: plain
        words = nltk.tokenize.NLTKWordTokenizer()
        instructions_util.nltk.word_tokenize = lambda text: [
            word for sentence in plain.tokenize(text) for word in words.tokenize(sentence)
        ]
    return utils


def has_punkt() -> bool:
    """Whether NLTK's English Punkt parameters are on this machine."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def grade(answer: str, row: Row) -> Grade:
    """1 if the answer follows all instructions of the row, else 0; the other three figures are in `parts`."""
    checkers = _checkers()
    kwargs = [{k: v for k, v in arguments.items() if v is not None} for arguments in row["kwargs"]]
    prompt = row["messages"][-1]["content"] if "messages" in row else row.get("prompt", "")
    example = checkers.InputExample(row.get("key", 0), row["instruction_id_list"], prompt, kwargs)
    try:
        random.seed(0)  # checkers without arguments draw some
        strict = checkers.test_instruction_following_strict(example, answer)
        random.seed(0)
        loose = checkers.test_instruction_following_loose(example, answer)
    except Exception as error:  # the checkers do not check their arguments
        raise UserError(
            f"task ifeval: no checker for {example.instruction_id_list} with {kwargs} ({type(error).__name__}: "
            f"{error}); correct the row. Answers are kept: start again to grade them"
        ) from error
    n = len(strict.follow_instruction_list)
    return Grade(
        float(strict.follow_all_instructions),
        parts={
            "prompt_loose": (float(loose.follow_all_instructions), 1),
            "instruction_strict": (sum(strict.follow_instruction_list), n),
            "instruction_loose": (sum(loose.follow_instruction_list), n),
        },
    )


def _check_row(row: Row) -> None:
    ids, kwargs = row["instruction_id_list"], row["kwargs"]
    if not isinstance(ids, list) or not ids or not all(isinstance(name, str) for name in ids):
        raise UserError(f'"instruction_id_list" must be a list of names, this is {ids!r:.80}')
    if not isinstance(kwargs, list) or len(kwargs) != len(ids) or not all(isinstance(one, dict) for one in kwargs):
        raise UserError(f'"kwargs" must be a list of one object for each instruction, this is {kwargs!r:.80}')


TASK = Task(
    grade,
    needs=("instruction_id_list", "kwargs"),
    check_row=_check_row,
    dataset="google/IFEval",
    split="train",
    check=check,
    notice=notice,
)
