"""What `/v1/responses` is asked to answer: the items of `input`, and the messages they make.

    forms of a body -> items, as they are stored and listed -> messages for the template

Items have one shape wherever they come from (a body, a stored response, an answer), so one
function turns them all into messages.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, Discriminator, Field, Tag
from pydantic_core import from_json

from api.bodies import Form, unknown_in
from api.conversation import MAX_MESSAGES
from api.errors import refused
from api.response_store import Item

Status = Literal["in_progress", "completed", "incomplete"]


class TextPart(Form):
    """A part of a content."""

    unserved: ClassVar[Mapping[str, Any]] = {"prompt_cache_breakpoint": None}

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = Field(None, description="changes nothing, as do the next")
    logprobs: list[Any] | None = None


Parts: TypeAlias = Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]


def _text(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class InputForm(Form):
    """An item of `input`."""

    prefix: ClassVar[str]  # of ids
    unserved: ClassVar[Mapping[str, Any]] = {}

    id: str | None = None
    status: Status | None = Field(None, description="changes nothing")

    def item(self) -> dict[str, Any]:
        """As it is stored. One without an id gets one."""
        id = self.id or f"{self.prefix}_{secrets.token_hex(24)}"
        return {"id": id, "status": self.status or "completed", **self.said()}

    def said(self) -> dict[str, Any]:
        """What makes the item what it is."""
        raise NotImplementedError

    def unknown(self, path: str) -> dict[str, Any]:
        """Fields that nothing here knows, by dotted name. Raises ApiError for one not served."""
        found = unknown_in(self, self.unserved, path)
        for name, parts in self.parts().items():
            for place, part in enumerate(parts):
                found |= unknown_in(part, TextPart.unserved, f"{path}{name}.{place}.")
        return found

    def parts(self) -> Mapping[str, Sequence[Form]]:
        """Lists of parts by the name of their field."""
        return {}


class MessageForm(InputForm):
    """One turn."""

    prefix = "msg"

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts
    phase: str | None = Field(None, description="changes nothing")

    def said(self) -> dict[str, Any]:
        text = _text(self.content)
        part: dict[str, Any] = {"type": "input_text", "text": text}
        if self.role == "assistant":
            part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"type": "message", "role": self.role, "content": [part]}

    def parts(self) -> Mapping[str, Sequence[Form]]:
        return {} if isinstance(self.content, str) else {"content": self.content}


def _json_object(text: str) -> str:
    """`text`, if that is what it holds. Raises ValueError."""
    if not isinstance(from_json(text), dict):
        raise ValueError("it must be the text of a JSON object")
    return text


class CallForm(InputForm):
    """A call that the model has made."""

    prefix = "fc"
    unserved: ClassVar[Mapping[str, Any]] = {
        "namespace": None,
        "caller": {"type": "direct"},
        "async": False,
    }

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Annotated[str, AfterValidator(_json_object)]

    def said(self) -> dict[str, Any]:
        return self.model_dump(include={"type", "call_id", "name", "arguments"})


class CallOutputForm(InputForm):
    """What a call has brought."""

    prefix = "fco"
    unserved: ClassVar[Mapping[str, Any]] = {"namespace": None, "caller": {"type": "direct"}}

    type: Literal["function_call_output"]
    call_id: str
    output: str | Parts
    name: str | None = Field(None, description="changes nothing: the call tells it")

    def said(self) -> dict[str, Any]:
        return {"type": self.type, "call_id": self.call_id, "output": _text(self.output)}

    def parts(self) -> Mapping[str, Sequence[Form]]:
        return {} if isinstance(self.output, str) else {"output": self.output}


class ThoughtPart(Form):
    """A piece of the model's reasoning, or of a summary of it."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


Thoughts: TypeAlias = Annotated[list[ThoughtPart], Field(fail_fast=True)]


class ReasoningForm(InputForm):
    """What the model thought before it spoke or called."""

    prefix = "rs"
    unserved: ClassVar[Mapping[str, Any]] = {"encrypted_content": None}

    type: Literal["reasoning"]
    summary: Thoughts | None = None
    content: Thoughts | None = Field(None, description="where there is none the summary stands")

    def said(self) -> dict[str, Any]:
        text = "".join(part.text for part in self.content or self.summary or ())
        content = [{"type": "reasoning_text", "text": text}]
        return {"type": self.type, "summary": [], "content": content}

    def parts(self) -> Mapping[str, Sequence[Form]]:
        return {"summary": self.summary or (), "content": self.content or ()}


class ReferenceForm(Form):
    """An item of a stored response."""

    type: Literal["item_reference"] | None = None
    id: str

    def unknown(self, path: str) -> dict[str, Any]:
        """Fields that nothing here knows, by dotted name."""
        return unknown_in(self, {}, path)


KINDS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


def _kind(value: Any) -> str | None:
    """Which form reads an item. Without a type it is a message, or else the name of an item."""
    if not isinstance(value, Mapping):
        return None
    kind = value.get("type")
    if kind is None:
        kind = "message" if "role" in value or "id" not in value else "item_reference"
    return kind if kind in KINDS else None


