"""From the bytes of a request body to a checked value. Whatever is wrong is a 400 with a field."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeAlias, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, from_json
from starlette.requests import ClientDisconnect

from api.errors import ApiError, ClientGone, refused
from backend.interface import RequestRefused

MAX_BODY = 16 << 20  # bytes: a prompt of a million tokens as ids is about 8 MB
MAX_PROMPTS = 2048  # of one request
MAX_FIELDS = 256  # of one object

Body = TypeVar("Body", bound=BaseModel)


def bounded(value: Any) -> Any:
    """Refuse an object of very many fields before each of them is looked at."""
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise ValueError(f"an object of {len(value):,} fields, {MAX_FIELDS} are allowed")
    return value


class Form(BaseModel):
    """A request body, or an object in one."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    _bounded = model_validator(mode="before")(bounded)


# One wrong id is enough: to collect a million faults would hold up everybody else.
TokenIds: TypeAlias = Annotated[list[int], Field(fail_fast=True)]
Texts: TypeAlias = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
# Texts that an answer ends at: their number is bounded where they are read.
Stops: TypeAlias = str | Annotated[list[str], Field(fail_fast=True)]

MOST_URGENT = 1 << 31

# What means the same in every form, whatever it is called there.
Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]  # of a request
Salt: TypeAlias = Annotated[str, Field(max_length=256)]  # prefixes are shared within one only
# Symmetric: some forms say it with the opposite sign.
Priority: TypeAlias = Annotated[int, Field(gt=-MOST_URGENT, lt=MOST_URGENT)]


async def read_body(request: Request) -> bytes:
    """The whole body. Raises ApiError 413 beyond MAX_BODY, or ClientGone."""
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise ApiError(413, f"the body exceeds {MAX_BODY >> 20} MiB", code="body_too_large")
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(body)


def decode(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` is; of a key that comes twice the last counts.

    Raises ApiError 400.
    """
    try:
        value = from_json(body)
    except ValueError as error:
        raise refused(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise refused(f"the body must be a JSON object, not {JSON_NAMES[type(value)]}")
    return value


JSON_NAMES = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


def parse(body: bytes, form: type[Body]) -> Body:
    """`body` as a `form`: types are taken literally ("1" is no number).

    Raises ApiError 400 naming the first field at fault.
    """
    return parse_value(decode(body), form)


def parse_value(value: Any, form: type[Body]) -> Body:
    """The same of a value that was JSON."""
    try:
        return form.model_validate(value, strict=True)
    except ValidationError as error:
        raise _explain(error, value) from None


def _explain(error: ValidationError, value: Any) -> ApiError:
    """The first fault. Of a union's branches the one that understood most of the value tells it;
    those that understood as little as each other say together what is wanted.
    """
    details = error.errors(include_url=False, include_context=False, include_input=False)
    first = details[0]
    _, branch = _place(first, value)
    rivals = [each for each in details if branch and each["loc"][:branch] == first["loc"][:branch]]
    places = [(_place(each, value)[0], each) for each in rivals or [first]]
    path = max((path for path, _ in places), key=len)
    name = ".".join(path) if path else None
    faults = [each for place, each in places if place == path]
    if faults[0]["type"] == "extra_forbidden":
        return refused(f"{name} is not a field of this request", name)
    wanted, *others = dict.fromkeys(each["msg"] for each in faults)
    message = " or ".join([wanted, *(each.removeprefix("Input should be ") for each in others)])
    return refused(f"{name or 'the body'}: {message}", name)


def _place(detail: ErrorDetails, value: Any) -> tuple[tuple[str, ...], int | None]:
    """The fields and indexes that lead to an error, and where pydantic's path first has something
    else in it: the branch of a union, which a client knows nothing of.
    """
    path: list[str] = []
    branch = None
    last = len(detail["loc"]) - 1
    for depth, part in enumerate(detail["loc"]):
        try:
            value = value[part]
            path.append(str(part))
        except (KeyError, TypeError):
            if detail["type"] == "missing" and depth == last:
                path.append(str(part))
            elif branch is None:
                branch = depth
    return tuple(path), branch


def unknown_fields(extra: Mapping[str, Any] | None, strict: bool) -> list[str]:
    """Warnings for fields that nothing here knows, for routes whose clients send all sorts.

    Raises ApiError 400 for the first one when `strict` (STRICT_FIELDS, or `x-strict`).
    """
    names = sorted(extra or ())
    if names and strict:
        raise refused(f"{names[0]} is not a field of this request", names[0])
    return [f"{name} is not a field of this request and was ignored" for name in names]


def refuse_unsupported(fields: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise ApiError 400 for a field that is known and not served: `name -> (value, harmless)`."""
    for name, (value, harmless) in fields.items():
        if value is not None and value != harmless:
            raise refused(f"{name} is not supported by this server", name)


def unknown_in(form: BaseModel, unserved: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The fields of `form` that nothing here knows; `path` goes before each name.

    `unserved` names those that are known and not served, each with the value that asks for nothing
    (as null does). Raises ApiError 400 for one that asks for something.
    """
    extra = dict(form.model_extra or {})
    refuse_unsupported(
        {path + name: (extra.pop(name, None), harmless) for name, harmless in unserved.items()}
    )
    return {path + name: value for name, value in extra.items()}


@contextmanager
def in_words_of_the_client(words: Mapping[str, str]) -> Iterator[None]:
    """Let refusals name fields as the client does: `words` maps our names to theirs."""
    try:
        yield
    except RequestRefused as error:
        ours = "|".join(map(re.escape, words))
        message = re.sub(rf"\b({ours})\b", lambda found: words[found[1]], str(error))
        raise RequestRefused(message, words.get(error.param, error.param)) from None


def described(
    *forms: type[BaseModel], required: bool = True, streams: Sequence[str] = ()
) -> dict[str, Any]:
    """What /openapi.json says of a route whose body one of `forms` reads: its `openapi_extra`.

    `streams`: the media types of answers that are told piece by piece.
    """
    content = {media_type: {"schema": {"type": "string"}} for media_type in streams}
    return {
        **request_body([form.model_json_schema() for form in forms], required),
        "responses": {"200": {"content": content}},
    }


def request_body(schemas: Sequence[dict[str, Any]], required: bool = True) -> dict[str, Any]:
    """The same of a body that one of `schemas` allows."""
    inlined = [_inlined(schema) for schema in schemas]
    schema = inlined[0] if len(inlined) == 1 else {"anyOf": inlined}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": required, "content": content}}


def one_of(*names: str) -> ConfigDict:
    """The config of a form that wants one of these fields: for /openapi.json alone."""
    return ConfigDict(json_schema_extra={"anyOf": [{"required": [name]} for name in names]})


def _inlined(schema: dict[str, Any]) -> Any:
    """`schema` with its definitions where they are used: a route has no place to put them."""
    definitions = schema.pop("$defs", {})

    def inline(part: Any) -> Any:
        if isinstance(part, list):
            return [inline(each) for each in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return inline(definitions[part["$ref"].rpartition("/")[2]])
        return {name: inline(each) for name, each in part.items()}

    return inline(schema)
