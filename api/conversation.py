"""Conversations as OpenAI's clients write them, and the prompt that the model's template makes.

A content of several text parts is their concatenation: templates are handed plain text. The role
`developer` is OpenAI's newer name for `system`, which is the one that templates know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import from_json

from api.bodies import Form, unknown_in
from api.errors import refused

# Known to clients, not served here: as in `api/openai_fields.py`.
UNSERVED: Mapping[str, Any] = {
    "function_call": None,
    "refusal": None,
    "audio": None,
    "annotations": [],
}
# Variables of a template that the request sets by fields of its own; `self` is the template.
RESERVED = ("messages", "tools", "add_generation_prompt", "self")
MAX_CALLS = 128  # of one turn


class TextPart(Form):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


def _arguments(given: Any) -> Any:
    """An object, as templates expect it, where its text is given; null and "" are an empty one."""
    if not isinstance(given, str):
        return {} if given is None else given
    try:
        return from_json(given or "{}")
    except ValueError as error:
        raise ValueError(f"not the text of a JSON object: {error}") from None


class CalledFunction(Form):
    """What was called."""

    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)] = Field(
        default_factory=dict, description="an object, or its text"
    )


class Call(Form):
    """A call of a tool, in a turn of the assistant."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """Plain values."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        named = {} if self.id is None else {"id": self.id}
        return {**named, "type": self.type, "function": function}


class ChatMessage(Form):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = Field(
        None, description="parts are concatenated; null beside tool_calls"
    )
    tool_calls: Annotated[list[Call], Field(max_length=MAX_CALLS, fail_fast=True)] | None = Field(
        None, description="of an assistant's turn"
    )
    name: str | None = Field(None, description="for templates that show it, as are the next three")
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def for_template(self) -> dict[str, Any]:
        """Plain values, the content one text."""
        parts = self.content if isinstance(self.content, list) else None
        content = self.content if parts is None else "".join(part.text for part in parts)
        calls = [call.for_template() for call in self.tool_calls or ()]
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": content or "",  # beside calls null, which templates would search and cut
            "tool_calls": calls or None,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content,
            "reasoning": self.reasoning,
        }


MAX_MESSAGES = 16_384  # of one conversation

Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]


def unknown_in_messages(messages: Sequence[ChatMessage]) -> dict[str, Any]:
    """Fields that nothing here knows, by dotted name.

    Raises ApiError 400 for one that is not served, and for a message without a content.
    """
    found: dict[str, Any] = {}
    for number, message in enumerate(messages):
        path = f"messages.{number}."
        found |= unknown_in(message, UNSERVED, path)
        if message.tool_calls and message.role != "assistant":
            raise refused(
                f"{path}tool_calls are the assistant's, not of role {message.role}",
                f"{path}tool_calls",
            )
        if message.content is None and not message.tool_calls:
            raise refused(f"{path}content must be a text or text parts", f"{path}content")
        for place, call in enumerate(message.tool_calls or ()):
            found |= unknown_in(call, {"custom": None}, f"{path}tool_calls.{place}.")
            found |= unknown_in(call.function, {}, f"{path}tool_calls.{place}.function.")
        for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
            found |= unknown_in(part, {}, f"{path}content.{place}.")
    return found


def check_template_kwargs(given: Mapping[str, Any] | None) -> None:
    """Raise ApiError 400 for a variable that is not for clients to set."""
    for name in RESERVED:
        if name in (given or ()):
            field = f"chat_template_kwargs.{name}"
            raise refused(f"{field} is not for clients to set: leave it out", field)
