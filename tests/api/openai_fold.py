"""A reader of OpenAI's streams: puts the chunks together to the whole that they tell of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Json = dict[str, Any]


def folded(chunks: Iterable[Json]) -> Json:
    """What a whole answer would have said. Every choice must have ended exactly once."""
    reply: Json = {}
    choices: dict[int, Json] = {}
    for chunk in chunks:
        for news in chunk["choices"]:
            choice = choices.setdefault(news["index"], {"finish_reason": None})
            assert choice["finish_reason"] is None, "it had ended"
            merge(choice, {name: value for name, value in news.items() if name != "index"})
        reply |= {name: value for name, value in chunk.items() if value and name != "choices"}
    assert all(choice["finish_reason"] for choice in choices.values())
    return reply | {"choices": [settled(index, choices[index]) for index in sorted(choices)]}


def merge(whole: Json, news: Mapping[str, Any]) -> None:
    """Add what has come: texts and lists grow, calls by their index, objects by their keys."""
    for name, value in news.items():
        there = whole.get(name)
        if name == "tool_calls":
            calls = whole.setdefault(name, [])
            for call in value:
                assert call["index"] <= len(calls)
                if call["index"] == len(calls):
                    calls.append({})
                merge(calls[call["index"]], {k: v for k, v in call.items() if k != "index"})
        elif isinstance(value, dict):
            merge(whole.setdefault(name, {}) if there is not None else _put(whole, name), value)
        elif there is None or value is None:
            whole[name] = there if value is None else value
        elif isinstance(value, str | list):
            whole[name] = there + value
        else:
            assert there == value, name


def _put(whole: Json, name: str) -> Json:
    whole[name] = {}
    made: Json = whole[name]
    return made


def settled(index: int, choice: Json) -> Json:
    """A choice as a whole answer has it."""
    if "delta" in choice:
        message = {"refusal": None, **choice.pop("delta")}
        if message.get("tool_calls") and not message["content"]:
            message["content"] = None
        choice["message"] = message
    return {"index": index, **choice}


def without_names(reply: Json) -> Json:
    """What two replies to one request have in common."""
    return {k: v for k, v in reply.items() if k not in ("id", "created", "object", "warnings")}
