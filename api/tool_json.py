"""Calls whose arguments are JSON, in the formats of hermes, Llama 3 and Mistral.

hermes (Qwen, Nous):  <tool_call>{"name": "f", "arguments": {...}}</tool_call>
llama3_json:          {"name": "f", "parameters": {...}}; {...}     also after <|python_tag|>
mistral:              [TOOL_CALLS][{"name": "f", "arguments": {...}}]  or  [TOOL_CALLS]f[ARGS]{...}
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping

from api.lark import Lark, object_schema
from api.tool_calls import CallGrammar, Calls, Schema, ToolFormat
from api.tool_text import AnswerText, NotACall, Waiting

ARGUMENTS = ("arguments", "parameters")  # what formats call them; either is understood

PLAIN = re.compile(r'[^"\\\x00-\x1f]*')  # of a string, unescaped
HEX = frozenset(string.hexdigits)
WORD = re.compile(r"[-+.0-9A-Za-z]*")
SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
CLOSER = {"{": "}", "[": "]"}
NAME = re.compile(r"[a-zA-Z0-9_.-]*")


def scan_string(text: AnswerText) -> Waiting[None]:
    """Read a JSON string. Raises NotACall where there is none."""
    yield from text.expect('"')
    while True:
        yield from text.run(PLAIN)
        character = yield from text.peek()
        if character not in ('"', "\\"):
            raise NotACall
        text.advance()
        if character == '"':
            return
        escape = yield from text.peek()
        if not escape or escape not in '"\\/bfnrtu':
            raise NotACall
        text.advance()
        for _ in range(4 if escape == "u" else 0):
            if (yield from text.peek()) not in HEX:
                raise NotACall
            text.advance()


def _scan_key(text: AnswerText) -> Waiting[None]:
    yield from text.skip_space()
    yield from scan_string(text)
    yield from text.skip_space()
    yield from text.expect(":")


def _scan_scalar(text: AnswerText) -> Waiting[None]:
    if not SCALAR.fullmatch((yield from text.run(WORD))):
        raise NotACall


def scan_value(text: AnswerText) -> Waiting[None]:
    """Read a JSON value (RFC 8259), however deep. Raises NotACall where it cannot go on."""
    closers: list[str] = []  # of what is open
    while True:
        first = yield from text.skip_space()
        entered = first in CLOSER
        if entered:
            text.advance()
            closers.append(CLOSER[first])
        else:
            yield from (scan_string if first == '"' else _scan_scalar)(text)
        while closers:
            following = yield from text.skip_space()
            if following == closers[-1]:
                text.advance()
                closers.pop()
                entered = False
                continue
            if not entered:
                yield from text.expect(",")
            if closers[-1] == "}":
                yield from _scan_key(text)
            break
        else:
            return


def read_arguments(calls: Calls) -> Waiting[None]:
    """Say the arguments of the call that was begun, piece by piece: an object, or its text in a
    string, or null for none.
    """
    text = calls.text
    first = yield from text.skip_space()
    text.settle()
    if first == "{":
        with text.spoken(calls.piece):
            yield from scan_value(text)
        return
    calls.arguments(_object_of((yield from text.read(scan_value))))


def _object_of(raw: str) -> str:
    """The JSON object that a JSON value stands for. Raises NotACall."""
    value = json.loads(raw)
    found = "{}" if value is None else value if isinstance(value, str) else raw
    try:
        if isinstance(json.loads(found), dict):
            return found
    except ValueError:
        pass
    raise NotACall


def read_call(calls: Calls) -> Waiting[None]:
    """A call as an object: its name, its arguments, in either order; other keys mean nothing."""
    text = calls.text
    name: str | None = None
    arguments: str | None = None  # None: not seen; "": said
    yield from text.expect("{")
    while (yield from text.skip_space()) != "}":
        key = json.loads((yield from text.read(scan_string)))
        yield from text.skip_space()
        yield from text.expect(":")
        following = yield from text.skip_space()
        if key == "name" and name is None:
            if following != '"':
                raise NotACall
            name = json.loads((yield from text.read(scan_string)))
            calls.begin(name)
            if arguments is not None:
                calls.arguments(arguments)
                arguments = ""
        elif key in ARGUMENTS and arguments is None and name is not None:
            yield from read_arguments(calls)
            arguments = ""
        elif key in ARGUMENTS and arguments is None:
            arguments = _object_of((yield from text.read(scan_value)))
        else:
            yield from scan_value(text)
        if (yield from text.skip_space()) != "}":
            yield from text.expect(",")
    text.advance()
    if name is None:
        raise NotACall
    if arguments is None:
        calls.arguments("{}")
    text.settle()


def _read_hermes(calls: Calls, mark: str) -> Waiting[None]:
    yield from calls.text.skip_space()
    yield from read_call(calls)
    yield from calls.text.close("</tool_call>")


def _read_llama(calls: Calls, mark: str) -> Waiting[None]:
    while True:
        yield from calls.text.skip_space()
        yield from read_call(calls)
        if (yield from calls.text.skip_space()) != ";":
            return
        calls.text.advance()


def _read_mistral(calls: Calls, mark: str) -> Waiting[None]:
    text = calls.text
    if (yield from text.skip_space()) != "[":
        yield from _read_named(calls)
        return
    text.advance()
    while True:
        yield from text.skip_space()
        yield from read_call(calls)
        if (yield from text.skip_space()) != ",":
            break
        text.advance()
    yield from text.expect("]")


def _read_named(calls: Calls) -> Waiting[None]:
    """Mistral's newer form: name[ARGS]{...}, or name[CALL_ID]id[ARGS]{...}."""
    text = calls.text
    name = yield from text.run(NAME)
    id = None
    if (yield from text.follows("[CALL_ID]")):
        id = yield from text.run(NAME)
    yield from text.follows("[ARGS]")
    if (yield from text.skip_space()) != "{":
        raise NotACall
    calls.begin(name, id)
    yield from read_arguments(calls)


