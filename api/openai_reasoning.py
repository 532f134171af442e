"""What a chat's fields say of the reasoning before an answer: how much, and how it is told."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from api.bodies import Form, unknown_in
from api.errors import refused

NONE = "none"  # the effort of who does not think


class Reasoning(Form):
    """The object `reasoning` of OpenRouter's clients."""

    effort: str | None = None
    enabled: bool | None = None


class ReasoningFields(Form):
    """Mixed into the form of a chat. None: as if it were not there."""

    reasoning_effort: str | None = Field(
        None, description="a variable of the template; none: the model shall not think"
    )
    reasoning: Reasoning | None = Field(None, description="effort: the same; enabled: whether")
    separate_reasoning: bool | None = Field(
        None, description="false: thoughts stay in the text; default true"
    )
    stream_reasoning: bool | None = Field(
        None, description="false: a stream tells thoughts all at once; default true"
    )

    @property
    def effort(self) -> str | None:
        """How much the model shall think, if anything is said."""
        if self.reasoning_effort is not None:
            return self.reasoning_effort
        return None if self.reasoning is None else self.reasoning.effort

    @property
    def thinking(self) -> bool | None:
        """Whether the model shall think; None: as its template has it."""
        if self.reasoning is not None and self.reasoning.enabled is not None:
            return self.reasoning.enabled
        return False if self.effort == NONE else None

    @property
    def effort_variable(self) -> dict[str, str]:
        """What a template is told of it."""
        return {} if self.effort is None else {"reasoning_effort": self.effort}

    def unknown_in_reasoning(self) -> dict[str, Any]:
        """Fields that nothing here knows, by dotted name.

        Raises ApiError 400 for two that contradict each other.
        """
        if self.reasoning is None:
            return {}
        if len({self.reasoning_effort, self.reasoning.effort} - {None}) > 1:
            raise refused(
                "reasoning_effort and reasoning.effort differ: give one of them", "reasoning_effort"
            )
        unserved = {"exclude": False, "max_tokens": None}
        return unknown_in(self.reasoning, unserved, "reasoning.")
