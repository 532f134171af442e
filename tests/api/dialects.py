"""Dialects of made-up models, and what their grammars allow."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import tokenizers
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from api.dialect import Dialect
from backend.byte_table import gpt2_alphabet
from backend.grammar import SOURCES, Vocabulary
from backend.interface import Grammar
from backend.tokenizer import HfTokenizer, Tokenizer
from config import DialectSettings

END = "<|im_end|>"
PLAIN_MARKS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
SPECIAL_MARKS = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", END)
CLOSERS = frozenset(b'"]})>')


def tokenizer(
    template: str,
    plain: Sequence[str] = PLAIN_MARKS,
    special: Sequence[str] = SPECIAL_MARKS,
) -> HfTokenizer:
    """A token for each byte and for each mark."""
    inner = tokenizers.Tokenizer(models.BPE(vocab=gpt2_alphabet(), merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([AddedToken(mark, normalized=False) for mark in plain])
    inner.add_special_tokens([AddedToken(mark, normalized=False) for mark in special])
    return HfTokenizer(inner, {"eos_token": END}, {"default": template}, 0)


def dialect(template: str = "", format: str = "auto", **marks: Sequence[str]) -> Dialect:
    """Of a model with this template."""
    settings = DialectSettings.model_validate({"tool_parser": format})
    return Dialect.of(tokenizer(template, **marks), settings)


class Walk:
    """An answer that a grammar binds, byte by byte."""

    def __init__(self, grammar: Grammar | None, spoken: Tokenizer) -> None:
        assert grammar is not None
        self.tokenizer = spoken
        source = SOURCES[grammar.kind](grammar.text)
        vocabulary = _vocabulary(spoken)
        wrong = LLMatcher.validate_grammar(source, vocabulary)
        assert not wrong, f"{wrong}\n{grammar.text}"
        self._matcher = LLMatcher(vocabulary, source, log_level=0)

    def allows(self, text: str) -> bool:
        """Whether an answer may be this text."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        matcher = self._matcher.deep_copy()
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    def begins(self, text: str) -> bool:
        """Whether an answer may begin with this text."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return bool(self._matcher.deep_copy().validate_tokens(ids) == len(ids))

    def takes(self, id: int) -> bool:
        """Whether an answer may begin with this token."""
        return bool(self._matcher.deep_copy().validate_tokens([id]) == 1)

    def draw(self, seed: int, most: int = 2000) -> str:
        """An answer drawn at random: what closes something is likely, so that it ends."""
        draw, matcher = random.Random(seed), self._matcher.deep_copy()
        closing = self.tokenizer.encode("</parameter>", add_special_tokens=False)
        ids: list[int] = []
        while len(ids) < most and not matcher.is_stopped():
            if matcher.is_accepting() and draw.random() < 0.3:
                break
            some = [self._one(draw, matcher)]
            if draw.random() < 0.1 and matcher.validate_tokens(closing) == len(closing):
                some = closing
            assert matcher.consume_tokens(some), matcher.get_error()
            ids += some
        text = b"".join(map(self.tokenizer.bytes_of, ids)).decode()
        assert matcher.is_accepting(), text
        return text

    def _one(self, draw: random.Random, matcher: LLMatcher) -> int:
        mask = matcher.compute_logit_bias()
        ends = self.tokenizer.stop_ids
        allowed = [id for id in range(len(mask)) if mask[id] and id not in ends]
        likely = [id for id in allowed if self._closes(id)]
        ascii = [id for id in allowed if self.tokenizer.table[id].isascii()]
        return draw.choice(likely if likely and draw.random() < 0.3 else ascii or allowed)

    def _closes(self, id: int) -> bool:
        token = self.tokenizer.table[id]
        return len(token) > 1 or token[0] in CLOSERS


@cache
def _vocabulary(spoken: Tokenizer) -> LLTokenizer:
    spec: Any = SimpleNamespace(vocabulary=spoken.vocabulary, stop_ids=spoken.stop_ids)
    return LLTokenizer(TokenizerWrapper(Vocabulary(spoken, spec)), eos_token=list(spec.stop_ids))
