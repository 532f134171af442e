"""The content of Anthropic's messages as clients send it: blocks, and who may send which.

`Known` is an object of a request that says itself which fields are known and not served;
`unknown_below` looks through a whole tree of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from api.bodies import Form, unknown_in
from api.conversation import MAX_MESSAGES
from api.errors import refused


class Known(Form):
    """An object of a request."""

    # Known to clients, not served here: the value that asks for nothing, besides null.
    unserved: ClassVar[Mapping[str, Any]] = {}


def unknown_below(form: Known, path: str = "") -> dict[str, Any]:
    """The fields of `form`, and of every object in it, that nothing here knows, by dotted name.

    Raises ApiError 400 for a field that is not served.
    """
    found = unknown_in(form, form.unserved, path)
    for name in type(form).model_fields:
        value = getattr(form, name)
        if isinstance(value, Known):
            found |= unknown_below(value, f"{path}{name}.")
        elif isinstance(value, list):
            for place, each in enumerate(value):
                if isinstance(each, Known):
                    found |= unknown_below(each, f"{path}{name}.{place}.")
    return found


class CacheControl(Known):
    """A mark where a prefix ends that is worth keeping. Here every prefix is kept."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = Field(None, description="changes nothing")


class Block(Known):
    """A part of a content."""

    sender: ClassVar[str | None] = None  # the only role that may send it

    cache_control: CacheControl | None = Field(
        None, description="changes nothing: caching is automatic"
    )


class TextBlock(Block):
    """Words."""

    unserved: ClassVar[Mapping[str, Any]] = {"citations": []}

    type: Literal["text"]
    text: str


class ToolUseBlock(Block):
    """A call, as the model made it."""

    sender = "assistant"
    unserved: ClassVar[Mapping[str, Any]] = {"caller": {"type": "direct"}, "toolset_name": None}

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


def _served(value: Any) -> Any:
    """Refuse by name a block of a type that is not served."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in KINDS:
        raise PydanticCustomError(
            "block_type",
            "blocks of type {kind} are not supported by this server",
            {"kind": repr(kind)[:80]},
        )
    return value


TextBlocks: TypeAlias = Annotated[
    list[Annotated[TextBlock, BeforeValidator(_served)]], Field(fail_fast=True)
]


class ToolResultBlock(Block):
    """What came of a call."""

    sender = "user"
    unserved: ClassVar[Mapping[str, Any]] = {"toolset_name": None}

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | TextBlocks | None = None
    is_error: bool | None = Field(None, description="the model is told that the call failed")


class ThinkingBlock(Block):
    """Thoughts before an answer, as a server gave them."""

    sender = "assistant"

    type: Literal["thinking"]
    thinking: str
    signature: str | None = Field(None, description="is not looked at")


class RedactedThinkingBlock(Block):
    """Thoughts that only the server which gave them can read: left out."""

    sender = "assistant"

    type: Literal["redacted_thinking"]
    data: str


# A branch of the union is called as no field is, so that a refusal's path leads to the field.
KINDS = {
    "text": "a text block",
    "tool_use": "a call",
    "tool_result": "a result",
    "thinking": "thoughts",
    "redacted_thinking": "hidden thoughts",
}


def _kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return KINDS.get(kind) if isinstance(kind, str) else None


AnyBlock: TypeAlias = Annotated[
    Annotated[TextBlock, Tag("a text block")]
    | Annotated[ToolUseBlock, Tag("a call")]
    | Annotated[ToolResultBlock, Tag("a result")]
    | Annotated[ThinkingBlock, Tag("thoughts")]
    | Annotated[RedactedThinkingBlock, Tag("hidden thoughts")],
    Discriminator(
        _kind,
        custom_error_type="block",
        custom_error_message="must be an object with a type, such as text",
    ),
    BeforeValidator(_served),
]


class MessageFields(Known):
    """One turn, or a part of it: neighbours of one role are one turn."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[AnyBlock], Field(fail_fast=True)]


Messages = Annotated[
    list[MessageFields], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]


def check_senders(messages: Sequence[MessageFields]) -> None:
    """Raise ApiError 400 for a block that is not for its message's role to send."""
    for number, message in enumerate(messages):
        for place, block in enumerate(message.content if isinstance(message.content, list) else ()):
            if block.sender not in (None, message.role):
                path = f"messages.{number}.content.{place}"
                raise refused(f"{path}: blocks of type {block.type} come from {block.sender}", path)


def text_of(content: str | Sequence[TextBlock]) -> str:
    """Blocks of words as one text: their concatenation."""
    return content if isinstance(content, str) else "".join(block.text for block in content)
