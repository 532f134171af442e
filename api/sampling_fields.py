"""The sampling fields that several request forms share, and what they mean to the engine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from api.bodies import Form, Stops, TokenIds, bounded
from api.errors import refused
from backend.interface import Grammar, ModelBroken, RequestRefused, SamplingParams
from backend.tokenizer import Tokenizer
from engine.text import stop_strings

MAX_ANSWERS = 128  # `n` of one prompt
MAX_ANSWERS_IN_ALL = 1024  # of one request


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """How an answer is drawn whose request does not say: by the model's generation_config.json."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @staticmethod
    def of(folder: str | None) -> SamplingDefaults:
        """Those of a model folder; what its file does not say stays as it is.

        Raises ModelBroken for a file that says what nobody can draw by.
        """
        file = Path(folder or "") / "generation_config.json"
        if folder is None or not file.is_file():
            return SamplingDefaults()
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            found = dict(found)
        except (TypeError, ValueError) as error:
            raise ModelBroken(f"{file} is not a JSON object: {error}") from None
        names = SamplingDefaults.__slots__
        given = {name: found[name] for name in names if found.get(name) is not None}
        if found.get("do_sample") is False:
            given["temperature"] = 0.0
        try:
            SamplingParams(**given)
        except RequestRefused as error:
            raise ModelBroken(f"{file}: {error}") from None
        return SamplingDefaults(**given)


NO_TOKENS = SamplingParams(max_new_tokens=0)  # of prompts that are computed without an answer
GREEDY = SamplingDefaults(temperature=0.0)  # what our own form promises


class SamplingFields(Form):
    """The fields that mean the same in every form. None: the form's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 or -1: all")
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(bounded)] | None = Field(
        None, description="token id -> added to its logit"
    )
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS, description="answers to each prompt")
    stop: Stops | None = None
    skip_special_tokens: bool | None = None

    def params(
        self,
        defaults: SamplingDefaults,
        max_new_tokens: int | None,
        min_new_tokens: int | None,
        grammar: Grammar | None = None,
    ) -> SamplingParams:
        """What the engine is asked for. Raises RequestRefused naming the field."""

        def given(name: str) -> Any:
            value = getattr(self, name)
            return getattr(defaults, name) if value is None else value

        return SamplingParams(
            temperature=given("temperature"),
            top_p=given("top_p"),
            top_k=max(0, given("top_k")) if self.top_k == -1 else given("top_k"),
            min_p=given("min_p"),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            repetition_penalty=given("repetition_penalty"),
            logit_bias=_logit_bias(self.logit_bias),
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens or 0,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            grammar=grammar,
        )

    def stops(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        """The stop strings. Raises RequestRefused, also for a model whose answers have no text."""
        found = stop_strings(self.stop)
        if found and not tokenizer.longest:
            raise RequestRefused(
                "stop needs text, and this model has no tokenizer.json: give stop_token_ids", "stop"
            )
        return found


def check_answers(count: int, param: str) -> None:
    """Raise ApiError when the prompts of one request times their `n` are too many."""
    if count > MAX_ANSWERS_IN_ALL:
        raise refused(
            f"{param} asks for {count:,} answers, {MAX_ANSWERS_IN_ALL:,} are allowed", param
        )


def _logit_bias(fields: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    found = fields or {}
    if not all(token.isascii() and token.isdecimal() for token in found):
        raise refused("logit_bias must have token ids as its keys", "logit_bias")
    return tuple((int(token), bias) for token, bias in found.items())
