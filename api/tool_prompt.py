"""Tools for models whose chat template knows none: told in words, in the format of hermes.

The tools stand in the system's message, calls in the assistant's, results in the user's, worded as
in the templates of Qwen and Hermes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

TOOLS = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
CALL = "<tool_call>\n{call}\n</tool_call>"
RESULT = "<tool_response>\n{result}\n</tool_response>"


def in_words(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> list[Message]:
    """A conversation with tools as one that any template can render."""
    told: list[Message] = []
    for message in messages:
        if message.get("tool_calls"):
            told.append(_with_calls(message))
        elif message["role"] == "tool":
            _append_result(told, RESULT.format(result=message.get("content") or ""))
        else:
            told.append(message)
    return told if not tools else _with_tools(told, tools)


def _with_calls(message: Message) -> Message:
    calls = [
        CALL.format(call=_json({key: call["function"].get(key) for key in ("name", "arguments")}))
        for call in message["tool_calls"]
    ]
    content = [message["content"]] if message.get("content") else []
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join([*content, *calls])}


def _append_result(told: list[Message], result: str) -> None:
    """Results that follow each other stand in one message: templates want roles to alternate."""
    last = told[-1] if told else {}
    if last.get("role") == "user" and last["content"].startswith("<tool_response>"):
        told[-1] = {**last, "content": f"{last['content']}\n{result}"}
    else:
        told.append({"role": "user", "content": result})


def _with_tools(told: list[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    system = TOOLS.format(tools="\n".join(map(_json, tools)))
    if told and told[0]["role"] == "system":
        first, *others = told
        return [{**first, "content": f"{first['content']}\n\n{system}"}, *others]
    return [{"role": "system", "content": system}, *told]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
