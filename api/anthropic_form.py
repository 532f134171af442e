"""The body of Anthropic's `/v1/messages`, and what its fields mean to the engine.

A field is honoured, refused by name, or, where nothing here knows it, answered with a warning.
Sampling fields that Anthropic does not have (`min_p`, `seed`, ...) mean what they mean elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from api.accepting import AnsweredForm
from api.answers import Ask
from api.anthropic_blocks import (
    CacheControl,
    Known,
    Messages,
    TextBlocks,
    check_senders,
    unknown_below,
)
from api.bodies import Priority, Salt, unknown_fields
from api.errors import ApiError, refused
from api.hearing import Hearing, Named, Tool, Wish
from api.sampling_fields import SamplingDefaults, SamplingFields
from api.structured import schema_of
from api.tool_fields import check_choice, check_tools, make_tool
from backend.interface import Grammar
from backend.tokenizer import Tokenizer


def _client_tool(value: Any) -> Any:
    """Refuse by name a tool that Anthropic's servers would run, or that only its models know."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in (None, "custom"):
        raise PydanticCustomError(
            "tool_type",
            "tools of type {kind} are not supported by this server: give name, description and "
            "input_schema",
            {"kind": repr(kind)[:80]},
        )
    return value


def _of_an_object(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type", "object") != "object":
        raise PydanticCustomError("schema_type", "must be a JSON schema of type object")
    return schema


class ToolFields(Known):
    """A function that the client would run."""

    unserved: ClassVar[Mapping[str, Any]] = {
        "allowed_callers": ["direct"],
        "defer_loading": False,
        "input_examples": [],
    }

    name: str
    description: str | None = None
    input_schema: Annotated[dict[str, Any], AfterValidator(_of_an_object)]
    type: Literal["custom"] | None = None
    strict: bool | None = Field(None, description="calls match the schema also with choice auto")
    eager_input_streaming: bool | None = Field(None, description="changes nothing: always so")
    cache_control: CacheControl | None = None

    def tool(self, path: str) -> Tool:
        """Raises ApiError for a name that is none."""
        return make_tool(self.name, self.description, self.input_schema, bool(self.strict), path)


class ToolChoice(Known):
    """Whether and what the model shall call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="of the tool, with type tool")
    disable_parallel_tool_use: bool | None = Field(None, description="one call at most")

    def choice(self) -> Literal["auto", "required", "none"] | Named:
        """Raises ApiError for a name that is missing, or should be."""
        if (self.type == "tool") != (self.name is not None):
            wanted = "is missing" if self.name is None else f"is not for type {self.type}"
            raise refused(f"tool_choice.name {wanted}", "tool_choice.name")
        return Named(self.name) if self.name is not None else CHOICES[self.type]


CHOICES: Mapping[str, Literal["auto", "required", "none"]] = {
    "auto": "auto",
    "any": "required",
    "none": "none",
}


class ThinkingFields(Known):
    """Whether the model shall think before it answers."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1, description="with enabled; not enforced")
    display: Literal["summarized", "omitted"] | None = Field(
        None, description="omitted: thoughts are not shown; else they are shown in full"
    )


class OutputFormat(Known):
    """What the words of the answer must be."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Known):
    """How the answer shall be."""

    unserved: ClassVar[Mapping[str, Any]] = {"effort": "high"}

    format: OutputFormat | None = None


class Metadata(Known):
    """Who asks, for Anthropic's own records."""

    user_id: str | None = Field(None, description="changes nothing")


def _threadless() -> ApiError:
    """Tells Anthropic's client, in words that it understands, to send whole conversations."""
    message = "thread is not supported by this server: send the whole conversation"
    details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return ApiError(400, message, param="thread", more={"details": details})


class CountFields(SamplingFields, Known, AnsweredForm):
    """The body of a request that counts. None: as if it were not there."""

    prompt_field = "messages"
    unserved: ClassVar[Mapping[str, Any]] = {
        "stop": [],
        "stop_regex": [],
        "billing_policy": None,
        "compaction": None,
        "container": None,
        "context_management": {"edits": []},
        "diagnostics": None,
        "fallback_credit_token": None,
        "fallbacks": None,
        "inference_geo": None,
        "mcp_servers": [],
        "speed": "standard",
        "user_profile_id": None,
        "workspace_id": None,
    }

    model: str = Field(description="one of the names that the model is served under")
    messages: Messages
    max_tokens: int | None = Field(None, ge=0)
    system: str | TextBlocks | None = None
    stop: Annotated[list[str], Field(fail_fast=True)] | None = Field(None, alias="stop_sequences")
    n: Literal[1] | None = Field(None, description="there is one answer")
    temperature: float | None = Field(None, ge=0, le=1)
    stream: bool | None = None
    tools: (
        Annotated[list[Annotated[ToolFields, BeforeValidator(_client_tool)]], Field(fail_fast=True)]
        | None
    ) = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingFields | None = Field(None, description="default: disabled")
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(None, description="older: output_config.format")
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = Field(
        None, description="changes nothing"
    )
    thread: dict[str, Any] | None = Field(None, description="refused: nothing is kept here")
    cache_control: CacheControl | None = None
    seed: int | None = None
    cache_salt: Salt | None = Field(None, description="prefixes are shared within one salt only")
    priority: Priority | None = Field(None, description="higher goes first")
    receipt: bool | None = Field(None, description="what the answer took, in the answer")

    def warnings(self, strict: bool) -> list[str]:
        if self.thread is not None:
            raise _threadless()
        check_senders(self.messages)
        return unknown_fields(unknown_below(self), strict) + self._of_the_budget()

    def _of_the_budget(self) -> list[str]:
        """Raises ApiError for a budget without its use, or the reverse, or without an answer."""
        name = "thinking.budget_tokens"
        kind = "disabled" if self.thinking is None else self.thinking.type
        budget = None if self.thinking is None else self.thinking.budget_tokens
        if (kind == "enabled") != (budget is not None):
            wanted = "is missing" if budget is None else f"is not for type {kind}"
            raise refused(f"{name} {wanted}", name)
        if budget is None:
            return []
        if self.max_tokens is not None and budget >= self.max_tokens:
            raise refused(f"{name} must be less than max_tokens ({self.max_tokens:,})", name)
        return [f"{name} is not enforced: max_tokens bounds thoughts and answer together"]

    def wish(self) -> Wish:
        """What is asked of the answer. Raises ApiError naming the field at fault."""
        tools = [each.tool(f"tools.{place}") for place, each in enumerate(self.tools or ())]
        check_tools(tools, "tools")
        choice = "auto" if self.tool_choice is None else self.tool_choice.choice()
        check_choice(choice, tools, "tool_choice")
        parallel = self.tool_choice is None or not self.tool_choice.disable_parallel_tool_use
        # Unasked for there are no thoughts: clients read the first block as the answer.
        thinking = THINKING[self.thinking.type if self.thinking else "disabled"]
        return Wish(tools, choice, parallel, self._grammar(), thinking=thinking)

    @property
    def format_field(self) -> str:
        """The field that says what the words of the answer must be."""
        return "output_config.format" if self.output_format is None else "output_format"

    def _grammar(self) -> Grammar | None:
        format = self.output_config and self.output_config.format
        if format is not None and self.output_format not in (None, format):
            raise refused(
                "output_format and output_config.format differ: give one of them", "output_format"
            )
        format = format or self.output_format
        return None if format is None else schema_of(format.schema_, self.format_field)

    @property
    def shows_thoughts(self) -> bool:
        return self.thinking is None or self.thinking.display != "omitted"

    def ask(
        self,
        prompt: Sequence[int],
        hearing: Hearing,
        defaults: SamplingDefaults,
        tokenizer: Tokenizer,
    ) -> Ask:
        """What the engine is asked. Raises RequestRefused."""
        return Ask(
            prompt,
            self.params(defaults, self.max_tokens, None, hearing.grammar),
            stop=self.stops(tokenizer),
            seed=self.seed,
            skip_special_tokens=hearing.skip_special_tokens
            and self.skip_special_tokens is not False,
            namespace=self.cache_salt or "",
            priority=self.priority or 0,
        )


THINKING: Mapping[str, bool | None] = {"enabled": True, "disabled": False, "adaptive": None}


class MessagesFields(CountFields):
    """The body of a request that is answered."""

    max_tokens: int = Field(ge=0, description="of thoughts and answer together")
