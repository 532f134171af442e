"""What both of OpenAI's routes are asked in the same words, and what that means to the engine.

A field is honoured, refused by name, or, where nothing here knows it, answered with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from api.accepting import AnsweredForm
from api.answers import Ask
from api.bodies import (
    Form,
    Name,
    Priority,
    Salt,
    Stops,
    bounded,
    in_words_of_the_client,
    unknown_fields,
    unknown_in,
)
from api.errors import refused
from api.hearing import Hearing
from api.openai_choices import Extras
from api.sampling_fields import SamplingDefaults, SamplingFields, check_answers
from api.structured import OpenAIGrammarFields
from backend.interface import Wants
from engine.stop_regex import stop_patterns
from engine.text import stop_strings

# Known to clients, not served here: the value that asks for nothing, besides null.
UNSERVED: Mapping[str, Any] = {
    "guided_decoding_backend": None,
    "guided_whitespace_pattern": None,
    "prompt_logprobs": None,
    "return_hidden_states": False,
    "allowed_token_ids": None,
    "bad_words": [],
    "spaces_between_special_tokens": True,
    "use_beam_search": False,
    "length_penalty": 1,
    "truncate_prompt_tokens": None,
    "logits_processors": [],
    "custom_logit_processor": None,
    "custom_params": None,
    "lora_path": "",
    "prompt_cache_options": None,
    "store": False,
}
STREAM_OPTIONS_UNSERVED: Mapping[str, Any] = {"include_obfuscation": False}


class StreamOptions(Form):
    """What a stream carries besides its text."""

    include_usage: bool | None = Field(None, description="token counts in a last chunk")
    continuous_usage_stats: bool | None = Field(
        None, description="in every chunk those of its answer so far"
    )


class OpenAIFields(SamplingFields, OpenAIGrammarFields, AnsweredForm):
    """The fields of both routes. None: as if it were not there."""

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
    metadata: Annotated[dict[str, Any], BeforeValidator(bounded)] | None = Field(
        None, description="of stored answers; none are stored: a warning"
    )
    stop_regex: Stops | None = Field(
        None, description="the text ends before what matches one of these patterns"
    )
    include_stop_str_in_output: bool | None = Field(
        None, description="the text ends with what stopped it"
    )
    no_stop_trim: bool | None = Field(None, description="the same")
    priority: Priority | None = Field(None, description="who waits goes by it, lower first")
    cache_salt: Salt | None = Field(
        None, description="prefixes are shared with requests of the same salt only"
    )
    request_id: Name | None = Field(None, description="the answer's id, for its abortion")
    rid: Name | None = Field(None, description="the same")
    return_token_ids: bool | None = Field(None, description="of prompt and answer")
    return_tokens_as_token_ids: bool | None = Field(
        None, description='beside log-probabilities tokens are called "token_id:17"'
    )
    receipt: bool | None = Field(None, description="what each answer took")

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
            "rid": "request_id" if self.rid is None else "rid",
        }

    @property
    def answers_per_prompt(self) -> int:
        return self.n or 1

    @property
    def name(self) -> str | None:
        """What the client calls its answers."""
        return self.rid or self.request_id

    @property
    def shows_special_tokens(self) -> bool:
        return self.skip_special_tokens is False

    @property
    def extras(self) -> Extras:
        """What the client wants to read besides the text of its answers."""
        options = self.stream_options or StreamOptions(include_usage=None)
        return Extras(
            token_ids=bool(self.return_token_ids),
            receipt=bool(self.receipt),
            usage=bool(options.include_usage),
            continuous_usage=bool(options.continuous_usage_stats),
        )

    def wants(self) -> Wants:
        """The log-probabilities that are asked for. Raises RequestRefused."""
        raise NotImplementedError

    def warnings(self, strict: bool) -> list[str]:
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options is for streams: set stream to true", "stream_options")
        if len({self.rid, self.request_id} - {None}) > 1:
            raise refused("rid and request_id differ: give one of them", "rid")
        told = unknown_fields(self.unknown(), strict)
        if self.metadata:
            told.append("metadata is of stored answers, and no answer is stored: it was ignored")
        return told

    def unknown(self) -> dict[str, Any]:
        """Fields that nothing here knows, by dotted name. Raises ApiError 400."""
        found = unknown_in(self, self.unserved)
        if self.stream_options is not None:
            found |= unknown_in(self.stream_options, STREAM_OPTIONS_UNSERVED, "stream_options.")
        return found

    def asks(
        self, prompts: Sequence[Sequence[int]], defaults: SamplingDefaults, hearing: Hearing
    ) -> list[Ask]:
        """What the engine is asked, prompt by prompt. Raises RequestRefused."""
        check_answers(len(prompts) * self.answers_per_prompt, "n")
        with in_words_of_the_client(self.words):
            length: int | None = getattr(self, self.length_field)
            draft = Ask(
                (),
                self.params(defaults, length, self.min_tokens, hearing.grammar),
                stop_strings(self.stop),
                stop_regex=stop_patterns(self.stop_regex),
                seed=self.seed,
                n=self.answers_per_prompt,
                wants=self.wants(),
                skip_special_tokens=hearing.skip_special_tokens and not self.shows_special_tokens,
                keep_stop=bool(self.include_stop_str_in_output or self.no_stop_trim),
                namespace=self.cache_salt or "",
                priority=-(self.priority or 0),  # in vLLM's words: lower goes first
            )
        return [replace(draft, prompt=prompt) for prompt in prompts]
