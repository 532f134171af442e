"""`POST /v1/chat/completions`: OpenAI's conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from api.accepting import accept
from api.answers import Answer
from api.bodies import described
from api.continuation import FIELD, Continuation
from api.conversation import Messages, check_template_kwargs, unknown_in_messages
from api.errors import refused
from api.events import EVENT_STREAM
from api.hearing import Hearing, Wish, listen
from api.openai_answers import Telling, Wording, respond
from api.openai_fields import UNSERVED, OpenAIFields
from api.openai_logprobs import ChatShape, Scores, Spelling
from api.openai_messages import ChatSpeech, words
from api.openai_reasoning import ReasoningFields
from api.service import Service, service_of
from api.structured import check_grammar
from api.tool_fields import ToolFields
from backend.interface import Wants
from backend.tokenizer import Tokenizer

WORDING = Wording(
    id_prefix="chatcmpl",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    more=words,
    opening={"delta": {"role": "assistant", "content": ""}},
    closing={"delta": {}},
    prompt_ids_in_choice=False,
)

router = APIRouter()


class ChatFields(OpenAIFields, ToolFields, ReasoningFields):
    """The body of a request."""

    prompt_field = "messages"
    unserved: ClassVar[Mapping[str, Any]] = {
        **UNSERVED,
        "functions": [],
        "function_call": "none",
        "modalities": ["text"],
        "audio": None,
        "prediction": None,
        "moderation": None,
        "web_search_options": None,
        "verbosity": "medium",
        "echo": False,
        "chat_template": None,
        "documents": [],
        "add_special_tokens": False,
        "mm_processor_kwargs": None,
    }

    messages: Messages
    max_completion_tokens: int | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = Field(None, description="of each token of the answer")
    top_logprobs: int | None = Field(None, description="0 to 20: of so many most probable ones too")
    add_generation_prompt: bool | None = Field(None, description="default true")
    continue_final_message: bool | None = Field(
        None, description="the answer goes on where the last message ends"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="more variables of the template, such as enable_thinking"
    )

    @property
    def length_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def wants(self) -> Wants:
        return Wants(bool(self.logprobs), top=self.top_logprobs or 0)

    def warnings(self, strict: bool) -> list[str]:
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise refused(
                "max_tokens and max_completion_tokens differ: give one of them", "max_tokens"
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise refused(f"{FIELD} and add_generation_prompt exclude each other", FIELD)
        check_template_kwargs(self.chat_template_kwargs)
        return super().warnings(strict)

    def unknown(self) -> dict[str, Any]:
        return (
            super().unknown()
            | unknown_in_messages(self.messages)
            | self.unknown_in_tools()
            | self.unknown_in_reasoning()
        )

    def wish(self) -> Wish:
        """What is asked of the form of the answer. Raises ApiError."""
        return Wish(
            **self.wish_parts(),
            grammar=self.grammar(),
            separate_reasoning=self.separate_reasoning is not False,
            thinking=self.thinking,
        )


async def _render(service: Service, fields: ChatFields, wish: Wish) -> list[int]:
    """The ids of the conversation, as the model sees it. Raises ApiError or RequestRefused."""
    messages = [message.for_template() for message in fields.messages]
    continuation = Continuation() if fields.continue_final_message else None
    return await service.encode_chat(
        messages if continuation is None else continuation.marked(messages),
        tools=wish.shown,
        add_generation_prompt=not continuation and fields.add_generation_prompt is not False,
        template_kwargs={
            **wish.template_kwargs,
            **fields.effort_variable,
            **(fields.chat_template_kwargs or {}),
        },
        edit=None if continuation is None else continuation.cut,
    )


def _telling(fields: ChatFields, hearing: Hearing, tokenizer: Tokenizer) -> Telling:
    streams_thoughts = fields.stream_reasoning is not False

    def speech(answer: Answer) -> ChatSpeech:
        return ChatSpeech(hearing.open_ear(), streams_thoughts)

    def scores(answer: Answer) -> Scores:
        spelling = Spelling(tokenizer, bool(fields.return_tokens_as_token_ids))
        return Scores(ChatShape(spelling), answer)

    return Telling(
        WORDING, fields.extras, speech, scores if fields.logprobs else None, plain=hearing.plain
    )


@router.post("/v1/chat/completions", openapi_extra=described(ChatFields, streams=[EVENT_STREAM]))
async def chat(request: Request) -> Response:
    """Answer a conversation: streamed as server-sent events, or whole."""
    service = service_of(request)
    fields, warnings = await accept(request, ChatFields)
    wish = fields.wish()
    await check_grammar(wish.grammar, fields.grammar_field)
    prompt = await _render(service, fields, wish)
    hearing = await listen(service, prompt, wish)
    asks = fields.asks([prompt], service.model.defaults, hearing)
    return await respond(
        request, fields, asks, warnings, _telling(fields, hearing, service.model.tokenizer)
    )