InputItem: TypeAlias = Annotated[
    Annotated[MessageForm, Tag("message")]
    | Annotated[CallForm, Tag("function_call")]
    | Annotated[CallOutputForm, Tag("function_call_output")]
    | Annotated[ReasoningForm, Tag("reasoning")]
    | Annotated[ReferenceForm, Tag("item_reference")],
    Discriminator(
        _kind,
        custom_error_type="item_kind",
        custom_error_message=f"Input should be an item of type {', '.join(KINDS)}",
    ),
]
Input: TypeAlias = (
    str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
)


def unknown_in_input(given: Input) -> dict[str, Any]:
    """Fields that nothing here knows, by dotted name. Raises ApiError for one not served."""
    found: dict[str, Any] = {}
    for place, form in enumerate(() if isinstance(given, str) else given):
        found |= form.unknown(f"input.{place}.")
    return found


def references(given: Input) -> set[str]:
    """The items of stored responses that `given` names."""
    forms = () if isinstance(given, str) else given
    return {form.id for form in forms if isinstance(form, ReferenceForm)}


def items_of(given: Input, stored: Mapping[str, Item]) -> list[Item]:
    """The items of a request; `stored` holds those that it refers to. Raises ApiError 400 for one
    that is not there.
    """
    if isinstance(given, str):
        return [MessageForm(role="user", content=given).item()]
    found: list[Item] = []
    for place, form in enumerate(given):
        if not isinstance(form, ReferenceForm):
            found.append(form.item())
        elif form.id in stored:
            found.append(stored[form.id])
        else:
            name = f"input.{place}.id"
            raise refused(f"{name}: no item {form.id!r:.80} is stored here", name)
    return found


def check_calls(items: Sequence[Item], before: Sequence[Item]) -> None:
    """Raise ApiError 400 for the output of a call that was not made earlier."""
    made = {item["call_id"] for item in before if item["type"] == "function_call"}
    for place, item in enumerate(items):
        if item["type"] == "function_call":
            made.add(item["call_id"])
        elif item["type"] == "function_call_output" and item["call_id"] not in made:
            name = f"input.{place}.call_id"
            raise refused(f"{name}: no call {item['call_id']!r:.80} stands before it", name)


def messages_of(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The conversation in the form of OpenAI's chat.

    What the model did in a row (thoughts, words, calls) is one message. Instructions and system
    messages at the beginning are one, too: many templates know one only.
    """
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of functions, by call
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        if item["type"] == "function_call":
            names[item["call_id"]] = item["name"]
        _tell(messages, item, names)
    return [{"content": "", **message} for message in messages]  # templates search and cut it


TURN = ("reasoning_content", "content", "tool_calls")  # the order in which a model does things


def _tell(messages: list[dict[str, Any]], item: Item, names: Mapping[str, str]) -> None:
    """Add an item: to the last message, if it is the same turn, or as one more."""
    said = _MESSAGES[item["type"]](item, names)
    last: dict[str, Any] = messages[-1] if messages else {"role": None}
    if said["role"] == last["role"] == "assistant" and _continues(last, said):
        calls = [*last.get("tool_calls", ()), *said.get("tool_calls", ())]
        last |= said | ({"tool_calls": calls} if calls else {})
    elif said["role"] == last["role"] == "system" and len(messages) == 1:
        last["content"] += "\n\n" + said["content"]
    else:
        messages.append(said)


def _continues(last: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
    """Whether a model does both in one turn: several calls, or one thing after another."""
    done, next_one = (
        max(TURN.index(name) for name in TURN if name in each) for each in (last, said)
    )
    return next_one > done or next_one == done == TURN.index("tool_calls")


def _message(item: Item, _: Mapping[str, str]) -> dict[str, Any]:
    role = "system" if item["role"] == "developer" else item["role"]
    return {"role": role, "content": "".join(part["text"] for part in item["content"])}


def _call(item: Item, _: Mapping[str, str]) -> dict[str, Any]:
    """Its arguments as an object, which is what templates expect."""
    try:
        arguments = from_json(_json_object(item["arguments"]))
    except ValueError:  # the model's own call, in an answer that was cut
        message = f"input: the arguments of the call {item['call_id']!r:.80} are no JSON object"
        raise refused(message, "input") from None
    function = {"name": item["name"], "arguments": arguments}
    call = {"id": item["call_id"], "type": "function", "function": function}
    return {"role": "assistant", "tool_calls": [call]}


def _output(item: Item, names: Mapping[str, str]) -> dict[str, Any]:
    call = item["call_id"]
    return {
        "role": "tool",
        "tool_call_id": call,
        "name": names.get(call),
        "content": item["output"],
    }


def _thought(item: Item, _: Mapping[str, str]) -> dict[str, Any]:
    text = "".join(part["text"] for part in item["content"])
    return {"role": "assistant", "reasoning_content": text}


_MESSAGES = {
    "message": _message,
    "function_call": _call,
    "function_call_output": _output,
    "reasoning": _thought,
}
