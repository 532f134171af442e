"""OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`, and what they mean to a `Wish`.

Mixed into the form of a chat. Surfaces with shapes of their own make `Tool`s themselves and share
the bounds here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict

from pydantic import Field

from api.bodies import Form, unknown_in
from api.errors import refused
from api.hearing import Named, Tool

MAX_TOOLS = 128
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


class FunctionFields(Form):
    """What a tool is called and takes."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema of an object")
    strict: bool | None = None


class FunctionTool(Form):
    """A tool of a request."""

    type: Literal["function"]
    function: FunctionFields


class FunctionName(Form):
    """The function that is chosen."""

    name: str


class NamedChoice(Form):
    """The one tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class WishParts(TypedDict):
    """The fields of a `Wish` that tools decide."""

    tools: Sequence[Tool]
    choice: Literal["auto", "none", "required"] | Named
    parallel: bool


class ToolFields(Form):
    """The fields of a conversation that may call tools. None: as if it were not there."""

    tools: Annotated[list[FunctionTool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = Field(
        None, description="default: auto where there are tools; none: they are not shown either"
    )
    parallel_tool_calls: bool | None = Field(
        None, description="false: one call in an answer that must call; default true"
    )

    def wish_parts(self) -> WishParts:
        """What is asked for, for `Wish(**parts, ...)`. Raises ApiError 400 naming the field."""
        tools = [
            make_tool(
                each.function.name,
                each.function.description,
                each.function.parameters,
                bool(each.function.strict),
                f"tools.{place}.function",
            )
            for place, each in enumerate(self.tools or ())
        ]
        check_tools(tools, "tools")
        choice = self._choice()
        check_choice(choice, tools, "tool_choice")
        return {
            "tools": tools,
            "choice": choice,
            "parallel": self.parallel_tool_calls is not False,
        }

    def unknown_in_tools(self) -> dict[str, Any]:
        """Fields that nothing here knows, by dotted name. Raises ApiError 400."""
        found: dict[str, Any] = {}
        for place, tool in enumerate(self.tools or ()):
            found |= unknown_in(tool, {}, f"tools.{place}.")
            found |= unknown_in(tool.function, {}, f"tools.{place}.function.")
        if isinstance(self.tool_choice, NamedChoice):
            found |= unknown_in(self.tool_choice, {}, "tool_choice.")
            found |= unknown_in(self.tool_choice.function, {}, "tool_choice.function.")
        return found

    def _choice(self) -> Literal["auto", "none", "required"] | Named:
        if isinstance(self.tool_choice, NamedChoice):
            return Named(self.tool_choice.function.name)
        return self.tool_choice or "auto"


def make_tool(
    name: str,
    description: str | None,
    parameters: Mapping[str, Any] | None,
    strict: bool,
    path: str,
) -> Tool:
    """A tool; `path` is where a request says it. Raises ApiError 400 for what is no function."""
    if not NAME.fullmatch(name):
        raise refused(
            f"{path}.name must be 1 to 64 letters, digits, _, . or -, got {name!r:.80}",
            f"{path}.name",
        )
    schema = parameters or NO_PARAMETERS
    if schema.get("type", "object") != "object":
        raise refused(
            f"{path}.parameters must be a JSON schema of type object, got {schema['type']!r:.80}",
            f"{path}.parameters",
        )
    return Tool(name, description, {"type": "object", **schema}, strict)


def check_tools(tools: Sequence[Tool], param: str) -> None:
    """Raise ApiError 400 for more tools than MAX_TOOLS, or two of one name."""
    if len(tools) > MAX_TOOLS:
        raise refused(f"{param} has {len(tools)} tools, {MAX_TOOLS} are allowed", param)
    names: set[str] = set()
    for tool in tools:
        if tool.name in names:
            raise refused(f"{param} has two tools named {tool.name!r}", param)
        names.add(tool.name)


def check_choice(
    choice: Literal["auto", "none", "required"] | Named, tools: Sequence[Tool], param: str
) -> None:
    """Raise ApiError 400 for a choice that `tools` do not allow."""
    if isinstance(choice, Named) and all(tool.name != choice.name for tool in tools):
        raise refused(f"{param}: there is no tool named {choice.name!r:.80}", param)
    if choice == "required" and not tools:
        raise refused(f"{param} is required, and there are no tools", param)
