from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Inner, decoders, models, pre_tokenizers

from backend.chat_template import ChatTemplate
from backend.interface import ModelBroken, RequestRefused
from backend.tokenizer import HfTokenizer

Conversation = list[dict[str, Any]]

CONVERSATIONS: list[Conversation] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": 'Answer in 中文, <b>short</b> & "quoted" 🙂'},
        {"role": "user", "content": "  naïve\n\n"},
        {"role": "assistant", "content": "是", "reasoning": "because"},
        {"role": "user", "content": "why?"},
    ],
    [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "look it up",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Zürich"}}}],
        },
        {"role": "tool", "content": "21 °C"},
    ],
    [{"role": "user"}],
    [],
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "It's the <weather> & more, für \u00fcberall",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CHATML = """\
{{ bos_token }}{% for message in messages %}
    {% if message['content'] is defined %}
{{ '<|' + message.role + '|>\\n' + message['content'] + eos_token + '\\n' }}
    {% endif %}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
WITH_TOOLS = """\
{%- set ns = namespace(last=0, seen=false) %}
{%- if tools %}{{ tools | tojson }} {{ tools[0] | tojson(indent=2) }}{% endif %}
{%- for message in messages %}
  {%- if loop.index0 > 2 %}{% break %}{% endif %}
  {%- if message.role == 'system' %}{% continue %}{% endif %}
  {%- set ns.last = loop.index0 %}
  {%- generation %}{{ message.content | default('') | trim }}{% endgeneration %}
  {%- if message.reasoning_content %}<think>{{ message.thinking }}</think>{% endif %}
  {%- for call in message.tool_calls | default([]) %}
    {{- call.function.name }}({{ call.function.arguments | tojson }})
  {%- endfor %}
{% endfor %}
{{ ns.last }} {{ strftime_now('%d %b %Y') }} {{ dict(a=1) }} {{ pad_token }}|{{ image_token }}"""
STRICT = """\
{%- for message in messages %}
{%- if message.role != 'user' %}{{ raise_exception('only users speak here') }}{% endif %}
{{- message.content + '\\n' }}
{%- endfor %}"""


def folder_with(path: Path, config: dict[str, Any]) -> Path:
    inner = Inner(models.BPE(vocab={"<s>": 0, "</s>": 1, "<img>": 2}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel()
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>", "<img>"])
    inner.save(str(path / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<img>", "pad_token": None}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | named | config
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def assert_renders_as_transformers_does(folder: Path) -> None:
    """The same text, or an error from both; not an error each time."""
    from transformers import AutoTokenizer

    ours = HfTokenizer.load(folder)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    rendered = 0
    for messages, tools, prompt in product(CONVERSATIONS, (None, [], TOOLS), (True, False)):
        try:
            wanted = theirs.apply_chat_template(
                messages, tools=tools, add_generation_prompt=prompt, tokenize=False, pad_token="P"
            )
        except Exception:
            with pytest.raises(RequestRefused) as caught:
                ours.render(messages, tools=tools, add_generation_prompt=prompt, pad_token="P")
            assert caught.value.param == "messages"
        else:
            assert wanted == ours.render(
                messages, tools=tools, add_generation_prompt=prompt, pad_token="P"
            )
            rendered += 1
    assert rendered


@pytest.mark.parametrize("template", [CHATML, WITH_TOOLS, STRICT])
def test_a_template_renders_as_in_transformers(template: str, tmp_path: Path) -> None:
    assert_renders_as_transformers_does(folder_with(tmp_path, {"chat_template": template}))


def test_the_small_models_template_renders_as_in_transformers(small_model: Path) -> None:
    assert_renders_as_transformers_does(small_model)


def test_of_named_templates_tool_use_serves_tools_and_default_the_rest(tmp_path: Path) -> None:
    named = {"default": CHATML, "tool_use": WITH_TOOLS}
    listed = [{"name": name, "template": template} for name, template in named.items()]
    assert_renders_as_transformers_does(folder_with(tmp_path, {"chat_template": listed}))


def test_template_files_come_before_the_configuration(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"chat_template": STRICT})
    (folder / "chat_template.jinja").write_text(CHATML)
    assert_renders_as_transformers_does(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(WITH_TOOLS)
    assert_renders_as_transformers_does(folder)


def test_templates_without_a_default_are_listed_in_the_refusal(tmp_path: Path) -> None:
    listed = [{"name": "rag", "template": CHATML}, {"name": "tool_use", "template": WITH_TOOLS}]
    folder = folder_with(tmp_path, {"chat_template": listed})
    assert_renders_as_transformers_does(folder)
    with pytest.raises(RequestRefused, match="rag, tool_use"):
        HfTokenizer.load(folder).render(CONVERSATIONS[0])


def test_without_a_template_messages_are_refused(tmp_path: Path) -> None:
    ours = HfTokenizer.load(folder_with(tmp_path, {}))
    assert not ours.has_chat_template
    with pytest.raises(RequestRefused, match="no chat template"):
        ours.render(CONVERSATIONS[0])


def test_a_template_says_what_is_wrong_with_the_messages() -> None:
    template = ChatTemplate({"default": STRICT}, {})
    with pytest.raises(RequestRefused, match="only users speak here"):
        template.render([{"role": "system", "content": "x"}], None, True, {})


def test_a_template_that_does_not_parse_is_named_with_its_line() -> None:
    with pytest.raises(ModelBroken, match="'tool_use' does not parse: line 2"):
        ChatTemplate({"tool_use": "fine\n{% if %}"}, {})


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% set ns = namespace() %}{% set ns.__class__ = '' %}",
        "{{ namespace(__class__='') }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_template_stays_in_its_sandbox(template: str) -> None:
    with pytest.raises(RequestRefused):
        ChatTemplate({"default": template}, {}).render(CONVERSATIONS[0], None, True, {})


def test_rendering_leaves_the_callers_messages_as_they_were() -> None:
    messages = [{"role": "user", "content": "x", "name": None, "reasoning": "y"}]
    ChatTemplate({"default": CHATML}, {"eos_token": ""}).render(messages, None, True, {})
    assert messages == [{"role": "user", "content": "x", "name": None, "reasoning": "y"}]
