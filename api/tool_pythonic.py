"""Calls as a list in Python: [f(a=1, b="x"), g()], where an answer begins or in Llama 4's marks."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from api.lark import CannotBind, Lark, listed, split_object
from api.tool_calls import CallGrammar, Calls, Schema, ToolFormat
from api.tool_text import AnswerText, NotACall, Waiting

START, END = "<|python_start|>", "<|python_end|>"
NAME = re.compile(r"[\w.-]*")
PLAIN = re.compile(r"""[^"'()\[\]{},\\]*""")
QUOTED = {'"': re.compile(r'[^"\\]*'), "'": re.compile(r"[^'\\]*")}
CLOSER = {"{": "}", "[": "]", "(": ")"}
JSON_NAMES: Mapping[str, Any] = {"true": True, "false": False, "null": None}
MAX_DEPTH = 64  # of a literal


def _scan_quoted(text: AnswerText, quote: str) -> Waiting[None]:
    yield from text.expect(quote)
    while True:
        yield from text.run(QUOTED[quote])
        character = yield from text.peek()
        if not character:
            raise NotACall
        text.advance()
        if character == quote:
            return
        if not (yield from text.peek()):
            raise NotACall
        text.advance()  # whatever is escaped


def _scan_value(text: AnswerText) -> Waiting[None]:
    """Read up to the comma or the parenthesis that ends an argument."""
    closers: list[str] = []
    while True:
        yield from text.run(PLAIN)
        character = yield from text.peek()
        if not closers and character and character in ",)":
            return
        if character in QUOTED:
            yield from _scan_quoted(text, character)
            continue
        if character in CLOSER and len(closers) < MAX_DEPTH:
            closers.append(CLOSER[character])
        elif closers and character == closers[-1]:
            closers.pop()
        elif character != "," or not closers:
            raise NotACall
        text.advance()


def json_of(literal: str) -> str:
    """A literal of Python, or of JSON, as JSON. Raises NotACall for anything else."""
    try:
        json.loads(literal)
        return literal.strip()
    except (ValueError, RecursionError):
        pass
    try:
        value = _value(ast.parse(literal.strip(), mode="eval").body)
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        raise NotACall from None


def _value(node: ast.expr) -> Any:
    """As `ast.literal_eval`, and with JSON's names. Raises ValueError."""
    if isinstance(node, ast.Name) and node.id in JSON_NAMES:
        return JSON_NAMES[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _value(key) for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("a key that is no text")
        return dict(zip(keys, map(_value, node.values), strict=True))
    return ast.literal_eval(node)


def _read(calls: Calls, mark: str) -> Waiting[None]:
    text = calls.text
    yield from text.skip_space()
    yield from text.expect("[")
    while True:
        yield from text.skip_space()
        name = yield from text.run(NAME)
        yield from text.skip_space()
        yield from text.expect("(")
        calls.begin(name)
        yield from _read_arguments(calls)
        if (yield from text.skip_space()) != ",":
            break
        text.advance()
    yield from text.expect("]")
    text.settle()
    yield from text.close(END)


def _read_arguments(calls: Calls) -> Waiting[None]:
    """What stands between a call's parentheses, argument by argument."""
    text, opening = calls.text, "{"
    while (yield from text.skip_space()) != ")":
        key = yield from text.run(NAME)
        if not key.isidentifier():
            raise NotACall
        yield from text.skip_space()
        yield from text.expect("=")
        value = json_of((yield from text.read(_scan_value)))
        if (yield from text.peek()) == ",":
            text.advance()
        calls.arguments(f"{opening}{json.dumps(key, ensure_ascii=False)}: {value}")
        opening = ", "
    text.advance()
    calls.arguments("{}" if opening == "{" else "}")


def _write(lark: Lark, tools: Mapping[str, Schema]) -> CallGrammar:
    calls = []
    for name, schema in tools.items():
        properties, required = split_object(schema)
        for key in properties:
            if not key.isidentifier():
                raise CannotBind(f"parameter {key!r} is no name in Python")
        arguments = {
            key: lark.rule(f"{lark.text(f'{key}=')} {lark.json(each)}")
            for key, each in properties.items()
        }
        wanted = [arguments[key] for key in required]
        others = [rule for key, rule in arguments.items() if key not in required]
        inner = listed(wanted, others, lark.text(", "))
        calls.append(f"{lark.text(f'{name}(')} {inner} {lark.text(')')}")
    return CallGrammar(lark.text("["), lark.text(", "), lark.text("]"), calls)


PYTHONIC = ToolFormat((START, "[func_name"), (START,), _read, _write, opening="[")
