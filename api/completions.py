"""`POST /v1/completions`: OpenAI's text completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from api.accepting import accept
from api.answers import Answer, Piece
from api.bodies import described
from api.errors import refused
from api.events import EVENT_STREAM
from api.hearing import Hearing
from api.openai_answers import Telling, Wording, respond
from api.openai_choices import Part, Phrase
from api.openai_fields import UNSERVED, OpenAIFields
from api.openai_logprobs import CompletionShape, Offsets, Scores, Spelling
from api.prompts import Prompt, encode_prompts
from api.service import service_of
from api.structured import check_grammar
from backend.interface import NOTHING_MORE, Wants
from backend.tokenizer import Tokenizer
from engine.text import decode


def _text(text: str) -> Part:
    return {"text": text}


WORDING = Wording(
    id_prefix="cmpl",
    whole="text_completion",
    chunk="text_completion",
    more=_text,
    opening=None,
    closing={"text": ""},
    prompt_ids_in_choice=True,
)

router = APIRouter()


class CompletionFields(OpenAIFields):
    """The body of a request."""

    prompt_field = "prompt"
    unserved: ClassVar[Mapping[str, Any]] = {**UNSERVED, "suffix": "", "add_special_tokens": True}

    prompt: Prompt
    echo: bool | None = Field(
        None, description="the text begins with the prompt; its log-probabilities as logprobs says"
    )
    logprobs: int | None = Field(
        None, description="0 to 20: of each token, and of so many most probable ones"
    )
    best_of: int | None = Field(None, description="as many as n: more are a 400")

    @property
    def words(self) -> Mapping[str, str]:
        return {**super().words, "top_logprobs": "logprobs"}

    def wants(self) -> Wants:
        if self.logprobs is None:
            return NOTHING_MORE
        return Wants(True, prompt_logprobs_from=0 if self.echo else None, top=self.logprobs)

    def warnings(self, strict: bool) -> list[str]:
        if self.best_of not in (None, self.answers_per_prompt):
            raise refused("best_of other than n is not served: ask for n answers", "best_of")
        return super().warnings(strict)


@dataclass(slots=True)
class TextSpeech:
    """An answer that is its text, behind the prompt where that is echoed."""

    silence: ClassVar[Part] = {"text": ""}
    calls: ClassVar[int] = 0
    reasoning_tokens: ClassVar[int] = 0

    echo: str = ""  # until it is told

    def more(self, piece: Piece) -> Sequence[tuple[Phrase, str]]:
        text, self.echo = self.echo + piece.text, ""
        return [(_text, text)] if text else []

    def all(self, piece: Piece) -> Part:
        return {"text": self.echo + piece.text}


def _telling(fields: CompletionFields, tokenizer: Tokenizer) -> Telling:
    skip = not fields.shows_special_tokens

    @lru_cache(maxsize=1)  # the answers of one prompt stand side by side
    def text_of(prompt: tuple[int, ...]) -> str:
        return decode(tokenizer, prompt, skip_special_tokens=skip)

    def speech(answer: Answer) -> TextSpeech:
        return TextSpeech(text_of(answer.live.submission.prompt) if fields.echo else "")

    def scores(answer: Answer) -> Scores:
        echoed = len(answer.live.submission.prompt) if fields.echo else 0
        spelling = Spelling(tokenizer, bool(fields.return_tokens_as_token_ids))
        return Scores(CompletionShape(spelling, Offsets(tokenizer, skip, echoed)), answer)

    return Telling(
        WORDING,
        fields.extras,
        speech,
        None if fields.logprobs is None else scores,
        plain=not fields.echo,
    )


@router.post("/v1/completions", openapi_extra=described(CompletionFields, streams=[EVENT_STREAM]))
async def completions(request: Request) -> Response:
    """Continue each prompt: streamed as server-sent events, or whole."""
    service = service_of(request)
    fields, warnings = await accept(request, CompletionFields)
    grammar = fields.grammar()
    await check_grammar(grammar, fields.grammar_field)
    prompts = await encode_prompts(service, fields.prompt, fields.prompt_field)
    asks = fields.asks(prompts, service.model.defaults, Hearing(grammar=grammar))
    return await respond(request, fields, asks, warnings, _telling(fields, service.model.tokenizer))
