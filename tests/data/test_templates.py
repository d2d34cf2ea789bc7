"""Prompts rendered by the chat template, and checks of the tokenizers of student and teacher."""

import json
import logging
import shutil
import warnings
from datetime import datetime

import pytest
from etils import epath
from rows import add_tokens, chat_row, edit_json, swap_tokens
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from camopd_jax.config.schema import SftConfig, Stream, Template
from camopd_jax.data import dates, templates
from camopd_jax.data.templates import Reader, Shared
from camopd_jax.errors import UserError
from camopd_jax.runs.workdir import claim_workdir, fix_date


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


def test_rows_of_every_form_are_tokenised_at_once(tokenizer):
    """In their order, each as transformers tokenises it alone; an error names its own row."""
    reader = Reader(tokenizer, len(tokenizer))
    rows = [{"prompt": "ab"}, chat_row("reverse abc"), {"prompt_ids": [3, 4]}, chat_row("a", "b", "c"), {"prompt": "c"}]
    located = [(row, f"x.jsonl:{i + 1}") for i, row in enumerate(rows)]

    def expected(row):
        if "messages" in row:
            text = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokenizer(row["prompt"])["input_ids"] if "prompt" in row else row["prompt_ids"]

    assert reader.prompts(located, Template()) == [expected(row) for row in rows]
    assert reader.prompts([], Template()) == []
    located[2] = ({"prompt_ids": [len(tokenizer)]}, "x.jsonl:3")
    with pytest.raises(UserError, match=r"^x\.jsonl:3: token "):
        reader.prompts(located, Template())


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


def test_conversations_of_which_a_prompt_would_lack_a_part(tokenizer, monkeypatch):
    reader, template = Reader(tokenizer, 52), Template()
    with pytest.raises(UserError, match="x: the conversation has only turns of the assistant"):
        reader.prompt({"messages": [{"role": "assistant", "content": "b"}] * 2}, template, "x")
    row = chat_row("a", "", "c")
    row["messages"][1]["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    with pytest.raises(UserError, match='x: the chat template of .*generalist does not write "tool_calls"'):
        reader.prompt(row, template, "x")
    calls = "{% for m in messages if m.tool_calls %}[{{ m.tool_calls[0].function.name }}]{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", calls + tokenizer.chat_template)
    assert reader.prompt(row, template, "x")[:3] == templates.tokens(tokenizer, "[f]")[:3]


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


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        ("{", "generation_config.json: not readable as JSON"),
        ("[]", "generation_config.json: must hold a JSON object"),
        ('{"eos_token_id": "<|end|>"}', "field eos_token_id is '<|end|>'; give an integer or a list of them or null"),
        ('{"eos_token_id": [5, null]}', "field eos_token_id is [5, None]; give an integer"),
        ('{"eos_token_id": [[5]]}', "field eos_token_id is [[5]]; give an integer"),
        ('{"eos_token_id": false}', "field eos_token_id is False; give an integer"),
        ('{"eos_token_id": [-1, 7]}', (5, 7)),
        ('{"eos_token_id": null}', (5,)),
    ],
)
def test_eos_ids_of_odd_files(other, tokenizer, contents, says):
    (other / "generation_config.json").write_text(contents)
    if isinstance(says, tuple):
        assert templates.eos_ids(other, tokenizer) == says
        return
    with pytest.raises(UserError) as caught:
        templates.eos_ids(other, tokenizer)
    assert says in str(caught.value) and str(other) in str(caught.value)


def test_an_id_without_a_token_is_shown_as_a_number(folder, other):
    edit_json(other / "generation_config.json", eos_token_id=[5, 151645])
    assert "['<|end|>', 151645]" in templates.shared_vocabulary(folder, [other]).warnings[0]


def test_the_date_of_a_template_is_that_of_the_run(tokenizer, monkeypatch, tmp_path):
    written = "{% set day = strftime_now('%d %b') %}{{ day }} {{ strftime_now( \"%Y\" ) }}"
    monkeypatch.setattr(tokenizer, "chat_template", "{% if strftime_now is defined %}" + written + "{% endif %}")
    try:
        dates.fix(datetime(2024, 7, 26))
        claim_workdir(epath.Path(tmp_path), SftConfig(model="m", data=Stream("s")))
        dates.fix(None)
        render = lambda: templates.render(tokenizer, chat_row("hi"), Template(), open_answer=True)  # noqa: E731
        assert render() == datetime.now().strftime("%d %b %Y")
        fix_date(epath.Path(tmp_path))  # as a run does that is resumed
        assert render() == "26 Jul 2024"
        claim_workdir(epath.Path(tmp_path), SftConfig(model="m", data=Stream("s")))
        fix_date(epath.Path(tmp_path))
        assert render() == "26 Jul 2024"
        fix_date(epath.Path(tmp_path / "new"))
        assert render() == datetime.now().strftime("%d %b %Y")
    finally:
        dates.fix(None)


def test_the_template_of_a_processor(folder, other):
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    edit_json(other / "tokenizer_config.json", chat_template=None)
    assert templates.load_tokenizer(other).chat_template is None
    (other / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert templates.load_tokenizer(other).chat_template == template


def test_a_class_that_reads_otherwise_than_tokenizer_json(folder, other):
    assert templates.class_warning(folder, templates.load_tokenizer(folder)) is None
    loaded = templates.load_tokenizer(folder)
    loaded.__class__ = type("OtherTokenizer", (type(loaded),), {"tokenize": lambda self, text: list(text)})
    warning = templates.class_warning(other, loaded)
    assert "OtherTokenizer (tokenizer_class in tokenizer_config.json) reads 'Hello world' as ['H', 'e', 'l'," in warning
    assert "tokenizer.json itself as ['<|unk|>', 'e', 'l', 'l', 'o', ' ', 'w'" in warning
    loaded.__class__ = type("SameTokenizer", (type(templates.load_tokenizer(folder)),), {})
    assert templates.class_warning(other, loaded) is None


@pytest.mark.parametrize(
    ("file", "contents", "says"),
    [
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "tokenizer.json is a pointer of Git LFS"),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["a.B", None]}, "tokenizer_class": "B"},
            "tokenizer_config.json: auto_map asks for code from the checkpoint",
        ),
        ("config.json", {"pad_token_id": "<|pad|>"}, "config.json cannot be read by transformers .*pad_token_id"),
    ],
)
def test_the_file_that_stops_a_tokenizer_is_named(other, file, contents, says):
    if isinstance(contents, dict):
        edit_json(other / file, **contents)
    else:
        (other / file).write_text(contents)
    with pytest.raises(UserError, match=says):
        templates.load_tokenizer(other)


def test_a_prompt_that_begins_with_bos_already(other):
    edit_json(other / "tokenizer_config.json", bos_token="<|system|>")
    file = other / "tokenizer.json"
    bos = {"SpecialToken": {"id": "<|system|>", "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    special = {"<|system|>": {"id": "<|system|>", "ids": [2], "tokens": ["<|system|>"]}}
    processor = {"type": "TemplateProcessing", "single": [bos, texts[0]], "pair": texts, "special_tokens": special}
    edit_json(file, post_processor=processor)
    loaded = templates.load_tokenizer(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert templates.text_ids(loaded, "ab") == [2, 6, 7]
    with pytest.warns(UserWarning, match=r"the tokenizer adds '<.system.>' to prompts that begin with it already"):
        assert templates.text_ids(loaded, "<|system|>ab") == [2, 2, 6, 7]


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
