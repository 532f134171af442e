"""What a request may ask of its answer: how tokens are drawn, and what comes with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from backend.errors import RequestRefused

MAX_TOP_LOGPROBS = 20  # the bound of OpenAI's API


# field -> (what holds for it, in words); NaN holds for none
NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: 0 <= value <= 100, "between 0 and 100"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    "frequency_penalty": (lambda value: -2 <= value <= 2, "between -2 and 2"),
    "presence_penalty": (lambda value: -2 <= value <= 2, "between -2 and 2"),
    "repetition_penalty": (lambda value: 0 < value < math.inf, "above 0 and finite"),
}


def _refuse_unless(holds: bool, param: str, wanted: str, got: object) -> None:
    if not holds:
        raise RequestRefused(f"{param} must be {wanted}, got {got!r}", param)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


MAX_COUNT = (1 << 53) - 1  # the largest that JSON carries everywhere
COUNT = f"a whole number, 0 to {MAX_COUNT}"


def _is_count(value: object) -> bool:
    """A length of 2.5 would never be reached."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


GrammarKind = Literal["json_schema", "regex", "lark"]
GRAMMAR_KINDS = get_args(GrammarKind)
# A long pattern costs its engine more than itself: each token is held against all of it.
MAX_GRAMMAR_CHARACTERS: dict[GrammarKind, int] = {
    "json_schema": 1 << 18,
    "regex": 1 << 13,
    "lark": 1 << 18,
}


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the whole of an answer must match: a JSON schema as JSON, a regular expression, or a
    grammar in Lark's notation as llguidance reads it.

    Raises RequestRefused for a text that is too long; what it says is checked where it is compiled.
    """

    kind: GrammarKind
    text: str

    def __post_init__(self) -> None:
        wanted = "one of " + ", ".join(GRAMMAR_KINDS)
        _refuse_unless(self.kind in GRAMMAR_KINDS, "grammar", wanted, self.kind)
        most = MAX_GRAMMAR_CHARACTERS[self.kind]
        fits = isinstance(self.text, str) and 0 < len(self.text) <= most
        wanted = f"a text of 1 to {most:,} characters"
        _refuse_unless(
            fits, "grammar", wanted, len(self.text) if isinstance(self.text, str) else self.text
        )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn.

    A value that is out of range raises RequestRefused naming the field.

    Applied in this order: the grammar, penalties and `logit_bias` on the raw logits, temperature,
    top_k, top_p over what top_k left, min_p relative to the most probable token. Tokens that tie
    with the last one kept by top_k or top_p are kept too, so a filter never depends on the order of
    a sort.
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
    max_new_tokens: int | None = None  # None: the front's default, clamped to the room left
    min_new_tokens: int = 0  # until then no stop id can be drawn
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False  # the model's own end tokens do not stop; `stop_token_ids` still do
    # Goes before the two above: an end token is drawn only where the grammar may end, and where it
    # can only end the answer does, with "stop". A model without a tokenizer refuses it.
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name, (holds, wanted) in NUMBERS.items():
            value = getattr(self, name)
            _refuse_unless(_is_number(value) and holds(value), name, f"a number {wanted}", value)
        for name in ("top_k", "min_new_tokens"):
            value = getattr(self, name)
            _refuse_unless(_is_count(value), name, COUNT, value)
        for _, bias in self.logit_bias:
            fits = _is_number(bias) and -100 <= bias <= 100
            _refuse_unless(fits, "logit_bias", "a number between -100 and 100", bias)
        fits = self.grammar is None or isinstance(self.grammar, Grammar)
        _refuse_unless(fits, "grammar", "a Grammar", self.grammar)
        least, most = self.min_new_tokens, self.max_new_tokens
        if most is not None:
            _refuse_unless(_is_count(most), "max_new_tokens", COUNT, most)
            wanted = f"at most max_new_tokens ({most})"
            _refuse_unless(least <= most, "min_new_tokens", wanted, least)

    @property
    def penalised(self) -> bool:
        """Whether the draw depends on how often tokens were seen."""
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1)


Pooling = Literal["mean", "last"]  # of the final hidden states of a prompt


@dataclass(frozen=True, slots=True)
class Wants:
    """What an answer carries besides its tokens.

    Log-probabilities are natural, of the raw logits (before penalties and temperature).
    """

    logprobs: bool = False  # of each generated token
    prompt_logprobs_from: int | None = None  # of prompt tokens after this position
    top: int = 0  # with either: the most probable tokens at each position, too
    pooling: Pooling | None = None  # the prompt as one vector, in place of tokens
    progress: bool = False  # news of a long prompt while it is computed

    def __post_init__(self) -> None:
        wanted = f"between 0 and {MAX_TOP_LOGPROBS}"
        fits = _is_count(self.top) and self.top <= MAX_TOP_LOGPROBS
        _refuse_unless(fits, "top_logprobs", wanted, self.top)
        start = self.prompt_logprobs_from
        if start is not None:
            wanted = COUNT
            _refuse_unless(_is_count(start), "prompt_logprobs_from", wanted, start)
        asked = self.logprobs or start is not None
        wanted = "0 where no log-probabilities are asked for"
        _refuse_unless(asked or not self.top, "top_logprobs", wanted, self.top)
        fits = self.pooling is None or self.pooling in get_args(Pooling)
        _refuse_unless(fits, "pooling", "mean or last", self.pooling)


NOTHING_MORE = Wants()
