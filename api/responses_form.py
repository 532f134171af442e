"""The body of `POST /v1/responses`, and what its fields mean to the engine.

A field is honoured, refused by name, or, where nothing here knows it, answered with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from api.accepting import AnsweredForm
from api.answers import Ask
from api.bodies import Form, Priority, Salt, Stops, unknown_fields, unknown_in
from api.conversation import check_template_kwargs
from api.errors import refused
from api.hearing import Hearing, Wish
from api.responses_input import Input, unknown_in_input
from api.responses_tools import ResponsesToolFields
from api.sampling_fields import SamplingDefaults, SamplingFields
from api.structured import schema_of
from backend.interface import Grammar, SamplingParams, Wants
from engine.stop_regex import stop_patterns
from engine.text import stop_strings

# Known to clients, not served here: the value that asks for nothing, besides null.
UNSERVED: Mapping[str, Any] = {
    "access_programs": None,
    "background": False,
    "background_options": None,
    "context_management": [],
    "conversation": None,
    "image": None,
    "max_tool_calls": None,
    "moderation": None,
    "prompt": None,
    "prompt_cache_options": None,
    "response_format": None,
    "structured_outputs": None,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    "max_tokens": None,
    "max_completion_tokens": None,
    "messages": None,
    "logprobs": None,
}
REASONING_UNSERVED: Mapping[str, Any] = {"context": "auto", "mode": "standard"}
STREAM_OPTIONS_UNSERVED: Mapping[str, Any] = {"include_obfuscation": False}
# Bounded as by OpenAI.
Metadata: TypeAlias = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]
LOGPROBS = "message.output_text.logprobs"
# What an answer may hold besides; the last four come from tools that are not served.
INCLUDED = (
    LOGPROBS,
    "file_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
)


class TextFormat(Form):
    """What the words of an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="changes nothing: the answer always matches")

    def grammar(self) -> Grammar | None:
        """Raises ApiError for a schema that is missing."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return schema_of({"type": "object"}, "text.format")
        if self.schema_ is None:
            raise refused("text.format.schema is missing", "text.format.schema")
        return schema_of(self.schema_, "text.format.schema")

    def echo(self) -> dict[str, Any]:
        """As an answer repeats it."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {
            "type": self.type,
            "name": self.name or "response",
            "description": self.description,
            "schema": self.schema_,
            "strict": self.strict is not False,
        }


PLAIN_TEXT = TextFormat(type="text")


class TextFields(Form):
    """How the words of an answer shall be."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Thinking(Form):
    """How the model shall think."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="templates get it as reasoning_effort; none: enable_thinking false"
    )
    summary: Literal["auto"] | None = Field(
        None, description="changes nothing: thoughts are given in full"
    )
    generate_summary: Literal["auto"] | None = Field(None, description="as summary")


class StreamOptions(Form):
    """Known to clients; nothing in it can be asked for here."""


