"""`continue_final_message`: the answer goes on where the conversation's last turn ends.

A mark is put behind the last turn's text, and the rendered conversation is cut there: whatever ends
a turn in the model's template is behind the mark. So nothing is known here of any template.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from api.errors import refused
from backend.interface import RequestRefused

FIELD = "continue_final_message"


@dataclass(frozen=True, slots=True)
class Continuation:
    """Of one request. Its mark stands in no conversation that was sent before."""

    mark: str = field(default_factory=lambda: f"[{secrets.token_hex(16)}]")

    def marked(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The turns, as a template takes them, with the mark behind the last one's text.

        Raises ApiError 400 unless that is an assistant's text.
        """
        *others, last = messages
        content = last.get("content")
        if last["role"] != "assistant" or not isinstance(content, str) or last.get("tool_calls"):
            raise refused(f"{FIELD} wants a last message of the assistant that is a text", FIELD)
        return [*others, {**last, "content": content + self.mark}]

    def cut(self, prompt: str) -> str:
        """The rendered conversation up to the mark. Raises RequestRefused where there is none."""
        before, mark, _ = prompt.rpartition(self.mark)
        if not mark:
            raise RequestRefused(
                f"{FIELD}: the chat template does not show the last message as it is", FIELD
            )
        return before
