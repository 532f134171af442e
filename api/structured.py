"""Fields that bind the form of an answer, and the grammar that they mean."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from api.bodies import Form
from backend.interface import Grammar


class GrammarFields(Form):
    """Of our own form, and of SGLang's `sampling_params`. At most one of them is given."""

    json_schema: str | dict[str, Any] | bool | None = Field(
        None, description="the answer is JSON that matches this JSON schema"
    )
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None

    def grammar(self, path: str = "") -> Grammar | None:
        """What they mean together; `path` goes before a field's name. Raises ApiError."""
        return None


class OpenAIGrammarFields(Form):
    """Of OpenAI's routes: `response_format`, and what vLLM and SGLang add to it."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None

    def grammar(self) -> Grammar | None:
        """What they mean together. Raises ApiError."""
        return None


async def check_grammar(grammar: Grammar | None, param: str) -> None:
    """Compile a grammar beside the event loop. Raises ApiError 400 naming `param` and the keyword
    that is at fault.
    """
