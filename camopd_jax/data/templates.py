"""Tokenizers and chat templates: the tokens of prompts."""

import contextlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from camopd_jax.config.schema import Template
from camopd_jax.data import dates, sources
from camopd_jax.data.columns import Row
from camopd_jax.data.sources import LocatedRow
from camopd_jax.errors import UserError
from camopd_jax.models.disk import LFS, is_lfs_pointer, read_json
from camopd_jax.models.fields import TOKENS
from camopd_jax.models.peft_settings import base_folder
from camopd_jax.runtime.progress import work

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"
Messages = list[dict[str, str]]  # [{"role": ..., "content": ...}, ...]


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of a student and its teacher: common tokens are the same, but the chat templates may differ."""

    student: "Reader"
    teacher: "Reader"

    @property
    def read_alike(self) -> bool:
        """Whether both give every row the same token ids, and the teacher has embeddings for all of them."""
        a, b = self.student.tokenizer, self.teacher.tokenizer
        if self.student.vocab_size > self.teacher.vocab_size:
            return False
        same = a.chat_template == b.chat_template and a.special_tokens_map == b.special_tokens_map
        return same and a.get_vocab() == b.get_vocab() and a("a")["input_ids"] == b("a")["input_ids"]


@dataclass(frozen=True)
class Reader:
    """A model's tokenizer, and the number of rows of its embedding."""

    tokenizer: Tokenizer
    vocab_size: int

    def prompt(self, row: Row, template: Template, where: str) -> list[int]:
        """`prompt_ids` of a row.

        Args:
          where: the row's file and line, for error messages.

        Raises:
          UserError: as `prompt_ids` and `check`, naming the row.
        """
        with sources.naming(where):
            return self.check(prompt_ids(self.tokenizer, row, template))

    def prompts(self, rows: Sequence[LocatedRow], template: Template) -> list[list[int]]:
        """`prompt` of each row. Their texts are tokenised at once, in the tokenizer's own threads."""
        rendered, plain = dict[int, str](), dict[int, str]()
        of_rows = dict[int, list[int]]()
        for i, (row, where) in enumerate(rows):
            with sources.naming(where):
                if "messages" in row:
                    rendered[i] = render(self.tokenizer, row, template, open_answer=True)
                elif "prompt" in row:
                    plain[i] = row["prompt"]
                else:
                    of_rows[i] = prompt_ids(self.tokenizer, row, template)
        of_rows |= zip(rendered, tokens_of_each(self.tokenizer, list(rendered.values())), strict=True)
        of_rows |= zip(plain, text_ids_of_each(self.tokenizer, list(plain.values())), strict=True)
        checked = []
        for i, (_, where) in enumerate(rows):
            with sources.naming(where):
                checked.append(self.check(of_rows[i]))
        return checked

    def check(self, ids: list[int]) -> list[int]:
        """Returns the token ids unchanged.

        Raises:
          UserError: naming a token without a row in the embedding.
        """
        beyond = next((i for i in ids if i >= self.vocab_size), None)
        if beyond is None:
            return ids
        raise UserError(
            f"token {self.tokenizer.convert_ids_to_tokens(beyond)!r} (id {beyond}) is beyond the {self.vocab_size} "
            f"rows of the embedding of {self.tokenizer.name_or_path}; take it out of the row, or use the tokenizer of "
            "the model's weights"
        )


# ------------------------------------------------------------------------------------- tokenizers

PROCESSOR_TEMPLATE = "chat_template.json"  # the chat template of a multimodal model's processor
_PROBES = ("Hello world", "it's 2024:  12345", "naïve 你好 🙂", "def f(x):\n\n    return x\n")
_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))  # each is a complete vocabulary


def load_tokenizer(folder: Path) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face folder; code in a checkpoint is never run.

    Raises:
      UserError: if the folder has no tokenizer, or one that cannot be read.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # hides the warning that torch is missing
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # hides a warning when a process is forked later
    with work("importing transformers"):
        from transformers import AutoTokenizer  # slow to import

    if not _has_vocabulary(folder):
        folder = base_folder(folder)  # a PEFT adapter may have no tokenizer of its own
    # Without these files transformers may return a tokenizer with an empty vocabulary.
    if not _has_vocabulary(folder):
        raise UserError(f"{folder}: no tokenizer.json; copy the original model's tokenizer files into this folder")
    if not (folder / "tokenizer.json").exists() and (folder / "tokenizer.model").exists() and not _has_sentencepiece():
        raise UserError(
            f"{folder}: no tokenizer.json, and tokenizer.model needs a package: pip install sentencepiece protobuf"
        )
    try:
        # Without a length of its own, at which it would only warn: prompts are measured against the run's cap
        with work(f"reading the tokenizer of {folder.name}"):
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True, model_max_length=sys.maxsize
            )
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise UserError(_unreadable(folder, error)) from error
    if not tokenizer.chat_template and (folder / PROCESSOR_TEMPLATE).exists():
        tokenizer.chat_template = read_json(folder / PROCESSOR_TEMPLATE).get("chat_template")
    return tokenizer


