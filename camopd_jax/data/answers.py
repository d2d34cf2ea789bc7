"""The tokens of answers to train on: what the chat template writes after a prompt, up to the end of the turn."""

from functools import partial
from pathlib import Path
from typing import Any

from camopd_jax.config.schema import Template
from camopd_jax.data import templates
from camopd_jax.data.columns import Row
from camopd_jax.data.templates import Reader, Tokenizer
from camopd_jax.errors import UserError

_MARK = "※answer※"  # in place of an answer, to find what the template writes around it


class Unlearnable(UserError):
    """An answer that does not continue the prompt; its row is left out."""


def answer_ids(reader: Reader, row: Row, answer: str, template: Template) -> tuple[list[int], list[int]]:
    """The tokens of a row's prompt and of its answer, which continue the prompt as the template writes it.

    The answer is the row's last assistant turn, or else `answer`. It ends with the last special token that the template
    writes after an answer, or with the tokenizer's EOS if the template writes none.

    Raises:
      Unlearnable: if the answer does not continue the prompt.
      UserError: as `Reader.prompt`.
    """
    tokenizer = reader.tokenizer
    opened = templates.render(tokenizer, row, template, open_answer=True)
    prompt = templates.tokens(tokenizer, opened)
    body, closing = _continuation(tokenizer, row, answer, template, opened)
    stop, eos = _stop(tokenizer, closing), tokenizer.eos_token_id
    text = body + closing[: stop[1]] if stop else body if eos is not None else body + closing
    response = _tokens_after(tokenizer, prompt, opened, text)
    if not stop and eos is not None:
        response.append(eos)
    if not response:
        raise Unlearnable("the answer is empty, and the chat template has no token that ends it")
    return reader.check(prompt), reader.check(response)


def _continuation(tokenizer: Tokenizer, row: Row, answer: str, template: Template, opened: str) -> tuple[str, str]:
    """The answer's text as it continues the prompt, and the text that the template writes after it.

    Args:
      opened: the prompt's text.
    """
    turns, turn = row["messages"], {"role": "assistant", "content": answer}
    if turns[-1]["role"] == "assistant":
        *turns, turn = turns
        answer = turn["content"]
    before, closing = _around(tokenizer, row | {"messages": turns}, turn, template)
    closed = templates.render(tokenizer, row | {"messages": [*turns, turn]}, template, open_answer=False)
    written = closed[len(opened) :]
    if closed.startswith(opened) and _squeezed(answer) in _squeezed(written):
        end = _common_end(written, closing)  # an empty answer may be followed by less
        return written.removesuffix(end), end
    # The generation prompt opens the reasoning ("<think>\n"), which the template removes from answers.
    opening = opened.removeprefix(before)
    if not opened.startswith(before) or not closed.startswith(before):
        raise Unlearnable(
            "the chat template's conversation does not begin with its prompt; give template options that make it so, "
            "for instance enable_thinking=False"
        )
    if answer.startswith(opening):
        return answer.removeprefix(opening), closing
    if answer.strip().startswith(opening.strip()):
        return answer.strip().removeprefix(opening.strip()), closing
    raise Unlearnable(f"the chat template opens every answer with {opening!r}, and this one does not begin with it")


def _around(tokenizer: Tokenizer, row: Row, turn: dict[str, Any], template: Template) -> tuple[str, str]:
    """What the chat template writes before and after the content of a turn that answers a row's conversation."""
    turns = [*row["messages"], turn | {"content": _MARK}]
    text = templates.render(tokenizer, row | {"messages": turns}, template, open_answer=False)
    before, mark, closing = text.rpartition(_MARK)
    if not mark:
        raise Unlearnable("the chat template does not write the answer")
    return before, closing


def _common_end(a: str, b: str) -> str:
    pairs = zip(reversed(a), reversed(b), strict=False)
    shared = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
    return a[len(a) - shared :]


def _squeezed(text: str) -> str:
    """The text without white space, which templates trim."""
    return "".join(text.split())


def _stop(tokenizer: Tokenizer, closing: str) -> tuple[int, int] | None:
    """The last special token in the text after an answer, and the position of its end; None if there is none.

    A token is special if decoding can skip it: `all_special_ids` lacks tokens that only tokenizer.json marks.
    """
    for token in reversed(templates.tokens(tokenizer, closing)):
        text = str(tokenizer.convert_ids_to_tokens(token))
        if text in closing and tokenizer.decode([token]) and not tokenizer.decode([token], skip_special_tokens=True):
            return token, closing.rindex(text) + len(text)
    return None


def _tokens_after(tokenizer: Tokenizer, prompt: list[int], opened: str, text: str) -> list[int]:
    """The tokens of a text after a prompt: tokenised with it, or alone if a token would belong to both."""
    complete = templates.tokens(tokenizer, opened + text)
    if complete[: len(prompt)] == prompt:
        return complete[len(prompt) :]
    apart = templates.tokens(tokenizer, text)
    as_text = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    if as_text([*prompt, *apart]) != as_text(complete):
        raise Unlearnable("the answer's first token cannot be separated from the prompt")
    return apart


# --------------------------------------------------------------------------------- the end of a turn


def end_of_turn(tokenizer: Tokenizer, template: Template) -> int | None:
    """The last special token that the chat template writes after an answer, if any.

    Raises:
      UserError: if there is no chat template, or one that refuses the plainest conversation.
    """
    row = {"messages": [{"role": "user", "content": "hi"}]}
    stop = _stop(tokenizer, _around(tokenizer, row, {"role": "assistant"}, template)[1])
    return stop[0] if stop else None


def eos_warning(folder: Path, tokenizer: Tokenizer, template: Template) -> str | None:
    """A warning if generation does not stop at the token that ends a turn in the chat template, or else None.

    Raises:
      UserError: as `end_of_turn`.
    """
    last, ends = end_of_turn(tokenizer, template), templates.eos_ids(folder, tokenizer)
    if last is None or last in ends:
        return None
    name = tokenizer.convert_ids_to_tokens
    return (
        f"the chat template ends answers with {name(last)!r}, but generation stops only at {name(list(ends))}: answers "
        f"would run to their cap; add it to eos_token_id in {folder / 'generation_config.json'}"
    )


def prompt_warning(tokenizer: Tokenizer, template: Template) -> str | None:
    """A warning if the chat template leaves out what precedes an answer where one is to be generated, or else None.

    Raises:
      UserError: as `end_of_turn`.
    """
    row = {"messages": [{"role": "user", "content": "hi"}]}
    opened, closed = (templates.render(tokenizer, row, template, open_answer=flag) for flag in (True, False))
    opening = _around(tokenizer, row, {"role": "assistant"}, template)[0].removeprefix(opened).strip()
    if opened != closed or not opening:
        return None
    return (
        f"the chat template writes {opening!r} before an answer, but prompts do not end with it, so that the model has "
        "to write it; let the template write it if add_generation_prompt is set"
    )


def end_warnings(folder: Path, tokenizer: Tokenizer, template: Template) -> list[str]:
    """Warnings about the token at the end of the answers of `answer_ids`."""
    try:
        last, warning = end_of_turn(tokenizer, template), eos_warning(folder, tokenizer, template)
    except UserError:  # the template may accept the rows' conversations
        return []
    if last is not None:
        return [warning] if warning else []
    without = "the chat template writes no special token after an answer"
    if tokenizer.eos_token_id is None:
        return [f"{without}, and the tokenizer has no eos_token: the model will not learn to stop"]
    return [f"{without}; the tokenizer's eos_token {tokenizer.eos_token!r} ends the answers to train on"]
