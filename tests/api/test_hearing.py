"""How answers are heard: plainly where nothing is asked, else by the dialect of the model."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from api.answers import Piece
from api.chat import router
from api.dialect import Dialect
from api.errors import ApiError
from api.hearing import Hearing, Named, Tool, Wish, listen
from api.speech import CallStart, Words
from backend.interface import Finish, Grammar
from config import DialectSettings
from tests.api.dialects import Walk, dialect, tokenizer
from tests.api.in_process import post

F = Tool("f", None, {"type": "object", "properties": {"a": {"type": "integer"}}})
STRICT = Tool("g", None, {"type": "object", "properties": {}}, strict=True)
THINKS = "{{ '<think></think>' }}"


def heard(model: Dialect, wish: Wish, prompt: str = "assistant\n") -> Hearing:
    service: Any = SimpleNamespace(model=SimpleNamespace(dialect=model))
    ids = model.tokenizer.encode(prompt, add_special_tokens=False)
    return asyncio.run(listen(service, ids, wish))


@pytest.mark.parametrize(
    "wish",
    [Wish(), Wish(grammar=Grammar("regex", "a")), Wish([F], choice="none")],
)
def test_an_answer_without_tools_and_thoughts_is_plain(wish: Wish) -> None:
    assert heard(dialect(), wish) == Hearing(grammar=wish.grammar)


def test_a_model_that_does_not_think_now_is_plain() -> None:
    assert heard(dialect(THINKS), Wish(), "<think>\n\n</think>\n\n").plain
    assert not heard(dialect(THINKS), Wish()).plain


def test_thoughts_that_stay_in_the_text_are_counted_and_their_marks_are_seen() -> None:
    settings = DialectSettings(reasoning_parser="think")
    model = Dialect.of(tokenizer("", (), ("<think>", "</think>", "<|im_end|>")), settings)
    hearing = heard(model, Wish(separate_reasoning=False))
    assert not hearing.skip_special_tokens
    ear = hearing.open_ear()
    ids = model.tokenizer.encode("<think>Hm</think>So", add_special_tokens=False)
    said = ear.hear(Piece("<think>Hm</think>So", ids, Finish("stop")))
    assert "".join(each.text for each in said if isinstance(each, Words)) == "<think>Hm</think>So"
    assert ear.reasoning_tokens == 4


def test_calls_of_choice_are_read_and_not_bound() -> None:
    hearing = heard(dialect(), Wish([F]))
    assert not hearing.plain
    assert hearing.grammar is None


@pytest.mark.parametrize("wish", [Wish([F, STRICT]), Wish([F], parallel=False)])
def test_calls_of_choice_are_bound_where_they_must_be_strict_or_one(wish: Wish) -> None:
    model = dialect()
    bound = Walk(heard(model, wish).grammar, model.tokenizer)
    one = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert bound.allows("words")
    assert bound.allows(f"so: {one}")
    assert not bound.begins('so: <tool_call>\n{"name": "f", "arguments": {"b"')
    assert bound.begins(f"{one}\n{one}") == wish.parallel


def test_calls_without_a_mark_are_never_bound_where_words_are_allowed() -> None:
    assert heard(dialect(format="llama3_json"), Wish([STRICT])).grammar is None


def test_the_named_tool_is_called_once_and_no_other() -> None:
    model = dialect()
    bound = Walk(heard(model, Wish([F, STRICT], choice=Named("g"))).grammar, model.tokenizer)
    call = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    assert bound.allows(call)
    assert not bound.begins(f"{call}\n")
    assert not bound.begins('<tool_call>\n{"name": "f')


def test_marks_that_are_special_tokens_are_seen() -> None:
    mistral = heard(dialect(format="mistral"), Wish([F]))
    assert not mistral.skip_special_tokens
    assert heard(dialect(format="hermes"), Wish([F])).skip_special_tokens


def test_a_call_that_cannot_be_read_cannot_be_required() -> None:
    with pytest.raises(ApiError) as caught:
        heard(dialect(format="none"), Wish([F], choice="required"))
    assert caught.value.param == "tool_choice"
    assert heard(dialect(format="none"), Wish([F])).plain


def test_an_ear_counts_calls_and_tokens_of_thoughts() -> None:
    model = dialect(THINKS)
    ear = heard(model, Wish([F])).open_ear()
    text = 'Hm</think>So <tool_call>{"name": "f"}</tool_call>'
    ids = model.tokenizer.encode("<think>" + text, add_special_tokens=False)
    said = ear.hear(Piece("<think>", ids[:1], None)) + ear.hear(Piece(text, ids[1:], None))
    said += ear.hear(Piece("", (), Finish("stop")))
    assert said[0] == Words("Hm", thought=True)
    assert said[1] == Words("So")
    assert isinstance(said[2], CallStart)
    assert (ear.calls, ear.reasoning_tokens) == (1, 4)


def test_a_required_call_comes_through_the_chat_whole_and_matches_its_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    body = {
        "messages": [{"role": "user", "content": "Go."}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "max_tokens": 200,
    }
    (choice,) = post(router, "/v1/chat/completions", body).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert call["function"]["name"] == "f"
    jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
