"""Tokenizers and chat templates: the tokens of prompts, and of answers to train on."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from camopd_jax.config.schema import Template
from camopd_jax.data.columns import Row
from camopd_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"
Messages = list[dict[str, str]]  # [{"role": ..., "content": ...}, ...]


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of a student and its teacher: the same vocabulary, but the chat templates may differ."""

    student: Tokenizer
    teacher: Tokenizer


# ------------------------------------------------------------------------------------- tokenizers


def load_tokenizer(folder: Path) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face folder; code in a checkpoint is never run.

    Raises:
      UserError: if the folder has no tokenizer, or one that cannot be read.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # hides the warning that torch is missing
    from transformers import AutoTokenizer  # slow to import

    if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer.model").exists():
        raise UserError(f"{folder}: no tokenizer.json; copy the original model's tokenizer files into this folder")
    try:
        # Without a length of its own, at which it would only warn: prompts are measured against the run's cap
        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True, model_max_length=sys.maxsize
        )
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise UserError(
            f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {error}); copy the original "
            "model's tokenizer files into this folder"
        ) from error


def eos_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """All tokens that end an answer, from generation_config.json, config.json and the tokenizer."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            value = json.loads((folder / name).read_text()).get("eos_token_id")
            ids |= set(value if isinstance(value, list) else [] if value is None else [value])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


def check_same_tokenizer(student: Path, teacher: Path) -> str | None:
    """Compares the tokenizers of two Hugging Face folders.

    Returns:
      A warning, if the two models end their answers with different tokens; else None.

    Raises:
      UserError: unless every token has the same id in both.
    """
    of_student, of_teacher = load_tokenizer(student), load_tokenizer(teacher)
    a, b = of_student.get_vocab(), of_teacher.get_vocab()
    if a != b:
        token = min((t for t in a.keys() | b.keys() if a.get(t) != b.get(t)), key=lambda t: (a.get(t, b.get(t)), t))
        raise UserError(
            f"{student} and {teacher}: their tokenizers differ, first at token {token!r} (id {a.get(token)} and "
            f"{b.get(token)}); give models that share one tokenizer"
        )
    student_eos, teacher_eos = eos_ids(student, of_student), eos_ids(teacher, of_teacher)
    if student_eos != teacher_eos:
        tokens = of_student.convert_ids_to_tokens
        return (
            f"answers end with {tokens(list(student_eos))} in {student} but with {tokens(list(teacher_eos))} in "
            f"{teacher}; the student's are used"
        )
    return None


# ------------------------------------------------------------------------------ prompts and answers


def prompt_ids(tokenizer: Tokenizer, row: Row, template: Template) -> list[int]:
    """The tokens of a row's prompt.

    "messages" are rendered by the chat template with the generation prompt and the template's options; a conversation
    without system prompt gets the template's. "prompt" is tokenised with the tokenizer's defaults, and "prompt_ids" are
    used unchanged.

    Raises:
      UserError: if the tokenizer has no chat template, or if the template fails for the conversation.
    """
    if "messages" in row:
        return _render(tokenizer, _with_system(_request(row["messages"]), template), template, open_answer=True)
    if "prompt" in row:
        return list(tokenizer(row["prompt"])["input_ids"])
    return list(row["prompt_ids"])


def fill(answer: str, row: Row, where: str) -> str:
    """Replaces the fields in braces in an answer by the row's values.

    Args:
      where: the row's file and number, for error messages.

    Raises:
      UserError: naming a field that the row does not have.
    """
    try:
        return answer.format_map(row)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: the answer {answer!r} asks for the field {error}, which the row lacks; add it, or change "
            "the config's answer"
        ) from error


def answer_ids(tokenizer: Tokenizer, row: Row, answer: str, template: Template) -> tuple[list[int], list[int]]:
    """The tokens of a row's prompt and of its answer, which are the tokens that the template writes after the prompt.

    The answer is the row's last assistant turn, or else `answer`. It ends with the template's last special token, which
    ends an answer when the model samples it.

    Raises:
      UserError: if the rendered conversation does not begin with the rendered prompt.
    """
    prompt = prompt_ids(tokenizer, row, template)
    messages = row["messages"]
    if messages[-1]["role"] != "assistant":
        messages = [*messages, {"role": "assistant", "content": answer}]
    conversation = _render(tokenizer, _with_system(messages, template), template, open_answer=False)
    if conversation[: len(prompt)] != prompt or len(conversation) == len(prompt):
        raise UserError(
            "chat template: the rendered conversation does not begin with the rendered prompt; give template "
            "options that make it so, for instance enable_thinking=False"
        )
    response = conversation[len(prompt) :]
    special = set(tokenizer.all_special_ids)
    while len(response) > 1 and response[-1] not in special and any(i in special for i in response):
        response.pop()  # for instance a line break after the end of the turn
    return prompt, response


def _request(messages: Messages) -> Messages:
    """The conversation up to the last turn that is not the assistant's."""
    messages = list(messages)
    while len(messages) > 1 and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def _with_system(messages: Messages, template: Template) -> Messages:
    if template.system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": template.system}, *messages]


def _render(tokenizer: Tokenizer, messages: Messages, template: Template, open_answer: bool) -> list[int]:
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path}: no chat template in tokenizer_config.json or chat_template.jinja; copy "
            'that of the original model, or give rows with "prompt" instead of "messages"'
        )
    options: dict[str, Any] = template.options
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_answer, **options)
    except Exception as error:  # jinja2 raises what the template raises
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template refuses a conversation of roles "
            f"{[m['role'] for m in messages]} ({error}); change the rows, or the config's template options"
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
