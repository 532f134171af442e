"""Calls in every format: what a text says does not depend on where it was cut; nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings, strategies as st

from api.speech import CallArguments, CallStart, Saying, Words
from api.tool_calls import CallReader
from api.tool_formats import FORMATS, format_of

TOOLS = {
    "f": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "detail": {"type": ["string", "null"]},
            "where": {"type": "object"},
        },
    },
    "now": {"type": "object", "properties": {}},
}


@dataclass(frozen=True)
class Read:
    """What an answer says, as one: its words, and its calls with their arguments' text."""

    words: str
    calls: tuple[tuple[str, str], ...]

    @property
    def arguments(self) -> list[tuple[str, object]]:
        return [(name, json.loads(text)) for name, text in self.calls]


def fold(sayings: Sequence[Saying]) -> Read:
    words = ""
    calls: list[list[str]] = []
    for each in sayings:
        if isinstance(each, Words):
            assert each.text
            words += each.text
        elif isinstance(each, CallStart):
            assert each.index == len(calls)
            calls.append([each.name, ""])
        else:
            assert each.index == len(calls) - 1, "arguments follow their call's start"
            calls[-1][1] += each.json
    return Read(words, tuple((name, text) for name, text in calls))


def read(format: str, pieces: Sequence[str]) -> Read:
    reader = CallReader(FORMATS[format], TOOLS)
    return fold([said for piece in pieces for said in reader.feed(piece)] + [*reader.end()])


CITY = {"city": 'Paris \u2603 "x"\n</tool_call>', "days": 3, "where": {"a": [1, {"b": None}]}}
JSON_CITY = json.dumps(CITY)

# format, text, words, calls
GOOD: list[tuple[str, str, str, list[tuple[str, object]]]] = [
    (
        "hermes",
        f'Sure.\n<tool_call>\n{{"name": "get_weather", "arguments": {JSON_CITY}}}\n</tool_call>\n'
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>\n',
        "Sure.",
        [("get_weather", CITY), ("f", {"a": 1})],
    ),
    ("hermes", '<tool_call>{"name": "now"}</tool_call> Done.', "Done.", [("now", {})]),
    (
        "hermes",
        '<tool_call>{"id": [1], "name": "f", "arguments": "{\\"a\\": 2}"}</tool_call>',
        "",
        [("f", {"a": 2})],
    ),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [("now", {})]),
    (
        "qwen3_coder",
        "Well <b>\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nNew\n\nYork <3\n"
        "</parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=detail>\n5\n</parameter>\n"
        '<parameter=where>\n{"a": 1}\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n'
        "<function=now>\n</function>\n</tool_call>",
        "Well <b>",
        [
            (
                "get_weather",
                {"city": "New\n\nYork <3", "days": 3, "detail": "5", "where": {"a": 1}},
            ),
            ("now", {}),
        ],
    ),
    (
        "qwen3_coder",
        "<function=f><parameter=a>many</parameter><parameter=c>null</parameter></function>",
        "",
        [("f", {"a": "many", "c": None})],
    ),
    (
        "llama3_json",
        f' {{"name": "get_weather", "parameters": {JSON_CITY}}}; {{"type": "function", "name": "f",'
        ' "parameters": {}}',
        "",
        [("get_weather", CITY), ("f", {})],
    ),
    (
        "llama3_json",
        'I call <|python_tag|>{"name": "f", "parameters": {"b": "x;y"}}',
        "I call",
        [("f", {"b": "x;y"})],
    ),
    (
        "mistral",
        f'Hm. [TOOL_CALLS] [{{"name": "get_weather", "arguments": {JSON_CITY}}}, '
        '{"name": "f", "arguments": {"b": "]"}, "id": "123456789"}]',
        "Hm.",
        [("get_weather", CITY), ("f", {"b": "]"})],
    ),
    (
        "mistral",
        f"[TOOL_CALLS]get_weather[ARGS]{JSON_CITY}[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]"
        '{"a": 1}[TOOL_CALLS]now{}',
        "",
        [("get_weather", CITY), ("f", {"a": 1}), ("now", {})],
    ),
    (
        "pythonic",
        "[get_weather(city='it\\'s, \"(x)\"', days=-3, where={'a': [True, None, 1.5]}), f(a = 1), "
        'now(), f(b="\\u00e9\\n", a=true)]',
        "",
        [
            (
                "get_weather",
                {"city": 'it\'s, "(x)"', "days": -3, "where": {"a": [True, None, 1.5]}},
            ),
            ("f", {"a": 1}),
            ("now", {}),
            ("f", {"b": "\u00e9\n", "a": True}),
        ],
    ),
    ("pythonic", "<|python_start|>[now()]<|python_end|> ok", "ok", [("now", {})]),
]

# no calls: the text is given back as it is
BAD: list[tuple[str, str]] = [
    ("hermes", "Just <tool_ words, and <tool_call"),
    ("hermes", "a <tool_call> is no call </tool_call> b\n "),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": 3}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "nam'),
    ("hermes", '<tool_call>{"arguments": [1], "name": "f"}</tool_call>'),
    ("qwen3_coder", "<tool_call>\n{}\n</tool_call>"),
    ("qwen3_coder", "x <function=unknown>\n</function>"),
    ("llama3_json", '{"name": "Bob", "age": 3}'),
    ("llama3_json", 'Look: {"name": "f", "parameters": {}}'),
    ("llama3_json", "<|python_tag|>print(1)"),
    ("mistral", "[TOOL_CALLS] none"),
    ("mistral", "[TOOL_CALLS]f(1)"),
    ("pythonic", "[1, 2, 3]"),
    ("pythonic", "[unknown(a=1)]"),
    ("pythonic", "Use [now()]"),
]

