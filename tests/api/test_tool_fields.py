"""OpenAI's fields of tools: each is honoured, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from api.bodies import parse
from api.errors import ApiError
from api.hearing import Named, Tool
from api.tool_fields import ToolFields


def function(name: Any = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def fields(**body: Any) -> ToolFields:
    import json

    return parse(json.dumps(body).encode(), ToolFields)


def test_tools_and_what_they_mean() -> None:
    schema = {"properties": {"a": {"type": "integer"}}}
    parts = fields(
        tools=[function(description="does", parameters=schema, strict=True), function("g")],
        tool_choice=function("g"),
        parallel_tool_calls=False,
    ).wish_parts()
    assert parts["tools"] == [
        Tool("f", "does", {"type": "object", **schema}, strict=True),
        Tool("g", None, {"type": "object", "properties": {}}),
    ]
    assert parts["choice"] == Named("g")
    assert not parts["parallel"]


def test_nothing_asked_is_nothing_wished() -> None:
    assert fields().wish_parts() == {"tools": [], "choice": "auto", "parallel": True}
    assert fields(tools=[], tool_choice=None).wish_parts()["choice"] == "auto"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": "f"}, "tools"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
    ({"tools": [function("a b")]}, "tools.0.function.name"),
    ({"tools": [function("a" * 65)]}, "tools.0.function.name"),
    ({"tools": [function(""), function()]}, "tools.0.function.name"),
    ({"tools": [function(parameters=[])]}, "tools.0.function.parameters"),
    ({"tools": [function(parameters={"type": "string"})]}, "tools.0.function.parameters"),
    ({"tools": [function(), function()]}, "tools"),
    ({"tools": [function(f"f{n}") for n in range(129)]}, "tools"),
    ({"tools": [function()], "tool_choice": function("g")}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [function()], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [function()], "tool_choice": {"type": "custom"}}, "tool_choice.type"),
    ({"tools": [function()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED)
def test_what_is_no_tool_or_no_choice_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        fields(**body).wish_parts()
    assert caught.value.status == 400
    assert (caught.value.param or "").startswith(param)


def test_unknown_fields_are_found_by_dotted_name() -> None:
    found = fields(
        tools=[{**function(color="red"), "size": 1}],
        tool_choice={"type": "function", "function": {"name": "f", "x": 1}},
    ).unknown_in_tools()
    assert sorted(found) == [
        "tool_choice.function.x",
        "tools.0.function.color",
        "tools.0.size",
    ]