class ResponsesFields(SamplingFields, ResponsesToolFields, AnsweredForm):
    """The body of a request. None: as if it were not there."""

    prompt_field = "input"

    model: str | None = Field(None, description="one of the names that the model is served under")
    input: Input
    instructions: str | None = Field(None, description="of this turn alone")
    previous_response_id: str | None = Field(None, description="a stored one, to continue")
    store: bool | None = Field(None, description="keep the response for later; default false")
    max_output_tokens: int | None = Field(
        None, description="default: MAX_NEW_TOKENS_DEFAULT, clamped to the room in the context"
    )
    min_tokens: int | None = Field(None, description="until then no end token is drawn")
    seed: int | None = None
    include: list[str] | None = Field(None, max_length=64, description=LOGPROBS)
    top_logprobs: int | None = Field(None, description=f"with include {LOGPROBS}")
    text: TextFields | None = None
    reasoning: Thinking | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: Metadata | None = Field(None, description="repeated in the answer")
    truncation: Literal["disabled"] | None = None
    user: str | None = Field(None, description="repeated in the answer, as are the next two")
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    cache_salt: Salt | None = Field(None, description="prefixes are shared within one salt only")
    stop_regex: Stops | None = Field(
        None, description="the text ends before what matches one of these patterns"
    )
    priority: Priority | None = Field(None, description="who waits goes by it, lower first")
    receipt: bool | None = Field(None, description="what the answer took, in the answer")

    def warnings(self, strict: bool) -> list[str]:
        if self.n not in (None, 1):
            raise refused("n is not supported by this route: there is one answer", "n")
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options is for streams: set stream to true", "stream_options")
        for place, name in enumerate(self.include or ()):
            if name not in INCLUDED:
                field = f"include.{place}"
                raise refused(f"{field}: {name!r:.80} is not supported by this server", field)
        if self.top_logprobs and not self.scored:
            message = f"top_logprobs needs {LOGPROBS!r} in include"
            raise refused(message, "top_logprobs")
        check_template_kwargs(self.chat_template_kwargs)
        return unknown_fields(self.unknown(), strict)

    def unknown(self) -> dict[str, Any]:
        """Fields that nothing here knows, by dotted name. Raises ApiError 400."""
        found = unknown_in(self, UNSERVED) | unknown_in_input(self.input) | self.unknown_in_tools()
        if self.text is not None:
            found |= unknown_in(self.text, {}, "text.")
            found |= unknown_in(self.text.format or PLAIN_TEXT, {}, "text.format.")
        if self.reasoning is not None:
            found |= unknown_in(self.reasoning, REASONING_UNSERVED, "reasoning.")
        if self.stream_options is not None:
            found |= unknown_in(self.stream_options, STREAM_OPTIONS_UNSERVED, "stream_options.")
        return found

    @property
    def scored(self) -> bool:
        """Whether the words come with log-probabilities."""
        return LOGPROBS in (self.include or ())

    @property
    def format(self) -> TextFormat:
        return (self.text and self.text.format) or PLAIN_TEXT

    def wish(self) -> Wish:
        """What is asked of the answer. Raises ApiError naming the field at fault."""
        thinking = False if self._effort == "none" else None
        return Wish(**self.wish_parts(), grammar=self.format.grammar(), thinking=thinking)

    def template_kwargs(self, wish: Wish) -> dict[str, Any]:
        """Variables of the template; those that are given by their name win."""
        effort = {} if self._effort is None else {"reasoning_effort": self._effort}
        return {**effort, **wish.template_kwargs, **(self.chat_template_kwargs or {})}

    @property
    def _effort(self) -> str | None:
        return None if self.reasoning is None else self.reasoning.effort

    def ask(self, prompt: Sequence[int], hearing: Hearing, defaults: SamplingDefaults) -> Ask:
        """What the engine is asked. Raises RequestRefused."""
        sampling = self.params(
            defaults, self.max_output_tokens, self.min_tokens, grammar=hearing.grammar
        )
        return Ask(
            prompt,
            sampling,
            stop_strings(self.stop),
            stop_regex=stop_patterns(self.stop_regex),
            seed=self.seed,
            wants=Wants(logprobs=self.scored, top=self.top_logprobs or 0),
            skip_special_tokens=hearing.skip_special_tokens
            and self.skip_special_tokens is not False,
            namespace=self.cache_salt or "",
            priority=-(self.priority or 0),  # in vLLM's words: lower goes first
        )

    def echo(self, sampling: SamplingParams) -> dict[str, Any]:
        """The fields of a request that its answer repeats, defaults filled in."""
        reasoning = self.reasoning or Thinking()
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": None,
            "metadata": self.metadata or {},
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": bool(self.store),
            "temperature": sampling.temperature,
            "text": {"format": self.format.echo(), "verbosity": "medium"},
            "top_logprobs": self.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "user": self.user,
            **self.tools_echo(),
        }
