"""What the model sees of an Anthropic conversation: messages in the form of OpenAI's chat.

system                         -> a system message
user: text, tool_result        -> user messages and tool messages, in their order
assistant: thinking, text,     -> one assistant message: reasoning_content, content,
           tool_use                                      tool_calls
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from api.anthropic_blocks import (
    Block,
    MessageFields,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    text_of,
)
from api.errors import refused

FAILED = "Error: "  # before the result of a call that failed: templates have no other place for it
SEAM = "\n"  # between the texts of neighbours that make one turn

Message = dict[str, Any]


def conversation(
    system: str | Sequence[TextBlock] | None, messages: Sequence[MessageFields]
) -> list[Message]:
    """The messages for the template. Raises ApiError 400 for results and calls without each other.

    Neighbours of one role are one turn.
    """
    said = _Said()
    if system:
        said.messages.append({"role": "system", "content": text_of(system)})
    for number, message in enumerate(messages):
        said.add(message, f"messages.{number}")
    said.check_answered()
    return [_merged(list(group)) for _, group in groupby(said.messages, key=_turn)]


@dataclass(slots=True)
class _Said:
    """The conversation so far."""

    messages: list[Message] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # of tools, by the id of a call
    open: dict[str, str] = field(default_factory=dict)  # calls without a result: where they stand

    def add(self, message: MessageFields, path: str) -> None:
        """One more message. Raises ApiError."""
        blocks: Sequence[Block] = (
            [TextBlock(type="text", text=message.content)]
            if isinstance(message.content, str)
            else message.content
        )
        if message.role == "assistant":
            self.messages.append(self._answer(blocks, path))
            return
        if not blocks:
            raise refused(f"{path}.content is empty: give at least one block", f"{path}.content")
        for kind, group in groupby(blocks, type):
            if kind is TextBlock:
                self.messages.append({"role": message.role, "content": _text(list(group))})
            else:
                self.messages += self._results(group, path)

    def _answer(self, blocks: Sequence[Block], path: str) -> Message:
        calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
        for call in calls:
            self.names[call.id] = call.name
            self.open[call.id] = path
        thoughts = "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
        found: Message = {"role": "assistant", "content": _text(blocks)}
        if thoughts:
            found["reasoning_content"] = thoughts
        if calls:
            found["tool_calls"] = [_call(call) for call in calls]
        return found

    def _results(self, blocks: Iterable[Block], path: str) -> Iterator[Message]:
        """Of calls that were made and are open. Raises ApiError for any other."""
        for block in blocks:
            assert isinstance(block, ToolResultBlock)  # `check_senders` has seen to it
            call = block.tool_use_id
            if self.open.pop(call, None) is None:
                name = f"{path}.tool_use_id"
                raise refused(f"{name}: no tool_use before it has the id {call!r:.80}", name)
            failed = FAILED if block.is_error else ""
            yield {
                "role": "tool",
                "tool_call_id": call,
                "name": self.names[call],
                "content": failed + text_of(block.content or ""),
            }

    def check_answered(self) -> None:
        """Raise ApiError for a call that has no result."""
        for call, path in self.open.items():
            raise refused(f"{path}: the tool_use {call!r:.80} has no tool_result after it", path)


def _text(blocks: Sequence[Block]) -> str:
    return text_of([block for block in blocks if isinstance(block, TextBlock)])


def _call(block: ToolUseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": block.input}  # an object, as templates expect it
    return {"id": block.id, "type": "function", "function": function}


def _turn(message: Message) -> tuple[str, str | None]:
    """Equal for neighbours that are one turn. Each result is a message of its own."""
    return message["role"], message.get("tool_call_id")


def _merged(parts: Sequence[Message]) -> Message:
    """The turn that neighbours make."""
    found = dict(parts[0])
    for name in ("content", "reasoning_content"):
        texts = [part[name] for part in parts if part.get(name)]
        if texts:
            found[name] = SEAM.join(texts)
    calls = [call for part in parts for call in part.get("tool_calls", ())]
    return found | ({"tool_calls": calls} if calls else {})
