"""What a request may ask of its answer: how tokens are drawn, and what comes with them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from backend.errors import RequestRefused

MAX_TOP_LOGPROBS = 20  # the bound of OpenAI's API


def _refuse_unless(holds: bool, param: str, wanted: str, got: object) -> None:
    if not holds:
        raise RequestRefused(f"{param} must be {wanted}, got {got!r}", param)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn.

    A value that is out of range raises RequestRefused naming the field.

    Applied in this order: penalties and `logit_bias` on the raw logits, temperature, top_k, top_p
    over what top_k left, min_p relative to the most probable token. Tokens that tie with the last
    one kept by top_k or top_p are kept too, so a filter never depends on the order of a sort.
    Penalties follow OpenAI (frequency, presence: generated tokens) and CTRL, Keskar et al. 2019
    (repetition: prompt and generated tokens).
    """

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    max_new_tokens: int | None = (
        None  # None: the front's default, clamped to the room left in the context
    )
    min_new_tokens: int = 0  # until then no stop id can be drawn
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False  # the model's own end tokens do not stop; `stop_token_ids` still do

    def __post_init__(self) -> None:
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
        ):
            _refuse_unless(
                math.isfinite(getattr(self, name)), name, "a finite number", getattr(self, name)
            )
        _refuse_unless(
            0 <= self.temperature <= 100, "temperature", "between 0 and 100", self.temperature
        )
        _refuse_unless(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _refuse_unless(self.top_k >= 0, "top_k", "0 (all) or more", self.top_k)
        _refuse_unless(0 <= self.min_p <= 1, "min_p", "between 0 and 1", self.min_p)
        for name in ("frequency_penalty", "presence_penalty"):
            _refuse_unless(
                -2 <= getattr(self, name) <= 2, name, "between -2 and 2", getattr(self, name)
            )
        _refuse_unless(
            self.repetition_penalty > 0, "repetition_penalty", "above 0", self.repetition_penalty
        )
        for _, bias in self.logit_bias:
            _refuse_unless(-100 <= bias <= 100, "logit_bias", "between -100 and 100", bias)
        if self.max_new_tokens is not None:
            _refuse_unless(
                self.max_new_tokens >= 0, "max_new_tokens", "0 or more", self.max_new_tokens
            )
        highest = math.inf if self.max_new_tokens is None else self.max_new_tokens
        wanted = f"between 0 and max_new_tokens ({highest})"
        _refuse_unless(
            0 <= self.min_new_tokens <= highest, "min_new_tokens", wanted, self.min_new_tokens
        )

    @property
    def penalised(self) -> bool:
        """Whether the draw depends on how often tokens were seen."""
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1)


@dataclass(frozen=True, slots=True)
class Wants:
    """What an answer carries besides its tokens.

    Log-probabilities are natural, of the raw logits (before penalties and temperature).
    """

    logprobs: bool = False  # of each generated token
    prompt_logprobs_from: int | None = (
        None  # score prompt tokens after this position; 0: all but the first
    )
    top: int = 0  # with either: the most probable tokens at each position, too

    def __post_init__(self) -> None:
        wanted = f"between 0 and {MAX_TOP_LOGPROBS}"
        _refuse_unless(0 <= self.top <= MAX_TOP_LOGPROBS, "top_logprobs", wanted, self.top)
        if self.prompt_logprobs_from is not None:
            _refuse_unless(
                self.prompt_logprobs_from >= 0,
                "prompt_logprobs_from",
                "0 or more",
                self.prompt_logprobs_from,
            )


NOTHING_MORE = Wants()
