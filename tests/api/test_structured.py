"""Fields that bind the form of an answer, on every route that has them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest

from api import chat, completions, generate
from api.errors import ApiError, api_error
from api.structured import GrammarFields, OpenAIGrammarFields, check_grammar
from tests.api.in_process import Server, refusal, serve

Body = dict[str, Any]

SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}, "count": {"type": "integer", "maximum": 9,
                                                                   "minimum": 0}},
    "required": ["size", "count"],
    "additionalProperties": False,
}  # fmt: skip
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<f=x>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<f"],
}
CHOICES = ["left", "right"]
EBNF = 'root ::= "le" "ft" | "right"'

# what is given, and what the answer then is: a schema, or a pattern
OURS: list[tuple[Body, Any]] = [
    ({"json_schema": SCHEMA}, SCHEMA),
    ({"json_schema": json.dumps(SCHEMA)}, SCHEMA),
    ({"regex": "[0-9]{3}-x"}, "[0-9]{3}-x"),
    ({"ebnf": EBNF}, "left|right"),
    ({"ebnf": 'start: "left" | "right"'}, "left|right"),
]
THEIRS: list[tuple[Body, Any]] = [
    *OURS,
    ({"response_format": {"type": "json_schema", "json_schema": {
        "name": "it", "strict": True, "schema": SCHEMA}}}, SCHEMA),
    *(({"structured_outputs": {kind: value}}, result) for kind, value, result in (
        ("json", SCHEMA, SCHEMA), ("regex", "ab+c", "ab+c"), ("choice", CHOICES, "left|right"),
        ("grammar", EBNF, "left|right"))),
    ({"structured_outputs": {"choice": CHOICES, "disable_fallback": True, "regex": None}},
     "left|right"),
    ({"guided_json": SCHEMA}, SCHEMA),
    ({"guided_regex": "ab?c"}, "ab?c"),
    ({"guided_choice": CHOICES}, "left|right"),
    ({"guided_grammar": EBNF}, "left|right"),
]  # fmt: skip


def matches(text: str, result: Any) -> None:
    if isinstance(result, str):
        assert re.fullmatch(result, text), text
    else:
        jsonschema.validate(json.loads(text), result)


async def sent(server: Server, path: str, body: Body) -> Any:
    response = await server.client.post(path, json=body)
    assert response.status_code == 200, (body, response.text)
    return response.json()


def asked(*bodies: tuple[str, Body]) -> list[Any]:
    """The answers of one server to all `bodies`."""

    async def exchange() -> list[Any]:
        async with serve(generate.router, completions.router, chat.router) as server:
            return [await sent(server, path, body) for path, body in bodies]

    return asyncio.run(exchange())


def test_our_own_form_and_sglangs_bind_the_answer() -> None:
    ours: Body = {"prompt": "It is", "stream": False, "max_new_tokens": 90}
    native = [
        {"text": "It is", "sampling_params": {"temperature": 0, "max_new_tokens": 90, **given}}
        for given, _ in OURS
    ]
    answers = asked(
        *(("/generate", ours | given) for given, _ in OURS),
        *(("/generate", each) for each in native),
    )
    for answer, (_, result) in zip(answers, OURS * 2, strict=True):
        matches(answer["text"], result)
    assert {answer["finish_reason"] for answer in answers[: len(OURS)]} == {"stop"}
    assert {answer["meta_info"]["finish_reason"]["type"] for answer in answers[len(OURS) :]} == {
        "stop"
    }


def test_both_of_openais_routes_bind_the_answer() -> None:
    completion: Body = {"prompt": "It is", "max_tokens": 90, "temperature": 1, "seed": 3}
    message = {"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 90}
    answers = asked(
        *(("/v1/completions", completion | given) for given, _ in THEIRS),
        *(("/v1/chat/completions", message | given) for given, _ in THEIRS),
    )
    for at, (answer, (_, result)) in enumerate(zip(answers, THEIRS * 2, strict=True)):
        (choice,) = answer["choices"]
        matches(choice["message"]["content"] if at >= len(THEIRS) else choice["text"], result)
        assert choice["finish_reason"] == "stop"


def test_any_object_is_an_object_and_text_is_free() -> None:
    base: Body = {"prompt": "It is", "max_tokens": 30, "temperature": 0}
    given: list[Body] = [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None, "regex": None},
    ]
    first, second, *free = (
        answer["choices"][0]["text"]
        for answer in asked(*(("/v1/completions", base | each) for each in given))
    )
    assert first.startswith("{")
    assert first == second
    assert len(set(free)) == 1
    assert not free[0].startswith("{")


def test_a_stream_says_what_the_whole_says_and_a_cut_answer_says_length() -> None:
    async def exchange() -> None:
        async with serve(generate.router) as server:
            body = {"prompt": "It is", "json_schema": SCHEMA, "max_new_tokens": 90}
            whole = await sent(server, "/generate", body | {"stream": False})
            stream = await server.client.post("/generate", json=body)
            *lines, done = map(json.loads, stream.text.splitlines())
            assert "".join(line["text_delta"] for line in lines) == whole["text"]
            assert done["finish_reason"] == whole["finish_reason"] == "stop"
            cut = await sent(server, "/generate", body | {"stream": False, "max_new_tokens": 5})
            assert cut["finish_reason"] == "length"
            assert whole["text"].startswith(cut["text"])

    asyncio.run(exchange())


BAD_SCHEMA = {"type": "array", "uniqueItems": True}
WRONG: Sequence[tuple[Body, str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
    ({"response_format": {}}, "response_format.type", "None"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", ""),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", ""),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}},
     "response_format.json_schema.strict", "bool"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "odd": 1}}},
     "response_format.json_schema.odd", ""),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": BAD_SCHEMA}}},
     "response_format", "`uniqueItems` at $"),
    ({"json_schema": BAD_SCHEMA}, "json_schema", "`uniqueItems` at $"),
    ({"json_schema": "{"}, "json_schema", "no JSON"),
    ({"regex": "a("}, "regex", "unclosed"),
    ({"regex": ""}, "regex", "a text"),
    ({"regex": "a" * 300_000}, "regex", "8,192"),
    ({"ebnf": "root ::= ("}, "ebnf", "cannot be read"),
    ({"regex": "a", "ebnf": EBNF}, "ebnf", "exclude each other"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "exclude"),
    ({"guided_choice": []}, "guided_choice", "list of texts"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice", "list of texts"),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
     "structured_outputs.whitespace_pattern", "not served"),
    ({"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
     "structured_outputs.disable_any_whitespace", "not served"),
    ({"structural_tag": "{"}, "structural_tag", "not JSON"),
    ({"structural_tag": {"type": "structural_tag", "format": {}}}, "structural_tag.format", ""),
    ({"structural_tag": TAG | {"triggers": []}}, "structural_tag.triggers", "list of texts"),
    ({"structural_tag": TAG | {"triggers": ["<g"]}}, "structural_tag.structures.0.begin", "start"),
    ({"structural_tag": TAG | {"structures": [{"begin": "<f", "schema": BAD_SCHEMA}]}},
     "structural_tag", "`uniqueItems` at $"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "param", "words"), WRONG, ids=[f"{at}-{each[1]}" for at, each in enumerate(WRONG)]
)
def test_what_is_wrong_is_a_400_that_names_the_field_and_the_keyword(
    given: Body, param: str, words: str
) -> None:
    fields = OpenAIGrammarFields.model_validate(given)

    async def read() -> None:
        try:
            await check_grammar(fields.grammar(), fields.grammar_field)
        except Exception as error:
            raise api_error(error) from None

    with pytest.raises(ApiError) as refused:
        asyncio.run(read())
    assert (refused.value.status, refused.value.param) == (400, param)
    assert words in refused.value.message
    assert "\n" not in refused.value.message


def test_a_refusal_reaches_the_client_in_every_form() -> None:
    wrong = {"json_schema": BAD_SCHEMA}
    bodies: list[tuple[str, Body, str]] = [
        ("/generate", {"prompt": "a", **wrong}, "json_schema"),
        ("/generate", {"text": "a", "sampling_params": wrong}, "sampling_params.json_schema"),
        ("/v1/completions", {"prompt": "a", **wrong}, "json_schema"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], **wrong},
         "json_schema"),
    ]  # fmt: skip

    async def exchange() -> None:
        async with serve(generate.router, completions.router, chat.router) as server:
            for path, body, param in bodies:
                response = await server.client.post(path, json=body)
                assert refusal(response) == (400, param)
                assert "`uniqueItems` at $" in response.json()["error"]["message"]

    asyncio.run(exchange())


@pytest.mark.parametrize("tag", [TAG, json.dumps(TAG)])
def test_a_structural_tag_is_taken_as_an_object_and_as_text(tag: Any) -> None:
    grammar = GrammarFields.model_validate({"structural_tag": tag}).grammar()
    assert grammar is not None
    asyncio.run(check_grammar(grammar, "structural_tag"))
    wrapped = {"response_format": TAG}
    assert OpenAIGrammarFields.model_validate(wrapped).grammar() == grammar