def _unreadable(folder: Path, error: Exception) -> str:
    """Why transformers cannot read a folder's tokenizer, for which it also reads config.json."""
    from transformers import AutoConfig, __version__

    reason = f"cannot be read by transformers {__version__} ({type(error).__name__}: {error})"
    present = [folder / name for names in _FILES for name in names if (folder / name).is_file()]
    if pointer := next(filter(is_lfs_pointer, present), None):
        return f"{pointer} is {LFS}"
    if (file := folder / "tokenizer_config.json").exists() and "auto_map" in read_json(file):
        return (
            f"{file}: auto_map asks for code from the checkpoint, which is never run; delete the field if "
            "tokenizer.json is the complete tokenizer"
        )
    if (file := folder / "config.json").exists():
        try:
            AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except Exception:
            return f"{file} {reason}; correct the field, or fetch the checkpoint again"
    return f"{folder}: its tokenizer {reason}; copy the original model's tokenizer files into this folder"


def class_warning(folder: Path, tokenizer: Tokenizer) -> str | None:
    """A warning, if the tokenizer_class of a folder gives a text other tokens than its tokenizer.json, else None.

    Some classes of transformers 5 take only the vocabulary from tokenizer.json.
    """
    from tokenizers import Tokenizer as Tokens
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if type(tokenizer) is PreTrainedTokenizerFast or not file.exists():
        return None
    plain = Tokens.from_file(str(file))
    plain.no_truncation()
    plain.no_padding()
    common = [token for token in tokenizer.all_special_tokens if plain.token_to_id(token) is not None]
    for text in (*_PROBES, *(f"{token}a {token} a" for token in common)):
        own, given = plain.encode(text, add_special_tokens=False).tokens, tokenizer.tokenize(text)
        if own != given:
            return (
                f"{folder}: {type(tokenizer).__name__} (tokenizer_class in tokenizer_config.json) reads {text!r} as "
                f"{given}, but tokenizer.json itself as {own}; set tokenizer_class to 'PreTrainedTokenizerFast' if the "
                "model was trained with the latter"
            )
    return None


def _has_vocabulary(folder: Path) -> bool:
    return any(all((folder / name).exists() for name in names) for names in _FILES)


def _has_sentencepiece() -> bool:
    return all(importlib.util.find_spec(name) for name in ("sentencepiece", "google.protobuf"))


def eos_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """All tokens that end an answer, from generation_config.json, config.json and the tokenizer.

    Negative ids, which stand for none, are left out.

    Raises:
      UserError: for a file that is not JSON, and ids that are no integers.
    """
    ids: set[int] = set()
    base = base_folder(folder)  # of a PEFT adapter, the model's
    for name in ("generation_config.json", "config.json"):
        if (base / name).exists():
            value = read_json(base / name).get("eos_token_id")
            TOKENS.check(value, "eos_token_id", str(base / name))
            ids |= {i for i in (value if isinstance(value, list) else [value]) if i is not None and i >= 0}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


@dataclass(frozen=True)
class Shared:
    """The vocabulary that a student's tokenizer shares with those of its teachers."""

    size: int | None  # ids below this are the same tokens in all of them; None: the vocabularies are equal
    warnings: tuple[str, ...]


def shared_vocabulary(student: Path, teachers: Sequence[Path]) -> Shared:
    """Compares the tokenizers of Hugging Face folders. A tokenizer may have additional tokens after the common ones.

    Raises:
      UserError: if a token has different ids.
    """
    own, size, notes = load_tokenizer(student), None, list[str]()
    ends = eos_ids(student, own)
    for teacher in teachers:
        other = load_tokenizer(teacher)
        common, more = _common(student, own, teacher, other)
        if more is not None:
            size = common if size is None else min(size, common)
            notes.append(
                f"the tokenizers of {student} and {teacher} share their first {common} tokens; the student's answers "
                f"contain no others, such as {more!r}"
            )
        if ends != (of_teacher := eos_ids(teacher, other)):
            notes.append(
                f"answers end with {_names(own, ends)} in {student} but with {_names(other, of_teacher)} in {teacher}; "
                "the student's are used"
            )
    if size is not None and all(i >= size for i in ends):
        notes.append(f"no answer can end: the tokens that end one in {student} are not among the shared ones")
    return Shared(size, tuple(notes))


def _names(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Any]:
    """The tokens with these ids; an id that the tokenizer does not have stays as it is."""
    return [tokenizer.convert_ids_to_tokens(i) or i for i in ids]


