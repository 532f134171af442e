"""Fields that bind the form of an answer, and the grammar that they mean. One of them is given.

json_schema, guided_json                  a JSON schema, as an object or as JSON text
regex, guided_regex                       a regular expression that the whole answer matches
ebnf, guided_grammar                      a grammar in GBNF, or in Lark's notation
guided_choice                             one of some texts
structural_tag                            free text with tagged stretches of JSON
response_format, structured_outputs       OpenAI's and vLLM's objects, which hold the above
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field

from api.bodies import Form, in_words_of_the_client
from api.errors import refused
from api.structural_tag import read_tag
from backend.grammar import check_grammar as compile_once
from backend.grammar_forms import ANY_OBJECT, choice_grammar, ebnf_grammar, schema_grammar
from backend.interface import Grammar, RequestRefused

# Characters of choices together: they are quoted one by one before a grammar's own bound is seen.
MAX_CHOICES = 1 << 18

Reader = Callable[[Any, str], Grammar | None]  # a field's value, and its name


class GrammarFields(Form):
    """Of our own form, and of SGLang's `sampling_params`. At most one of them is given."""

    json_schema: str | dict[str, Any] | bool | None = Field(
        None, description="the answer is JSON that matches this JSON schema"
    )
    regex: str | None = Field(None, description="that the whole answer matches")
    ebnf: str | None = Field(None, description="a grammar of the answer, in GBNF or Lark")
    structural_tag: str | dict[str, Any] | None = Field(
        None, description="stretches of JSON within free text: structures and triggers"
    )

    def grammar(self, path: str = "") -> Grammar | None:
        """What they mean together; `path` goes before a field's name. Raises ApiError."""
        return _only_one(self, READERS, path)

    @property
    def grammar_field(self) -> str:
        """The field that is given, for errors."""
        return _given(self, READERS)


class OpenAIGrammarFields(Form):
    """Of OpenAI's routes: `response_format`, and what vLLM and SGLang add to it."""

    response_format: dict[str, Any] | None = Field(
        None, description="type: text, json_object, json_schema or structural_tag"
    )
    structured_outputs: dict[str, Any] | None = Field(
        None, description="one of json, regex, choice, grammar, json_object, structural_tag"
    )
    json_schema: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def grammar(self) -> Grammar | None:
        """What they mean together. Raises ApiError."""
        return _only_one(self, OPENAI_READERS, "")

    @property
    def grammar_field(self) -> str:
        """The field that is given, for errors."""
        return _given(self, OPENAI_READERS)


async def check_grammar(grammar: Grammar | None, param: str) -> None:
    """Compile a grammar beside the event loop. Raises ApiError 400 naming `param` and the keyword
    that is at fault.
    """
    if grammar is None:
        return
    try:
        await asyncio.to_thread(compile_once, grammar)
    except RequestRefused as error:
        raise refused(f"{param}: {error}", param) from None


def _given(fields: Form, readers: Mapping[str, Reader]) -> str:
    """The first field that is there; without one, the first there could be."""
    given = (name for name in readers if getattr(fields, name) is not None)
    return next(given, next(iter(readers)))


def _only_one(fields: Form, readers: Mapping[str, Reader], path: str) -> Grammar | None:
    """The grammar of the one field that asks for one."""
    found: dict[str, Grammar] = {}
    for name, reader in readers.items():
        value = getattr(fields, name)
        if value is not None:
            grammar = _read(reader, value, path + name)
            found |= {} if grammar is None else {path + name: grammar}
    if len(found) > 1:
        names = list(found)
        raise refused(f"{names[0]} and {names[1]} exclude each other: give one of them", names[1])
    return next(iter(found.values()), None)


def _read(reader: Reader, value: Any, param: str) -> Grammar | None:
    with in_words_of_the_client({"grammar": param, "json_schema": param}):
        return reader(value, param)


def schema_of(value: Any, param: str) -> Grammar:
    """JSON that matches a schema. Raises RequestRefused naming `param`."""
    with in_words_of_the_client({"grammar": param, "json_schema": param}):
        return schema_grammar(value)


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str) or not value:
        raise refused(f"{param} must be a text, got {value!r:.40}", param)
    return value