def _objects(lark: Lark, tools: Mapping[str, Schema], key: str) -> list[str]:
    """A call as an object, for each tool."""
    calls = []
    for name, schema in tools.items():
        before = f'{{"name": {json.dumps(name)}, {json.dumps(key)}: '
        calls.append(f"{lark.text(before)} {lark.json(object_schema(schema))} {lark.text('}')}")
    return calls


def _write_hermes(lark: Lark, tools: Mapping[str, Schema]) -> CallGrammar:
    begin, end = lark.mark("<tool_call>"), lark.mark("</tool_call>")
    line = lark.text("\n")
    calls = [f"{begin} {line} {call} {line} {end}" for call in _objects(lark, tools, "arguments")]
    return CallGrammar("", line, "", calls)


def _write_llama(lark: Lark, tools: Mapping[str, Schema]) -> CallGrammar:
    return CallGrammar("", lark.text("; "), "", _objects(lark, tools, "parameters"))


def _write_mistral(lark: Lark, tools: Mapping[str, Schema]) -> CallGrammar:
    """In the newer form where the model has a token for it."""
    begin = lark.mark("[TOOL_CALLS]")
    if not lark.has_token("[ARGS]"):
        calls = _objects(lark, tools, "arguments")
        return CallGrammar(f"{begin} {lark.text('[')}", lark.text(", "), lark.text("]"), calls)
    calls = [
        f"{begin} {lark.text(name)} {lark.mark('[ARGS]')} {lark.json(object_schema(schema))}"
        for name, schema in tools.items()
    ]
    return CallGrammar("", "", "", calls)


def _mistral_id() -> str:
    """Its templates refuse any other form."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


HERMES = ToolFormat(("<tool_call>",), ("<tool_call>",), _read_hermes, _write_hermes)
LLAMA3_JSON = ToolFormat(
    ("<|python_tag|>", '"parameters": dictionary'),
    ("<|python_tag|>",),
    _read_llama,
    _write_llama,
    opening="{",
)
MISTRAL = ToolFormat(
    ("[TOOL_CALLS]",), ("[TOOL_CALLS]",), _read_mistral, _write_mistral, new_id=_mistral_id
)
