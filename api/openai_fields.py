"""What both of OpenAI's routes are asked in the same words, and what that means to the engine.

A field is honoured, refused by name, or, where nothing here knows it, answered with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from fastapi import Request
from pydantic import Field

from api.answers import Ask
from api.bodies import Form, parse, read_body, unknown_fields, unknown_in
from api.errors import refused
from api.sampling_fields import SamplingDefaults, SamplingFields, check_answers
from api.service import is_strict, service_of
from engine.text import stop_strings

# Known to clients, not served here: the value that asks for nothing, besides null.
UNSERVED: Mapping[str, Any] = {
    "response_format": {"type": "text"},
    "structured_outputs": None,
    "structural_tag": None,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "guided_json": None,
    "guided_regex": None,
    "guided_choice": None,
    "guided_grammar": None,
    "guided_decoding_backend": None,
    "guided_whitespace_pattern": None,
    "prompt_logprobs": None,
    "return_token_ids": False,
    "return_tokens_as_token_ids": False,
    "return_hidden_states": False,
    "allowed_token_ids": None,
    "bad_words": [],
    "stop_regex": None,
    "include_stop_str_in_output": False,
    "no_stop_trim": False,
    "spaces_between_special_tokens": True,
    "use_beam_search": False,
    "length_penalty": 1,
    "truncate_prompt_tokens": None,
    "logits_processors": [],
    "custom_logit_processor": None,
    "custom_params": None,
    "lora_path": None,
    "priority": 0,
    "cache_salt": None,
    "request_id": None,
    "rid": None,
    "prompt_cache_options": None,
    "metadata": {},
    "store": False,
}
STREAM_OPTIONS_UNSERVED: Mapping[str, Any] = {
    "include_obfuscation": False,
    "continuous_usage_stats": False,
}


class StreamOptions(Form):
    """What a stream carries besides its text."""

    include_usage: bool | None = Field(None, description="token counts in a last chunk")


class OpenAIFields(SamplingFields):
    """The fields of both routes. None: as if it were not there."""

    prompt_field: ClassVar[str]  # that holds what is to be answered
    unserved: ClassVar[Mapping[str, Any]]

    model: str | None = Field(None, description="one of the names that the model is served under")
    max_tokens: int | None = Field(
        None, description="default: MAX_NEW_TOKENS_DEFAULT, clamped to the room in the context"
    )
    min_tokens: int | None = Field(None, description="until then no end token is drawn")
    seed: int | None = Field(None, description="answer i of n draws from seed + i")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="changes nothing, as do the next four")
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def length_field(self) -> str:
        """The field that says how long an answer may be."""
        return "max_tokens"

    @property
    def words(self) -> Mapping[str, str]:
        """What this form calls our fields."""
        return {
            "max_new_tokens": self.length_field,
            "min_new_tokens": "min_tokens",
            "prompt": self.prompt_field,
        }

    @property
    def answers_per_prompt(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def warnings(self, strict: bool) -> list[str]:
        """What the client is told of fields that nothing here knows.

        Raises ApiError 400 naming a field that is not served; when `strict`, one that is unknown.
        """
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options is for streams: set stream to true", "stream_options")
        return unknown_fields(self.unknown(), strict)

    def unknown(self) -> dict[str, Any]:
        """Fields that nothing here knows, by dotted name. Raises ApiError 400."""
        found = unknown_in(self, self.unserved)
        if self.stream_options is not None:
            found |= unknown_in(self.stream_options, STREAM_OPTIONS_UNSERVED, "stream_options.")
        return found

    def asks(self, prompts: Sequence[Sequence[int]], defaults: SamplingDefaults) -> list[Ask]:
        """What the engine is asked, prompt by prompt. Raises RequestRefused."""
        length: int | None = getattr(self, self.length_field)
        sampling = self.params(defaults, length, self.min_tokens)
        stop = stop_strings(self.stop)
        check_answers(len(prompts) * self.answers_per_prompt, "n")
        return [
            Ask(
                prompt,
                sampling,
                stop,
                self.seed,
                self.answers_per_prompt,
                skip_special_tokens=self.skip_special_tokens is not False,
            )
            for prompt in prompts
        ]


Fields = TypeVar("Fields", bound=OpenAIFields)


async def accept(request: Request, form: type[Fields]) -> tuple[Fields, list[str]]:
    """The body of a request, and what the client is to be told of it.

    Raises ApiError, or Unavailable while there is no model.
    """
    service = service_of(request)
    fields = parse(await read_body(request), form)
    service.check_model(fields.model)
    if not service.model.tokenizer.longest:
        raise refused(
            "this model has no tokenizer.json and answers in token ids: use /generate",
            form.prompt_field,
        )
    return fields, fields.warnings(is_strict(request))
