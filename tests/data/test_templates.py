"""Prompts rendered by the chat template, and checks of the tokenizers of student and teacher."""

import logging
import shutil

import pytest
from rows import chat_row, edit_json, swap_tokens

from camopd_jax.config.schema import Template
from camopd_jax.data import templates
from camopd_jax.errors import UserError


def text(tokenizer, ids):
    return tokenizer.decode(ids)


def test_messages_are_rendered_with_the_generation_prompt(tokenizer):
    row = chat_row("reverse abc")
    expected = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False)
    assert templates.prompt_ids(tokenizer, row, Template()) == list(expected)
    assert text(tokenizer, expected) == "<|user|>reverse abc<|end|><|assistant|>"


def test_the_system_prompt_is_added_if_there_is_none(tokenizer):
    template = Template(system="be kind")
    assert text(tokenizer, templates.prompt_ids(tokenizer, chat_row("a"), template)).startswith(
        "<|system|>be kind<|end|><|user|>a"
    )
    own = {"messages": [{"role": "system", "content": "no"}, *chat_row("a")["messages"]]}
    assert text(tokenizer, templates.prompt_ids(tokenizer, own, template)).startswith("<|system|>no<|end|><|user|>a")


def test_a_final_assistant_turn_is_not_part_of_the_prompt(tokenizer):
    ids = templates.prompt_ids(tokenizer, chat_row("a", "b", "c", "d"), Template())
    assert text(tokenizer, ids) == "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"


def test_text_and_ids_are_not_changed(tokenizer):
    assert templates.prompt_ids(tokenizer, {"prompt": "ab"}, Template()) == tokenizer("ab")["input_ids"]
    assert templates.prompt_ids(tokenizer, {"prompt_ids": [3, 4]}, Template()) == [3, 4]


def test_options_are_passed_to_the_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ 'yes' if enable_thinking else 'no' }}")
    assert (
        text(tokenizer, templates.prompt_ids(tokenizer, chat_row("a"), Template(options={"enable_thinking": True})))
        == "yes"
    )
    assert (
        text(tokenizer, templates.prompt_ids(tokenizer, chat_row("a"), Template(options={"enable_thinking": False})))
        == "no"
    )


def test_an_answer_ends_with_the_token_that_ends_a_turn(tokenizer, monkeypatch):
    prompt, answer = templates.answer_ids(tokenizer, chat_row("a"), "b c", Template())
    assert text(tokenizer, prompt) == "<|user|>a<|end|><|assistant|>" and text(tokenizer, answer) == "b c<|end|>"
    assert templates.answer_ids(tokenizer, chat_row("a", "b c"), "", Template()) == (prompt, answer)
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template.replace("<|end|>", "<|end|> "))
    assert text(tokenizer, templates.answer_ids(tokenizer, chat_row("a"), "b c", Template())[1]) == "b c<|end|>"


def test_a_template_that_changes_the_prompt_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages | length }}{% if add_generation_prompt %}x{% endif %}")
    with pytest.raises(UserError, match="does not begin with the rendered prompt"):
        templates.answer_ids(tokenizer, chat_row("a"), "b", Template())


def test_no_template_and_a_template_that_raises(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="no chat template in tokenizer_config.json"):
        templates.prompt_ids(tokenizer, chat_row("a"), Template())
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"refuses a conversation of roles \['user'\] \(roles must alternate\)"):
        templates.prompt_ids(tokenizer, chat_row("a"), Template())


def test_a_long_prompt_is_told_of_by_our_own_cap_alone(folder, caplog):
    """The quickstart's tokenizer_config.json has a length of 256, which transformers would warn of."""
    logging.getLogger("transformers").addHandler(caplog.handler)
    loaded = templates.load_tokenizer(folder)
    try:
        assert len(templates.prompt_ids(loaded, chat_row("ab" * 300), Template())) > 600
        assert caplog.records == []
        loaded.model_max_length = 256
        templates.prompt_ids(loaded, chat_row("ab" * 300), Template())
        assert "sequence length is longer" in caplog.text, "the warning that is meant"
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)


# ---------------------------------------------------------------------------- two folders, one tokenizer


@pytest.fixture
def other(folder, tmp_path):
    """A copy of the folder that a test may change."""
    for file in folder.glob("*.json"):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_eos_ids_of_all_files(folder, other, tokenizer):
    assert templates.eos_ids(folder, tokenizer) == (5,)
    edit_json(other / "generation_config.json", eos_token_id=[5, 0])
    edit_json(other / "config.json", eos_token_id=3)
    assert templates.eos_ids(other, tokenizer) == (0, 3, 5)


def test_equal_tokenizers_pass_and_different_eos_is_a_warning(folder, other):
    assert templates.check_same_tokenizer(folder, other) is None
    edit_json(other / "generation_config.json", eos_token_id=[5, 0])
    told = templates.check_same_tokenizer(folder, other)
    assert "['<|end|>']" in told and "['<|pad|>', '<|end|>']" in told


def test_the_error_for_another_tokenizer_names_the_first_token(folder, other):
    swap_tokens(other, "a", "b")
    with pytest.raises(UserError, match=r"tokenizers differ, first at token 'a' \(id 6 and 7\)"):
        templates.check_same_tokenizer(folder, other)


def test_a_folder_without_a_tokenizer(other):
    (other / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        templates.load_tokenizer(other)
    (other / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        templates.load_tokenizer(other)
