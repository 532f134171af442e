"""Calls in the format of Qwen3-coder: markup in which each argument is text, typed by its schema.

<tool_call>
<function=NAME>
<parameter=KEY>
value
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from api.lark import ANNOTATIONS, DEFINITIONS, CannotBind, Lark, listed, split_object
from api.tool_calls import CallGrammar, Calls, Schema, ToolFormat
from api.tool_text import NotACall, Waiting

CALL, CALL_END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
WORD = re.compile(r"[^<>\s]*")  # a name
STRING = frozenset({"string"})

JSON_TYPES: Mapping[type, tuple[str, ...]] = {
    str: ("string",),
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    dict: ("object",),
    list: ("array",),
    type(None): ("null",),
}


def _types(schema: Any) -> frozenset[str] | None:
    """The JSON types that a schema allows; None: it does not say."""
    if not isinstance(schema, Mapping):
        return None
    named = schema.get("type")
    if named is not None:
        return frozenset([named] if isinstance(named, str) else named)
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return frozenset(name for value in values for name in JSON_TYPES[type(value)])
    members = [_types(each) for each in schema.get("anyOf") or schema.get("oneOf") or ()]
    known = [each for each in members if each is not None]
    return frozenset().union(*known) if known and len(known) == len(members) else None


def value_of(text: str, schema: Any) -> str:
    """An argument as JSON: text where the schema says so, else the JSON that it is, else text."""
    text = text.removeprefix("\n").removesuffix("\n")
    types = _types(schema)
    if types == STRING:
        return json.dumps(text, ensure_ascii=False)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    if types is None or types.intersection(JSON_TYPES[type(value)]) or "string" not in types:
        return text.strip()
    return json.dumps(text, ensure_ascii=False)


def _read(calls: Calls, mark: str) -> Waiting[None]:
    text = calls.text
    if mark == CALL:
        yield from text.skip_space()
        yield from text.expect(FUNCTION)
    name = yield from text.run(WORD)
    yield from text.expect(">")
    calls.begin(name)
    properties = calls.tools[name].get("properties", {})
    opening = "{"
    while True:
        yield from text.skip_space()
        if (yield from text.follows(FUNCTION_END)):
            break
        if not (yield from text.follows(PARAMETER)):
            raise NotACall
        key = yield from text.run(WORD)
        yield from text.expect(">")
        value = value_of((yield from text.until(PARAMETER_END)), properties.get(key, {}))
        calls.arguments(f"{opening}{json.dumps(key, ensure_ascii=False)}: {value}")
        opening = ", "
    calls.arguments("{}" if opening == "{" else "}")
    yield from text.close(CALL_END)


def _argument(lark: Lark, key: str, schema: Any) -> str:
    """One argument, with its marks."""
    begin = lark.text(f"{PARAMETER}{key}>\n")
    end = f"\n{PARAMETER_END}\n"
    if _types(schema) != STRING:
        return lark.rule(f"{begin} {lark.json(schema)} {lark.text(end)}")
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return lark.rule(f"{begin} {lark.either(map(lark.text, values))} {lark.text(end)}")
    more = schema.keys() - ANNOTATIONS - set(DEFINITIONS) - {"type"}
    if more:
        raise CannotBind(f"{min(more)!r} of parameter {key!r} needs a format that writes JSON")
    return lark.rule(f"{begin} {lark.until(PARAMETER_END)} {lark.text(chr(10))}")


def _write(lark: Lark, tools: Mapping[str, Schema]) -> CallGrammar:
    begin, end, line = lark.mark(CALL), lark.mark(CALL_END), lark.text("\n")
    calls = []
    for name, schema in tools.items():
        properties, required = split_object(schema)
        arguments = {key: _argument(lark, key, each) for key, each in properties.items()}
        wanted = [arguments[key] for key in required]
        others = [rule for key, rule in arguments.items() if key not in required]
        head, tail = lark.text(f"\n{FUNCTION}{name}>\n"), lark.text(f"{FUNCTION_END}\n")
        calls.append(f"{begin} {head} {listed(wanted, others, '')} {tail} {end}")
    return CallGrammar("", line, "", calls)


QWEN3_CODER = ToolFormat((FUNCTION,), (CALL, FUNCTION), _read, _write)
