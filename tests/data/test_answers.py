"""Answers to learn: whole, as a continuation of the prompt's own tokens, up to the token that ends the turn."""

import shutil

import pytest
from rows import chat_row, edit_json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from camopd_jax.config.schema import Template
from camopd_jax.data import answers, templates
from camopd_jax.data.answers import Unlearnable
from camopd_jax.data.templates import Reader

TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# What the templates of DeepSeek-R1's distilled models do with answers, and that of Qwen3 (here without tools).
R1 = (
    "{% for m in messages %}{% set c = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content %}"
    "<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
QWEN3 = """{%- for m in messages %}{%- set c, r = m.content, '' %}
{%- if m.role == 'assistant' and '</think>' in c %}
{%- set r = c.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set c = c.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}{{- '<think>\\n' + r.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
{{- c + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def merging():
    """A byte-level tokenizer in which two line breaks are one token, and so are a space and the "a" behind it."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    merged = [("Ċ", "Ċ"), ("Ġ", "a")]
    vocab = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merged)]
    model = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merged))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(special)  # which all_special_ids has not: of them, only those that have a role
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|endoftext|>", bos_token="<s>")


@pytest.fixture
def learnt(merging, monkeypatch):
    """learnt(template, answer) -> the texts of prompt and answer; the prompt's tokens are those before generation."""

    def of(template, answer, **options):
        monkeypatch.setattr(merging, "chat_template", template)
        row, template = chat_row("say", answer), Template(options=options)
        prompt, response = answers.answer_ids(Reader(merging, 330), row, "", template)
        assert prompt == templates.prompt_ids(merging, row, template)
        return merging.decode(prompt), merging.decode(response)

    return of


ODD = ["answer", "\nsecond line", "The <s> token begins", " answer", "", "a <|im_end|> b", "why\n\n", "<think>\nwhy"]


@pytest.mark.parametrize("answer", ODD)
def test_any_answer_is_learnt_whole_with_the_end_of_its_turn(learnt, answer):
    """The tokenizer marks the end of a turn as special in tokenizer.json alone, and merges line breaks."""
    assert {"<s>", "<|im_end|>"} & set(learnt.__closure__[0].cell_contents.all_special_tokens) == {"<s>"}
    opened = "<|im_start|>user\nsay<|im_end|>\n<|im_start|>assistant\n"
    assert learnt(TURN + OPENS, answer) == (opened, f"{answer}<|im_end|>")


@pytest.mark.parametrize("answer", [one for one in ODD if one != ""])
def test_a_template_without_an_end_gets_eos(learnt, merging, answer):
    assert learnt(PLAIN, answer) == ("user: say\nassistant: ", f"{answer}<|endoftext|>")
    (warning,) = answers.end_warnings(templates.Path("."), merging, Template())
    assert "no special token after an answer; the tokenizer's eos_token '<|endoftext|>' ends" in warning


def test_without_an_end_and_without_eos(learnt, merging, monkeypatch):
    monkeypatch.setattr(merging, "_special_tokens_map", merging._special_tokens_map | {"eos_token": None})
    assert learnt(PLAIN, "why") == ("user: say\nassistant: ", "why\n")
    (warning,) = answers.end_warnings(templates.Path("."), merging, Template())
    assert "will not learn to stop" in warning
    with pytest.raises(Unlearnable, match="the answer is empty"):
        learnt(PLAIN.replace("\n", ""), "")


def test_reasoning_that_the_generation_prompt_opens_and_the_template_strips(learnt):
    opened = "<|im_start|>user\nsay<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert learnt(R1, "<think>\nwhy\n</think>\nbecause") == (opened, "why\n</think>\nbecause<|im_end|>")
    assert learnt(R1, "<think>\n\n</think>\n\nbecause") == (opened, "\n</think>\n\nbecause<|im_end|>")
    assert learnt(R1, "<think>why</think>because") == (opened, "why</think>because<|im_end|>")
    with pytest.raises(Unlearnable, match=r"opens every answer with '<think>\\n', and this one does not begin with it"):
        learnt(R1, "because")
    plain = R1.replace("<think>\n{% endif", "{% endif")
    assert learnt(plain, "<think>\nwhy</think>a") == (
        opened.removesuffix("<think>\n"),
        "<think>\nwhy</think>a<|im_end|>",
    )
    assert learnt(R1, "because", chat_template=plain)[1] == "because<|im_end|>", "a template of one's own"


