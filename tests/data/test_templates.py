"""Prompts rendered by the chat template, and checks of the tokenizers of student and teacher."""

import json
import logging
import shutil

import pytest
from rows import add_tokens, chat_row, edit_json, swap_tokens
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from camopd_jax.config.schema import Template
from camopd_jax.data import templates
from camopd_jax.data.templates import Reader, Shared
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


@pytest.mark.parametrize("tools", [[{"name": "weather"}], '[{"name": "weather"}]'])
def test_tools_reach_the_template(tokenizer, monkeypatch, tools):
    writes = "{% if tools %}[{{ tools[0].name }}]{% endif %}" + tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", writes)
    row = chat_row("a") | {"tools": tools}
    expected = tokenizer.apply_chat_template(
        row["messages"], tools=[{"name": "weather"}], add_generation_prompt=True, return_dict=False
    )
    assert templates.prompt_ids(tokenizer, row, Template()) == list(expected)
    assert templates.prompt_ids(tokenizer, chat_row("a") | {"tools": []}, Template()) != list(expected)


def test_tools_that_the_template_does_not_write_or_that_are_none(tokenizer):
    reader, template = Reader(tokenizer, 52), Template()
    with pytest.raises(UserError, match=r'^x\.jsonl:7: the chat template of .*generalist does not write "tools"'):
        reader.prompt(chat_row("a") | {"tools": [{"name": "weather"}]}, template, "x.jsonl:7")
    for tools in ("weather", ["weather"], {"name": "weather"}):
        with pytest.raises(UserError, match='x: "tools" must be a list of JSON schemas'):
            reader.prompt(chat_row("a") | {"tools": tools}, template, "x")
    assert reader.prompt(chat_row("a") | {"tools": "[]"}, template, "x") == reader.prompt(chat_row("a"), template, "x")


def test_nothing_is_set_behind_a_prompt(folder, tmp_path):
    """A tokenizer with add_eos_token ends every text with EOS, which would end a prompt; the text's own EOS stays."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    pieces = [{"SpecialToken": {"id": "<|user|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
              {"SpecialToken": {"id": "<|end|>", "type_id": 0}}]  # fmt: skip
    special = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in (("<|user|>", 3), ("<|end|>", 5))}
    processor = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": processor}))
    read = templates.load_tokenizer(tmp_path)
    assert read("ab")["input_ids"] == [3, 6, 7, 5]
    assert templates.prompt_ids(read, {"prompt": "ab"}, Template()) == [3, 6, 7]
    assert templates.prompt_ids(read, {"prompt": "ab<|end|>"}, Template()) == [3, 6, 7, 5]


def test_options_reach_the_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ 'yes' if enable_thinking else 'no' }}")
    assert (
        text(tokenizer, templates.prompt_ids(tokenizer, chat_row("a"), Template(options={"enable_thinking": True})))
        == "yes"
    )
    assert (
        text(tokenizer, templates.prompt_ids(tokenizer, chat_row("a"), Template(options={"enable_thinking": False})))
        == "no"
    )


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


def test_the_same_tokenizer_passes_and_other_ends_are_told(folder, other):
    assert templates.shared_vocabulary(folder, [other]) == Shared(None, ())
    edit_json(other / "generation_config.json", eos_token_id=[5, 0])
    shared = templates.shared_vocabulary(folder, [folder, other])
    assert shared.size is None and len(shared.warnings) == 1
    assert "['<|end|>']" in shared.warnings[0] and "['<|pad|>', '<|end|>']" in shared.warnings[0]


def test_the_error_for_another_tokenizer_names_the_first_token(folder, other):
    swap_tokens(other, "a", "b")
    with pytest.raises(UserError, match=r"tokenizers differ, first at token 'a' \(id 6 and 7\)"):
        templates.shared_vocabulary(folder, [other])


def test_tokens_behind_the_common_ones(folder, other):
    """Whoever has them; one whose place another token takes in the other tokenizer is refused."""
    add_tokens(other, "[PAD]", "[X]")
    for student, teacher in ((folder, other), (other, folder)):
        shared = templates.shared_vocabulary(student, [teacher, student])
        assert shared.size == 52 and len(shared.warnings) == 1
        assert "share their first 52 tokens" in shared.warnings[0] and "'[PAD]'" in shared.warnings[0]
    edit_json(other / "generation_config.json", eos_token_id=53)
    edit_json(other / "config.json", eos_token_id=None)
    edit_json(other / "tokenizer_config.json", eos_token="[X]")
    assert "no answer can end" in templates.shared_vocabulary(other, [folder]).warnings[-1]


def test_two_tokenizers_with_other_tokens_in_one_place(folder, other, tmp_path_factory):
    third = shutil.copytree(other, tmp_path_factory.mktemp("third"), dirs_exist_ok=True)
    add_tokens(other, "[PAD]")
    add_tokens(third, "[MASK]")
    with pytest.raises(UserError, match=r"first at token '\[MASK\]' \(id None and 52\)"):
        templates.shared_vocabulary(other, [third])


def test_a_folder_without_a_tokenizer(other):
    (other / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        templates.load_tokenizer(other)
    (other / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        templates.load_tokenizer(other)


def byte_level(folder, *special):
    """Gives a folder the files of a byte-level tokenizer as GPT-2 and Qwen2 had them: no tokenizer.json."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(["the cat sat on the mat, the cat\n\n"] * 9, trainer)
    (folder / "tokenizer.json").unlink()
    model.model.save(str(folder))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


def test_vocab_json_with_merges_txt(other):
    expected = byte_level(other)
    read = templates.load_tokenizer(other)
    assert templates.prompt_ids(read, {"prompt": "the cat, too"}, Template()) == expected.encode("the cat, too").ids
    (other / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        templates.load_tokenizer(other)


def test_tokenizer_model_alone(other, monkeypatch):
    """With the package that reads it, what transformers makes of it; without, its name."""
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.model").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(templates, "_has_sentencepiece", lambda: False)
        with pytest.raises(UserError, match="pip install sentencepiece protobuf"):
            templates.load_tokenizer(other)
    sentencepiece = pytest.importorskip("sentencepiece")
    with (other / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat"] * 9), model_writer=file, vocab_size=280,
            model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    edit_json(other / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", eos_token="</s>", unk_token="<unk>",
              bos_token="<s>", pad_token=None, add_bos_token=True, add_eos_token=True)  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(other / "tokenizer.model"))
    expected = [processor.bos_id(), *processor.encode("the cat sat")]
    assert templates.prompt_ids(templates.load_tokenizer(other), {"prompt": "the cat sat"}, Template()) == expected
