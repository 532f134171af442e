"""What a required call is bound to: the model's format, the tools' schemas, after the thoughts."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from api.dialect import Bounds, Dialect
from api.errors import ApiError
from api.reasoning import Thoughts
from api.speech import CallArguments, CallStart, Words
from api.tool_calls import CallReader
from api.tool_formats import FORMATS
from backend.interface import Grammar
from tests.api.dialects import Walk, dialect

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "place": {"$ref": "#/$defs/place"},
        "loud": {"type": ["boolean", "null"]},
    },
    "required": ["city", "place"],
    "$defs": {"place": {"type": "array", "items": {"type": "number"}, "maxItems": 2}},
}
OPTIONAL = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, "x"]}}}
TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": WEATHER,
    "set": OPTIONAL,
    "now": {"type": "object", "properties": {}},
}

# format -> a call of `set` with a, two of `now`
WRITTEN = {
    "hermes": (
        '<tool_call>\n{"name": "set", "arguments": {"a": true}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    ),
    "qwen3_coder": (
        "<tool_call>\n<function=set>\n<parameter=a>\ntrue\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=now>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ),
    "llama3_json": (
        '{"name": "set", "parameters": {"a": true}}',
        '{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}',
    ),
    "mistral": ('[TOOL_CALLS]set[ARGS]{"a": true}', "[TOOL_CALLS]now[ARGS]{}" * 2),
    "pythonic": ("[set(a=true)]", "[now(), now()]"),
}
FORMAT_NAMES = sorted(FORMATS)


def walk(model: Dialect, bounds: Bounds, thoughts: Thoughts = "none") -> Walk:
    return Walk(model.grammar(bounds, thoughts), model.tokenizer)


def calls_of(format: str, text: str) -> list[tuple[str, Any]]:
    """The calls in a text that has nothing else."""
    reader = CallReader(FORMATS[format], TOOLS)
    names: list[str] = []
    arguments: list[str] = []
    for each in [*reader.feed(text), *reader.end()]:
        assert not isinstance(each, Words), each
        if isinstance(each, CallStart):
            names.append(each.name)
            arguments.append("")
        else:
            assert isinstance(each, CallArguments)
            arguments[each.index] += each.json
    return list(zip(names, map(json.loads, arguments), strict=True))


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_a_required_call_is_in_the_format_of_the_model_and_nothing_else(format: str) -> None:
    bound = walk(dialect(format=format), Bounds(TOOLS))
    one, two = WRITTEN[format]
    assert bound.allows(one)
    assert bound.allows(two)
    assert not bound.begins("Sure")
    assert not bound.allows("")
    assert not bound.begins(one.replace("true", "7"))


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_only_one_call_is_allowed_where_several_are_not(format: str) -> None:
    bound = walk(dialect(format=format), Bounds(TOOLS, several=False))
    one, two = WRITTEN[format]
    assert bound.allows(one)
    assert not bound.begins(two)


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("marks", ["tokens", "letters"])
def test_whatever_is_drawn_is_read_as_calls_that_match_their_schemas(
    format: str, marks: str
) -> None:
    model = dialect(format=format)
    if marks == "letters":
        model = dialect(format=format, plain=(), special=("<|im_end|>",))
    bound = walk(model, Bounds(TOOLS))
    for seed in range(4):
        calls = calls_of(format, bound.draw(seed))
        assert calls
        for name, arguments in calls:
            jsonschema.validate(arguments, TOOLS[name])


def test_an_object_is_closed_only_where_its_schema_names_all_of_its_properties() -> None:
    free = {"type": "object"}
    either = {"type": "object", "anyOf": [{"properties": {"a": {}}, "required": ["a"]}]}
    tools: dict[str, Any] = {
        "free": free,
        "either": either,
        "open": {**free, "additionalProperties": True},
    }
    bound = walk(dialect(format="llama3_json"), Bounds(tools))
    for name in tools:
        assert bound.allows(f'{{"name": "{name}", "parameters": {{"a": 1}}}}')
    closed = walk(dialect(format="llama3_json"), Bounds({"f": {**free, "properties": {"b": {}}}}))
    assert not closed.begins('{"name": "f", "parameters": {"a')


def test_marks_are_written_as_the_tokens_that_they_are() -> None:
    model = dialect(format="hermes")
    bound = walk(model, Bounds(TOOLS))
    first = [id for id in range(len(model.tokenizer.table)) if bound.takes(id)]
    assert [model.tokenizer.table[id] for id in first] == [b"<tool_call>"]


def test_mistral_lists_its_calls_where_it_has_no_token_for_arguments() -> None:
    model = dialect(format="mistral", special=("[TOOL_CALLS]", "<|im_end|>"))
    bound = walk(model, Bounds({"now": TOOLS["now"]}))
    assert bound.allows('[TOOL_CALLS][{"name": "now", "arguments": {}}]')


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("grammar", [Grammar("regex", "a/b|[0-9]+"), None])
def test_thoughts_are_free_and_what_follows_them_is_bound(
    special: bool, grammar: Grammar | None
) -> None:
    think = ("<think>", "</think>")
    marks = ((), (*think, "<|im_end|>")) if special else (think, ("<|im_end|>",))
    model = dialect(format="pythonic", plain=marks[0], special=marks[1])
    bounds = Bounds(grammar=grammar) if grammar else Bounds({"now": TOOLS["now"]})
    good, bad = ("a/b", "a/c") if grammar else ("[now()]", "[then()]")
    opened, possible = walk(model, bounds, "open"), walk(model, bounds, "possible")
    assert opened.allows(f"Hm, <1>\n</think>\n\n{good}")
    assert possible.allows(f"<think>\nHm, <1>\n</think>\n\n{good}")
    assert possible.allows(good)
    for bound in (opened, possible):
        assert not bound.allows(f"<think>Hm</think>{bad}")
        assert not bound.allows(f"Hm</think>{bad}")
        assert not bound.allows("<think>Hm")


def test_a_schema_is_bound_after_thoughts_as_it_is_without_them() -> None:
    schema = Grammar("json_schema", json.dumps({"type": "object", "properties": {"a": {}}}))
    model = dialect(format="hermes")
    assert model.grammar(Bounds(grammar=schema), "none") is schema
    bound = walk(model, Bounds(grammar=schema), "open")
    assert bound.allows('so</think>{"a":\n  [1]}')
    assert not bound.begins("so</think>x")


def test_an_answer_in_a_format_may_be_a_call_instead() -> None:
    bounds = Bounds({"now": TOOLS["now"]}, grammar=Grammar("regex", "[0-9]+"))
    bound = walk(dialect(format="hermes"), bounds)
    assert bound.allows("42")
    assert bound.allows('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    assert not bound.begins("no")


def test_calls_of_choice_may_be_bound_and_words_before_them_are_free() -> None:
    bound = walk(dialect(format="hermes"), Bounds(TOOLS, may_speak=True, several=False))
    one, two = WRITTEN["hermes"]
    assert bound.allows("Just <words>")
    assert bound.allows(f"Sure.\n{one}")
    assert bound.allows(one)
    assert not bound.begins(f"Sure.\n{two}")
    assert not bound.begins(one.replace("true", "7"))


@pytest.mark.parametrize(
    ("format", "schema", "named"),
    [
        ("hermes", {"type": "object", "properties": {"a": {"not": {}}}}, "`not`"),
        ("qwen3_coder", {"type": "object", "anyOf": [{}]}, "'anyOf'"),
        (
            "qwen3_coder",
            {"type": "object", "properties": {"a": {"type": "string", "pattern": "b"}}},
            "'pattern'",
        ),
        ("pythonic", {"type": "object", "properties": {"a-b": {}}}, "'a-b'"),
    ],
)
def test_a_schema_that_a_format_cannot_be_bound_to_is_refused_by_its_keyword(
    format: str, schema: dict[str, Any], named: str
) -> None:
    with pytest.raises(ApiError) as caught:
        dialect(format=format).grammar(Bounds({"f": schema}), "none")
    assert (caught.value.status, caught.value.param) == (400, "tools")
    assert named in caught.value.message


EBNF = r"""
start: "(" (start | WORD | /start\/"/)? ")" // start
WORD: "start" | /[a-c]+/
"""


def test_a_grammar_in_ebnf_is_bound_after_thoughts_as_it_is_without_them() -> None:
    bounds = Bounds(grammar=Grammar("lark", EBNF))
    model = dialect()
    assert model.grammar(bounds, "none") is bounds.grammar
    alone, after = walk(model, bounds), walk(model, bounds, "open")
    for text in ("()", "((start))", "(abc)", '(start/")'):
        assert alone.allows(text)
        assert after.allows(f"so</think>{text}")
    assert not after.begins("so</think>start")


def test_a_grammar_that_ignores_something_cannot_follow_thoughts_and_says_so() -> None:
    bounds = Bounds(grammar=Grammar("lark", 'start: "a"\n%ignore " "'))
    model = dialect()
    assert model.grammar(bounds, "none") is bounds.grammar
    with pytest.raises(ApiError, match="%ignore"):
        model.grammar(bounds, "open")


@pytest.mark.parametrize(
    ("prompt", "thoughts"),
    [
        ("<|im_start|>assistant\n", "possible"),
        ("<think>\n\n</think>\n\nHi<|im_end|>\nassistant\n", "possible"),
        ("assistant\n<think>\n", "open"),
        ("assistant\n<think>\n\n</think>\n\n", "none"),
    ],
)
def test_the_end_of_the_prompt_says_whether_thoughts_are_open(prompt: str, thoughts: str) -> None:
    model = dialect("{{ '<think></think>' }}")
    assert model.thoughts(model.tokenizer.encode(prompt, add_special_tokens=False)) == thoughts
    assert dialect("").thoughts(model.tokenizer.encode(prompt)) == "none"
