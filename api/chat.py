"""`POST /v1/chat/completions`: OpenAI's conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from api.bodies import described
from api.conversation import Messages, check_template_kwargs, unknown_in_messages
from api.errors import refused
from api.openai_answers import Wording, respond
from api.openai_fields import UNSERVED, OpenAIFields, accept
from api.service import service_of

WORDING = Wording(
    id_prefix="chatcmpl",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    all=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    more=lambda text: {"delta": {"content": text}},
    opening={"delta": {"role": "assistant", "content": ""}},
    closing={"delta": {}},
)

router = APIRouter()


class ChatFields(OpenAIFields):
    """The body of a request."""

    prompt_field = "messages"
    unserved: ClassVar[Mapping[str, Any]] = {
        **UNSERVED,
        "tools": [],
        "tool_choice": "none",
        "functions": [],
        "function_call": "none",
        "logprobs": False,
        "top_logprobs": 0,
        "modalities": ["text"],
        "audio": None,
        "prediction": None,
        "moderation": None,
        "web_search_options": None,
        "reasoning_effort": None,
        "verbosity": "medium",
        "chat_template": None,
        "documents": [],
        "continue_final_message": False,
        "add_special_tokens": False,
        "separate_reasoning": False,
        "stream_reasoning": True,
        "mm_processor_kwargs": None,
    }

    messages: Messages
    max_completion_tokens: int | None = Field(None, description="the newer name of max_tokens")
    parallel_tool_calls: bool | None = Field(None, description="changes nothing: no tools")
    add_generation_prompt: bool | None = Field(None, description="default true")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="more variables of the template, such as enable_thinking"
    )

    @property
    def length_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def warnings(self, strict: bool) -> list[str]:
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise refused(
                "max_tokens and max_completion_tokens differ: give one of them", "max_tokens"
            )
        check_template_kwargs(self.chat_template_kwargs)
        return super().warnings(strict)

    def unknown(self) -> dict[str, Any]:
        return super().unknown() | unknown_in_messages(self.messages)


@router.post("/v1/chat/completions", openapi_extra=described(ChatFields))
async def chat(request: Request) -> Response:
    """Answer a conversation: streamed as server-sent events, or whole."""
    fields, warnings = await accept(request, ChatFields)
    prompt = await service_of(request).encode_chat(
        [message.for_template() for message in fields.messages],
        add_generation_prompt=fields.add_generation_prompt is not False,
        template_kwargs=fields.chat_template_kwargs,
    )
    return await respond(request, fields, [prompt], warnings, WORDING)
