"""The formats in which models write calls of tools, by the names of TOOL_PARSER."""

from __future__ import annotations

from collections.abc import Mapping

from api.tool_calls import ToolFormat
from api.tool_json import HERMES, LLAMA3_JSON, MISTRAL
from api.tool_markup import QWEN3_CODER
from api.tool_pythonic import PYTHONIC

FORMATS: Mapping[str, ToolFormat] = {
    "qwen3_coder": QWEN3_CODER,
    "hermes": HERMES,
    "mistral": MISTRAL,
    "pythonic": PYTHONIC,
    "llama3_json": LLAMA3_JSON,
}


def format_of(template: str) -> str:
    """The name of the first format whose hints are in a chat template; hermes where none is: the
    most widely learned, and the one in which tools are shown to models whose template knows none.
    """
    return next(
        (name for name, each in FORMATS.items() if any(hint in template for hint in each.hints)),
        "hermes",
    )