def _regex(value: Any, param: str) -> Grammar:
    return Grammar("regex", _text(value, param))


def _ebnf(value: Any, param: str) -> Grammar:
    return ebnf_grammar(_text(value, param))


def _choice(value: Any, param: str) -> Grammar:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise refused(f"{param} must be a list of texts, at least one", param)
    if sum(map(len, value)) > MAX_CHOICES:
        raise refused(f"{param} must have {MAX_CHOICES:,} characters at most", param)
    return choice_grammar(value)


def _response_format(value: dict[str, Any], param: str) -> Grammar | None:
    """Raises ApiError for a type that is not served, and for keys that do not belong to its own."""
    kind = value.get("type")
    if kind not in FORMATS:
        wanted = ", ".join(FORMATS)
        raise refused(f"{param}.type must be one of {wanted}, got {kind!r:.40}", f"{param}.type")
    return FORMATS[kind](value, param)


def _free(value: dict[str, Any], param: str) -> None:
    _refuse_others(value, {"type"}, param)


def _json_object(value: dict[str, Any], param: str) -> Grammar:
    _refuse_others(value, {"type"}, param)
    return ANY_OBJECT


def _json_schema(value: dict[str, Any], param: str) -> Grammar:
    _refuse_others(value, {"type", "json_schema"}, param)
    param = f"{param}.json_schema"
    inner = value.get("json_schema")
    if not isinstance(inner, dict) or inner.get("schema") is None:
        raise refused(f"{param} must be an object with a schema", f"{param}.schema")
    _refuse_others(inner, {"name", "description", "schema", "strict"}, param)
    for name, kind in (("name", str), ("description", str), ("strict", bool)):
        if not isinstance(inner.get(name), kind | None):
            raise refused(f"{param}.{name} must be a {kind.__name__}", f"{param}.{name}")
    if not isinstance(inner["schema"], dict | bool):
        raise refused(f"{param}.schema must be an object", f"{param}.schema")
    return schema_of(inner["schema"], f"{param}.schema")


def _structured_outputs(value: dict[str, Any], param: str) -> Grammar:
    """vLLM's object: one of its kinds. What only tunes another server's parser is refused, unless
    it asks for nothing.
    """
    given = {name: each for name, each in value.items() if each is not None}
    asked = [name for name in STRUCTURED if name in given and given[name] is not False]
    for name in given:
        if name not in STRUCTURED and not (name in TUNING and given[name] in TUNING[name]):
            raise refused(f"{param}.{name} is not served here", f"{param}.{name}")
    if len(asked) != 1:
        raise refused(f"{param} must have exactly one of {', '.join(STRUCTURED)}", param)
    (name,) = asked
    grammar = STRUCTURED[name](given[name], f"{param}.{name}")
    assert grammar is not None
    return grammar


def _any_object(value: Any, param: str) -> Grammar:
    if value is not True:
        raise refused(f"{param} must be true or false, got {value!r:.40}", param)
    return ANY_OBJECT


def _refuse_others(value: Mapping[str, Any], known: set[str], param: str) -> None:
    """Raise ApiError naming a key that is not `known`."""
    for name, each in value.items():
        if name not in known and each is not None:
            raise refused(f"{param}.{name} is no field of it", f"{param}.{name}")


READERS: dict[str, Reader] = {
    "json_schema": schema_of,
    "regex": _regex,
    "ebnf": _ebnf,
    "structural_tag": read_tag,
}
OPENAI_READERS: dict[str, Reader] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    **READERS,
    "guided_json": schema_of,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _ebnf,
}
FORMATS: dict[Any, Reader] = {
    "text": _free,
    "json_object": _json_object,
    "json_schema": _json_schema,
    "structural_tag": read_tag,
}
STRUCTURED: dict[str, Reader] = {
    "json": schema_of,
    "regex": _regex,
    "choice": _choice,
    "grammar": _ebnf,
    "json_object": _any_object,
    "structural_tag": read_tag,
}
# of `structured_outputs`: the values that change nothing here
TUNING: dict[str, tuple[Any, ...]] = {
    "disable_fallback": (True, False),  # there is none
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
}
