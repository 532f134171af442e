"""Other ways to say what an answer must be, as the grammars that they mean.

Called by the front, before a request is submitted. Pure functions of text; nothing is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import StructTag
from llguidance.gbnf_to_lark import any_to_lark

from backend.grammar import JSON_OPTIONS
from backend.interface import Grammar, RequestRefused
from backend.json_schema import read_schema

ANY_OBJECT = Grammar("json_schema", '{"type": "object"}')
# of a client's own grammar: its conversion takes the square of them
MAX_EBNF_CHARACTERS = 1 << 14
MAX_EBNF_RULES = 1500  # and groups in them: the compiler calls itself for each that leads on


@dataclass(frozen=True, slots=True)
class Tag:
    """A stretch of free text that is not free: from `begin`, which starts with `trigger`, over JSON
    that matches `schema`, to `end`.
    """

    trigger: str
    begin: str
    schema: Any
    end: str


def schema_grammar(schema: Any) -> Grammar:
    """JSON that matches a schema, given as JSON text or as what such a text holds."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
    except RecursionError:
        raise RequestRefused("the JSON schema is nested too deep: use $ref", "grammar") from None
    return Grammar("json_schema", text)


def choice_grammar(choices: Sequence[str]) -> Grammar:
    """One of some texts."""
    options = (json.dumps(each, ensure_ascii=False) for each in choices)
    return Grammar("lark", "start: " + " | ".join(options))


def ebnf_grammar(text: str) -> Grammar:
    """A grammar in GBNF, the EBNF of llama.cpp and xgrammar, whose first rule is `root`; or in
    Lark's notation, whose first rule is `start`.
    """
    if len(text) > MAX_EBNF_CHARACTERS:
        raise RequestRefused(
            f"the EBNF has {len(text):,} characters, {MAX_EBNF_CHARACTERS:,} are allowed", "grammar"
        )
    try:
        lark = any_to_lark(text)
    except Exception as error:  # the converter has an error of its own, and also raises others
        line = " ".join(str(error).split())[:300]
        raise RequestRefused(f"the EBNF cannot be read: {line}", "grammar") from None
    if sum(map(lark.count, ":([{")) > MAX_EBNF_RULES:
        raise RequestRefused(
            f"the EBNF has more than {MAX_EBNF_RULES:,} rules and groups", "grammar"
        )
    return Grammar("lark", lark)


def schema_part(schema: Any, options: Mapping[str, Any] = JSON_OPTIONS) -> str:
    """A JSON schema as it stands within a grammar, where it carries its options itself, as JSON.
    Raises RequestRefused as `read_schema` does.
    """
    return json.dumps({**read_schema(json.dumps(schema)), "x-guidance": dict(options)})


def tag_grammar(tags: Sequence[Tag]) -> Grammar:
    """Free text in which each trigger begins one of the tags that start with it."""
    return Grammar(
        "lark",
        StructTag.to_grammar(
            [
                StructTag(
                    trigger=tag.trigger,
                    begin=tag.begin,
                    grammar=json.loads(schema_part(tag.schema)),
                    end=tag.end,
                )
                for tag in tags
            ],
            assume_special=False,
        ),
    )