# what could not be a call any more once it had begun: the rest is given back
BROKEN: list[tuple[str, str, str, tuple[tuple[str, str], ...]]] = [
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call>',
        "}}</tool_call>",
        (("f", '{"a": oops'),),
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"b": "x', "", (("f", '{"b": "x'),)),
    (
        "hermes",
        '<tool_call>{"name": "now", "arguments": {}} and <tool_call>{"name": "f"}</tool_call>',
        "and",
        (("now", "{}"), ("f", "{}")),
    ),
    ("hermes", '<tool_call>{"name": "now"}\n</tool_c', "", (("now", "{}"),)),
    (
        "hermes",
        '<tool_call><tool_call>{"name": "now"}</tool_call>',
        "<tool_call>",
        (("now", "{}"),),
    ),
    (
        "qwen3_coder",
        "<function=f><parameter=a>1</parameter><parameter=b>wor",
        "<parameter=b>wor",
        (("f", '{"a": 1'),),
    ),
    ("llama3_json", '{"name": "now"}; then', "; then", (("now", "{}"),)),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "now"}, {"name": "no"}]',
        ', {"name": "no"}]',
        (("now", "{}"),),
    ),
    ("pythonic", "[f(a=1, b=b)]", " b=b)]", (("f", '{"a": 1'),)),
]

EVERY = [
    *((format, text) for format, text, _, _ in GOOD),
    *BAD,
    *((format, text) for format, text, _, _ in BROKEN),
]


@pytest.mark.parametrize(("format", "text", "words", "calls"), GOOD)
def test_calls_are_read_with_their_arguments_as_objects(
    format: str, text: str, words: str, calls: list[tuple[str, object]]
) -> None:
    found = read(format, [text])
    assert (found.words, found.arguments) == (words, calls)


@pytest.mark.parametrize(("format", "text"), BAD)
def test_what_is_no_call_is_given_back_as_words(format: str, text: str) -> None:
    assert read(format, [text]) == Read(text, ())


@pytest.mark.parametrize(("format", "text", "words", "calls"), BROKEN)
def test_what_follows_a_call_that_breaks_off_is_given_back_as_words(
    format: str, text: str, words: str, calls: tuple[tuple[str, str], ...]
) -> None:
    assert read(format, [text]) == Read(words, calls)


@pytest.mark.parametrize(("format", "text"), EVERY)
def test_a_text_says_the_same_wherever_it_is_cut_once_or_at_every_letter(
    format: str, text: str
) -> None:
    whole = read(format, [text])
    for place in range(len(text) + 1):
        assert read(format, [text[:place], text[place:]]) == whole
    assert read(format, list(text)) == whole


MARKS = [
    *(mark for format in FORMATS.values() for mark in format.marks),
    *('{"name": "', '"f"', '"arguments": ', '"parameters": ', "</tool_call>", "</function>"),
    *("<parameter=", "a>", "f(", "a=", "[", "]", "{", "}", "(", ")", '"', "'", "\\", ",", ";"),
    *("1", "null", "f", "now", "\n", " ", ":", "é", "[ARGS]", "<", "tool"),
]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_text_says_the_same_however_it_is_cut(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(sorted(FORMATS)))
    good = [text for name, text, _, _ in GOOD if name == format]
    parts = data.draw(st.lists(st.sampled_from([*MARKS, *good]), max_size=12))
    text = "".join(parts)
    if data.draw(st.booleans()):
        text = text[: data.draw(st.integers(0, len(text)))]
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = read(format, pieces)
    assert found == read(format, [text])
    if not found.calls:
        assert found.words == text


def test_a_call_is_told_as_soon_as_its_name_is_there_and_its_arguments_as_they_come() -> None:
    reader = CallReader(FORMATS["hermes"], TOOLS)
    said = reader.feed('<tool_call>{"name": "f"')
    assert isinstance(said[0], CallStart)
    assert (said[0].name, said[0].id[:5]) == ("f", "call_")
    assert reader.feed(', "arguments": {"b"') == [CallArguments(0, '{"b"')]
    assert reader.feed(': "lo') == [CallArguments(0, ': "lo')]


def test_words_are_not_held_back_longer_than_they_could_be_a_mark() -> None:
    reader = CallReader(FORMATS["hermes"], TOOLS)
    assert reader.feed("one <to") == [Words("one")]
    assert reader.feed("ol") == []
    assert reader.feed("s>") == [Words(" <tools>")]


def test_ids_of_mistral_have_the_form_that_its_templates_want() -> None:
    reader = CallReader(FORMATS["mistral"], TOOLS)
    (start, *_) = reader.feed('[TOOL_CALLS][{"name": "f"')
    assert isinstance(start, CallStart)
    assert len(start.id) == 9
    assert start.id.isalnum()


@pytest.mark.parametrize(
    ("template", "format"),
    [
        ("{{ '<tool_call>\\n<function=' + name }}", "qwen3_coder"),
        ("{{ '<tool_call>' + call | tojson }}", "hermes"),
        ("{{ '[TOOL_CALLS]' + calls }}", "mistral"),
        ("{{ '<|python_tag|>' + call }}", "llama3_json"),
        ('Respond in the format {"name": name, "parameters": dictionary of ...}', "llama3_json"),
        ("[func_name1(params_name1=params_value1...)]", "pythonic"),
        ("{{ message.content }}", "hermes"),
    ],
)
def test_a_template_tells_the_format(template: str, format: str) -> None:
    assert format_of(template) == format
