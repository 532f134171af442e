"""Grammars in llguidance's Lark, put together from pieces.

Used by formats of calls and by `api/dialect.py`. Text, marks and schemas become expressions; a rule
has a body and is used by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from backend.grammar import JSON_OPTIONS
from backend.grammar_forms import schema_part
from backend.interface import Grammar

# As templates write the arguments of earlier calls, by jinja2's tojson: what models have learned.
CALL_STYLE: Mapping[str, Any] = {
    "json_allowed_escapes": JSON_OPTIONS["json_allowed_escapes"],
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
ANNOTATIONS = frozenset({"title", "description", "default", "examples", "$schema", "$id"})
DEFINITIONS = ("$defs", "definitions")
OPEN_KEYWORDS = ("additionalProperties", "patternProperties", "unevaluatedProperties")
SPLIT = ANNOTATIONS | {"type", "properties", "required", *OPEN_KEYWORDS, *DEFINITIONS}

BOUND = "joined_start"  # what the first rule of a grammar is called when it is a part of another
# The words of a grammar that are names; of what else there is, names cannot be told apart.
LARK = re.compile(
    r'"(?:\\.|[^"\\])*"|//[^\n]*|\#[^\n]*|/(?:\\.|[^/\\])*/|<[^>\s]*>|(?P<name>[A-Za-z_][\w-]*)'
)


class CannotBind(ValueError):
    """Something that no grammar here can hold an answer to. The message says what."""


class Lark:
    """A grammar in the making."""

    def __init__(self, token_of: Callable[[str], int | None], special_ids: Collection[int]) -> None:
        """`token_of`: the id of the one token that a mark is, if it is one."""
        self._token_of = token_of
        self._special_ids = special_ids
        self._rules: list[str] = []

    def text(self, text: str) -> str:
        """Exactly this."""
        return json.dumps(text, ensure_ascii=False) if text else ""

    def mark(self, mark: str) -> str:
        """A mark: its token where it has one, since models that know it write it so."""
        token = self._token_of(mark)
        return self.text(mark) if token is None else f"<[{token}]>"

    def has_token(self, mark: str) -> bool:
        """Whether a mark is one token."""
        return self._token_of(mark) is not None

    def json(self, schema: Any, style: Mapping[str, Any] = CALL_STYLE) -> str:
        """JSON that matches `schema`. Raises RequestRefused for one that cannot be honoured."""
        return self.rule(f"%json {schema_part(schema, style)}")

    def rule(self, body: str, options: str = "", name: str = "joined_") -> str:
        """The name of a new rule."""
        name = f"{name}{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def free(self, mark: str) -> str:
        """Any text that does not hold `mark`, and no special token."""
        name = self.rule(f"/(?s:.*)/ & ~/(?s:.*){re.escape(mark)}(?s:.*)/", name="JOINED_")
        return f"{name}?"

    def until(self, mark: str) -> str:
        """Any text up to a mark, and the mark."""
        if self._token_of(mark) in self._special_ids:
            return f"{self.rule('/(?s:.*)/')} {self.mark(mark)}"
        return self.rule("/(?s:.*)/", f"[suffix={self.text(mark)}]")

    def either(self, alternatives: Iterable[str]) -> str:
        """One of them."""
        return self.rule("\n  | ".join(alternatives))

    def bound(self, grammar: Grammar) -> str:
        """What `grammar` allows. Raises CannotBind for a kind that cannot be a part."""
        if grammar.kind == "json_schema":
            return self.json(json.loads(grammar.text), JSON_OPTIONS)
        if grammar.kind == "regex":
            return self.rule(f"/{_escaped(grammar.text)}/")
        if "%ignore" in grammar.text:
            raise CannotBind("a grammar with %ignore cannot be joined with thoughts or calls")
        self._rules.append(LARK.sub(_renamed, grammar.text))
        return BOUND

    def grammar(self, start: str) -> Grammar:
        """The whole."""
        return Grammar("lark", "\n".join([f"start: {start}", *self._rules, ""]))


def _renamed(word: re.Match[str]) -> str:
    return BOUND if word["name"] == "start" else word[0]


def _escaped(pattern: str) -> str:
    """A regular expression as it stands between slashes."""
    lines = pattern.replace("\n", r"\n").replace("\r", r"\r")
    return re.sub(r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], lines)


def object_schema(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """`schema` of an object that has no other properties than it names, where it names all of them
    in one place and does not say otherwise.
    """
    plain = "properties" in schema and schema.keys() <= SPLIT
    if not plain or any(keyword in schema for keyword in OPEN_KEYWORDS):
        return schema
    return {**schema, "additionalProperties": False}


def split_object(schema: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Schemas of an object's properties, each complete in itself, required ones first; and the
    names of those. Raises CannotBind for a schema that says more than that.
    """
    for keyword in schema:
        if keyword not in SPLIT:
            raise CannotBind(f"{keyword!r} of the parameters needs a format that writes JSON")
    definitions = {key: schema[key] for key in DEFINITIONS if key in schema}
    required = tuple(dict.fromkeys(schema.get("required", ())))
    given = schema.get("properties", {})
    names = [*required, *(name for name in given if name not in required)]
    properties = {name: given.get(name, {}) for name in names}
    return {
        name: {**each, **definitions} if isinstance(each, Mapping) else each
        for name, each in properties.items()
    }, required


def listed(required: Sequence[str], optional: Sequence[str], between: str) -> str:
    """Expressions in this order, `between` two of them; optional ones may be left out."""
    tail = " ".join(f"({between} {each})?" for each in optional)
    if required:
        return f"{f' {between} '.join(required)} {tail}"
    starts = [
        " ".join([first, *(f"({between} {each})?" for each in optional[place + 1 :])])
        for place, first in enumerate(optional)
    ]
    return f"({' | '.join(starts)})?" if starts else ""