def test_an_answer_is_learnt_with_its_tool_calls(merging, monkeypatch):
    """The template writes a line break between content and calls, and none where there is no content."""
    calls = "{% for c in m.tool_calls %}{{ '\n' if m.content }}<call>{{ c.name }}</call>{% endfor %}"
    turn = TURN.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}" + calls + "{% endif %}")
    monkeypatch.setattr(merging, "chat_template", turn + OPENS)
    for content, text in (("Wait.", "Wait.\n<call>weather</call><|im_end|>"), ("", "<call>weather</call><|im_end|>")):
        row = chat_row("say", content)
        row["messages"][1]["tool_calls"] = [{"name": "weather"}]
        assert merging.decode(answers.answer_ids(Reader(merging, 330), row, "", Template())[1]) == text


def test_reasoning_that_the_template_writes_itself(learnt):
    opened, nothing = "<|im_start|>user\nsay<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
    thought = "<think>\nwhy\n</think>\n\nbecause<|im_end|>"
    assert learnt(QWEN3, "<think>\nwhy\n</think>\nbecause") == (opened, thought)
    assert learnt(QWEN3, "because") == (opened, f"{nothing}because<|im_end|>")
    assert learnt(QWEN3, "because", enable_thinking=False) == (opened + nothing, "because<|im_end|>")
    with pytest.raises(Unlearnable, match="does not begin with its prompt"):
        learnt(QWEN3, "<think>\nwhy\n</think>\nbecause", enable_thinking=False)


def test_a_template_that_changes_the_prompt_or_leaves_the_answer_out(learnt):
    with pytest.raises(Unlearnable, match="does not begin with its prompt; give template options"):
        learnt(
            "{{ messages | length }}{% if add_generation_prompt %}x{% else %}{{ messages[-1].content }}{% endif %}", "b"
        )
    with pytest.raises(Unlearnable, match="does not write the answer"):
        learnt("{{ messages[0].content }}", "b")


def test_an_answer_whose_tokens_cannot_be_told_from_the_prompts(monkeypatch):
    """A sentencepiece tokenizer sets a space before every text, so that an answer apart would begin with another."""
    vocab = ["<unk>", *"▁qa:", "▁a"]
    model = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, [("▁", "a")], unk_token="<unk>"))
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(split=False), decoders.Metaspace()
    template = "q: {% if not add_generation_prompt %}{{ messages[1].content }}{% endif %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, chat_template=template)
    with pytest.raises(Unlearnable, match="first token cannot be separated from the prompt"):
        answers.answer_ids(Reader(tokenizer, 6), chat_row("q", "a"), "", Template())


def test_the_answer_field_of_a_row_without_an_assistant_turn(tokenizer):
    reader = Reader(tokenizer, 52)
    prompt, answer = answers.answer_ids(reader, chat_row("a"), "b c", Template())
    assert tokenizer.decode(prompt) == "<|user|>a<|end|><|assistant|>" and tokenizer.decode(answer) == "b c<|end|>"
    assert answers.answer_ids(reader, chat_row("a", "b c"), "", Template()) == (prompt, answer)


def test_what_closes_a_turn_is_its_last_special_token(merging, folder, tmp_path, monkeypatch):
    """Not the line break that Gemma 3 and Phi-4 write behind it; what generation does not stop at is told."""
    monkeypatch.setattr(merging, "chat_template", TURN)
    assert merging.convert_ids_to_tokens(answers.end_of_turn(merging, Template())) == "<|im_end|>"
    monkeypatch.setattr(merging, "chat_template", PLAIN)
    assert answers.end_of_turn(merging, Template()) is None
    for line_break in ("\n", ""):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>" + line_break + "{% endfor %}"
        edit_json(tmp_path / "tokenizer_config.json", chat_template=template)
        assert answers.eos_warning(tmp_path, templates.load_tokenizer(tmp_path), Template()) is None
        for name in ("config.json", "generation_config.json"):
            edit_json(tmp_path / name, eos_token_id=0)
        edit_json(tmp_path / "tokenizer_config.json", eos_token="<|pad|>")
        tokenizer = templates.load_tokenizer(tmp_path)
        told = answers.eos_warning(tmp_path, tokenizer, Template())
        assert "ends answers with '<|end|>', but generation stops only at ['<|pad|>']" in told
        assert answers.end_warnings(tmp_path, tokenizer, Template()) == [told]
