"""The tools of `/v1/responses`: flatter than those of a chat, and they mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from api.bodies import Form, unknown_in
from api.errors import refused
from api.hearing import Named, Tool
from api.tool_fields import WishParts, check_choice, check_tools, make_tool

# Known to clients, not served here: as in `api/responses_form.py`.
TOOL_UNSERVED: Mapping[str, Any] = {
    "allowed_callers": ["direct"],
    "async": False,
    "defer_loading": False,
    "output_schema": None,
}


def _served(kind: Any) -> Any:
    """Refuse by name what runs on OpenAI's own machines."""
    if isinstance(kind, str) and kind != "function":
        message = "{kind} is not supported by this server: give tools of type function"
        raise PydanticCustomError("tool_kind", message, {"kind": f"{kind!r:.80}"})
    return kind


class FunctionTool(Form):
    """A function that the model may call."""

    type: Annotated[Literal["function"], BeforeValidator(_served)]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema of an object")
    strict: bool | None = Field(None, description="arguments match always; default false")

    def tool(self, path: str) -> Tool:
        """As an answer's hearing knows it. Raises ApiError 400 for what is no function."""
        return make_tool(self.name, self.description, self.parameters, bool(self.strict), path)

    def echo(self) -> dict[str, Any]:
        """As an answer repeats it."""
        return {
            "type": self.type,
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": bool(self.strict),
        }


class FunctionName(Form):
    """A tool by its name."""

    type: Literal["function"]
    name: str

    def echo(self) -> dict[str, Any]:
        """As an answer repeats it."""
        return {"type": self.type, "name": self.name}


class AllowedTools(Form):
    """Some of the tools: the others are as if they were not there."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionName], Field(min_length=1, fail_fast=True)]

    def echo(self) -> dict[str, Any]:
        """As an answer repeats it."""
        return {"type": self.type, "mode": self.mode, "tools": [each.echo() for each in self.tools]}


Choice: TypeAlias = Literal["auto", "none", "required"]


class ResponsesToolFields(Form):
    """The fields of a request that are about tools. None: as if it were not there."""

    tools: Annotated[list[FunctionTool], Field(fail_fast=True)] | None = None
    tool_choice: Choice | FunctionName | AllowedTools | None = Field(
        None, description="default: auto; none: the model is not shown the tools either"
    )
    parallel_tool_calls: bool | None = Field(
        None, description="false: one call in an answer that must call; default true"
    )

    def wish_parts(self) -> WishParts:
        """What is asked for, for `Wish(**parts, ...)`. Raises ApiError 400 naming the field."""
        tools = [each.tool(f"tools.{place}") for place, each in enumerate(self.tools or ())]
        check_tools(tools, "tools")
        if isinstance(self.tool_choice, AllowedTools):
            tools = _allowed(self.tool_choice, tools)
        choice = self._choice()
        check_choice(choice, tools, "tool_choice")
        parallel = self.parallel_tool_calls is not False
        return {"tools": tools, "choice": choice, "parallel": parallel}

    def unknown_in_tools(self) -> dict[str, Any]:
        """Fields that nothing here knows, by dotted name. Raises ApiError 400."""
        found: dict[str, Any] = {}
        for place, tool in enumerate(self.tools or ()):
            found |= unknown_in(tool, TOOL_UNSERVED, f"tools.{place}.")
        if isinstance(self.tool_choice, Form):
            found |= unknown_in(self.tool_choice, {}, "tool_choice.")
        return found

    def tools_echo(self) -> dict[str, Any]:
        """As an answer repeats them."""
        choice = self.tool_choice or "auto"
        return {
            "tools": [each.echo() for each in self.tools or ()],
            "tool_choice": choice if isinstance(choice, str) else choice.echo(),
            "parallel_tool_calls": self.parallel_tool_calls is not False,
        }

    def _choice(self) -> Choice | Named:
        if isinstance(self.tool_choice, FunctionName):
            return Named(self.tool_choice.name)
        if isinstance(self.tool_choice, AllowedTools):
            return self.tool_choice.mode
        return self.tool_choice or "auto"


def _allowed(choice: AllowedTools, tools: list[Tool]) -> list[Tool]:
    """Raises ApiError 400 for a name that no tool has."""
    names = {tool.name for tool in tools}
    for place, each in enumerate(choice.tools):
        if each.name not in names:
            field = f"tool_choice.tools.{place}.name"
            raise refused(f"{field}: there is no tool named {each.name!r:.80}", field)
    allowed = {each.name for each in choice.tools}
    return [tool for tool in tools if tool.name in allowed]