def _common(student: Path, own: Tokenizer, teacher: Path, other: Tokenizer) -> tuple[int, str | None]:
    """The number of common tokens, and the first additional token, or None.

    Raises:
      UserError: if the tokenizers differ before the end of one of them.
    """
    a, b = own.get_vocab(), other.get_vocab()
    common = 1 + min(max(a.values()), max(b.values()))
    differ = [t for t in a.keys() | b.keys() if a.get(t) != b.get(t)]
    if not differ:
        return common, None
    conflicts = [t for t in differ if min(a.get(t, common), b.get(t, common)) < common]
    if conflicts:
        first = min(conflicts, key=lambda t: (a.get(t, b.get(t)), t))
        raise UserError(
            f"{student} and {teacher}: their tokenizers differ, first at token {first!r} (id {a.get(first)} and "
            f"{b.get(first)}); give models that share one tokenizer"
        )
    return common, min(differ, key=lambda t: (a.get(t) or b[t], t))


# ---------------------------------------------------------------------------------------- prompts


def prompt_ids(tokenizer: Tokenizer, row: Row, template: Template) -> list[int]:
    """The tokens of a row's prompt.

    "messages" are rendered by the chat template with the generation prompt and the template's options; a conversation
    without system prompt gets the template's. "prompt" is tokenised by `text_ids`, and "prompt_ids" are used unchanged.

    Raises:
      UserError: if the tokenizer has no chat template, if the template fails for the conversation, or if that has only
        turns of the assistant.
    """
    if "messages" in row:
        if all(message["role"] == "assistant" for message in row["messages"]):
            raise UserError("the conversation has only turns of the assistant; a prompt needs another one")
        return tokens(tokenizer, render(tokenizer, row, template, open_answer=True))
    if "prompt" in row:
        return text_ids(tokenizer, row["prompt"])
    return list(row["prompt_ids"])


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text with the tokenizer's defaults, without tokens that it appends (EOS, by `add_eos_token`)."""
    return text_ids_of_each(tokenizer, [text])[0]


def text_ids_of_each(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """`text_ids` of each text."""
    if not texts:
        return []
    read, bos = tokenizer(texts, return_special_tokens_mask=True), tokenizer.bos_token_id

    def own(ids: list[int], mask: list[int]) -> list[int]:
        if bos is not None and ids[:2] == [bos, bos]:
            warnings.warn(
                f"{tokenizer.name_or_path}: the tokenizer adds {tokenizer.bos_token!r} to prompts that begin with it "
                'already; remove it from the field "prompt" of the rows',
                stacklevel=2,
            )
        last = next((i for i in reversed(range(len(mask))) if not mask[i]), None)
        return list(ids)[: None if last is None else last + 1]

    return [own(*pair) for pair in zip(read["input_ids"], read["special_tokens_mask"], strict=True)]


def tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text, without additional special tokens."""
    return tokens_of_each(tokenizer, [text])[0]


def tokens_of_each(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """`tokens` of each text."""
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []


def render(tokenizer: Tokenizer, row: Row, template: Template, open_answer: bool) -> str:
    """A row's conversation, rendered by the chat template with the row's "tools".

    Args:
      open_answer: whether it ends with the generation prompt instead of the assistant's turn.

    Raises:
      UserError: if the tokenizer has no chat template, or one that refuses the conversation or does not write its
        tools.
    """
    messages = _request(row["messages"]) if open_answer else row["messages"]
    messages = _with_system(messages, template)
    options = template.options
    tools = tools_of(row)
    text = _render(tokenizer, messages, options | ({"tools": tools} if tools else {}), open_answer)
    if tools:
        _need_difference(tokenizer, text, _render(tokenizer, messages, options, open_answer), "tools")
    elif any("tool_calls" in message for message in messages):
        without = [{name: value for name, value in m.items() if name != "tool_calls"} for m in messages]
        _need_difference(tokenizer, text, _render(tokenizer, without, options, open_answer), "tool_calls")
    return text


def _need_difference(tokenizer: Tokenizer, text: str, without: str, field: str) -> None:
    """Raises a UserError if the rendered text is the same without a field of the row."""
    if text == without:
        raise UserError(
            f'the chat template of {tokenizer.name_or_path} does not write "{field}"; remove them from the row, or use '
            "a model whose template does"
        )


def tools_of(row: Row) -> list[dict[str, Any]]:
    """The JSON schemas of a row's tools; the row may have them as JSON text.

    Raises:
      UserError: if they are something else.
    """
    tools = row.get("tools") or []
    with contextlib.suppress(ValueError):
        tools = json.loads(tools) if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError('"tools" must be a list of JSON schemas')
    return tools


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


def _render(tokenizer: Tokenizer, messages: Messages, options: dict[str, Any], open_answer: bool) -> str:
    if not tokenizer.chat_template and "chat_template" not in options:
        raise UserError(
            f"{tokenizer.name_or_path}: no chat template in tokenizer_config.json or chat_template.jinja; copy "
            'that of the original model, or give rows with "prompt" instead of "messages"'
        )
    try:
        written = tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
        options = options | {"chat_template": dates.with_date(written)}
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_answer, **options)
        )
    except Exception as error:  # jinja2 raises what the template raises
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template refuses a conversation of roles "
            f"{[m['role'] for m in messages]} ({error}); change the rows, or the config's template options"
        ) from error
