"""Grammars that bind an answer: compiled once, followed token by token.

`Grammars` belongs to the scheduler of one engine: it compiles in threads and keeps what was
compiled. `GrammarState` is one answer's place in its grammar. The front calls `check_grammar`
alone, which needs no tokenizer. The parser is llguidance's; nothing here loads torch.
"""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask

from backend.interface import (
    BackendSpec,
    Grammar,
    GrammarKind,
    RequestRefused,
    TokenMask,
)
from backend.json_schema import read_schema
from backend.schema_depth import refuse_too_deep
from backend.tokenizer import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # not there at run time

logger = logging.getLogger(__name__)

KEPT = 64  # compiled grammars
THREADS = 2  # that compile
LIMITS = LLParserLimits(max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False)
# Of JSON. White space is a blank, or a line break and its indentation: a model that likes blanks
# comes to an end. Characters stand for themselves: a key that is spelled with \u would be another.
JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_pattern": r"[ \t]|\r?\n[ \t]{0,32}",
    "json_allowed_escapes": '"\\bfnrt',
}


def _from_schema(text: str) -> str:
    schema = read_schema(text)
    refuse_too_deep(schema)
    found: str = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)
    return found


# kind -> llguidance's own form of a text. Raises RequestRefused, or ValueError.
SOURCES: dict[GrammarKind, Callable[[str], str]] = {
    "json_schema": _from_schema,
    "regex": LLMatcher.grammar_from_regex,
    "lark": LLMatcher.grammar_from_lark,
}


def check_grammar(grammar: Grammar) -> None:
    """Raise RequestRefused for a grammar that cannot be compiled, with the reason in one line.
    Takes up to a second for the largest.
    """
    source = _source(grammar)
    wrong, messages = LLMatcher.validate_grammar_with_warnings(source, limits=LIMITS)
    if wrong:
        raise _refusal(grammar, messages[0])


def _source(grammar: Grammar) -> str:
    """llguidance's own form of a grammar. Raises RequestRefused."""
    try:
        return SOURCES[grammar.kind](grammar.text)
    except ValueError as error:  # half of a surrogate pair, a number that is none in JSON
        raise _refusal(grammar, str(error)) from None


def _refusal(grammar: Grammar, message: str) -> RequestRefused:
    kind = grammar.kind.replace("_", " ")
    return RequestRefused(f"the {kind} cannot be honoured: {_brief(message)}", "grammar")


def _brief(message: str) -> str:
    """What the parser says, without the drawing of where it stands."""
    return " ".join(message.split())[:300]


class GrammarState:
    """How far one answer has come in its grammar. One owner: its sequence."""

    def __init__(self, compiled: Compiled, matcher: LLMatcher) -> None:
        self.compiled = compiled
        self.matcher = matcher

    @property
    def complete(self) -> bool:
        """Whether nothing but an end token can follow."""
        return bool(self.matcher.is_stopped()) and not self.matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why the answer cannot go on: a token that the grammar does not allow, or a limit."""
        return _brief(self.matcher.get_error()) if self.matcher.is_error() else None

    def advance(self, tokens: Sequence[int]) -> None:
        """Take tokens of the answer."""
        self.matcher.consume_tokens(list(tokens))


@dataclass(frozen=True, eq=False, slots=True)
class Compiled:
    """A grammar, ready for any number of answers, which share what its parser has learnt."""

    matcher: LLMatcher  # at the start; never moved
    words: int  # of a mask, that the tokenizer covers
    ends: TokenMask  # the model's end tokens

    def begin(self, received: Sequence[int]) -> GrammarState:
        """The state of an answer that has `received` so far: see its `error`."""
        state = GrammarState(self, self.matcher.deep_copy())
        state.advance(received)
        return state


class Vocabulary:
    """Our tokenizer, as llguidance asks for one."""

    def __init__(self, tokenizer: Tokenizer, spec: BackendSpec) -> None:
        self.tokens = tokenizer.table[: spec.vocabulary]
        self.eos_token_id = spec.stop_ids[0]
        self.bos_token_id = None
        self.special_token_ids = sorted(id for id in tokenizer.special_ids if id < spec.vocabulary)
        self._encode = tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode(errors="replace"), add_special_tokens=False)


class Grammars:
    """The grammars of one engine. One owner, one thread: the scheduler's; it compiles in others."""

    def __init__(self, spec: BackendSpec) -> None:
        self._spec = spec
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")
        self._tokenizer: Future[LLTokenizer] | None = None  # made for the first request that asks
        self._compiled: OrderedDict[Grammar, Future[Compiled]] = OrderedDict()

    def compile(self, grammar: Grammar) -> Future[Compiled]:
        """Begin to compile, or find what is compiled already. The future raises RequestRefused, or
        StartFailed for a tokenizer that cannot be read.
        """
        if self._tokenizer is None:
            self._tokenizer = self._threads.submit(open_vocabulary, self._spec)
        found = self._compiled.get(grammar)
        if found is None:
            found = self._threads.submit(compile_grammar, grammar, self._tokenizer, self._spec)
            self._compiled[grammar] = found
        self._compiled.move_to_end(grammar)
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return found

    def masks(self, asked: Sequence[tuple[GrammarState, bool]]) -> list[TokenMask]:
        """What may be drawn next in each state. End tokens are among it where the answer may end
        there; with False beside the state, only where nothing else is.
        """
        if not asked:
            return []
        compiled = asked[0][0].compiled  # of one tokenizer, as all of them
        masks = np.zeros((len(asked), compiled.words), dtype=np.int32)
        for row, (state, _) in enumerate(asked):  # threads take turns: copies share a lock
            fill_next_token_bitmask(state.matcher, masks, row)
        masks = np.pad(masks, ((0, 0), (0, len(compiled.ends) - compiled.words)))
        for row, (_, may_end) in enumerate(asked):
            if not may_end and (rest := masks[row] & ~compiled.ends).any():
                masks[row] = rest
        return list(masks)

    def close(self) -> None:
        """Compile nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def open_vocabulary(spec: BackendSpec) -> LLTokenizer:
    """The model's tokenizer for the parser: half a second for 49,152 tokens.

    Raises RequestRefused for a model whose answers have no text, or no end; StartFailed.
    """
    tokenizer = open_tokenizer(spec.folder, spec.vocabulary)
    if not tokenizer.longest:
        raise RequestRefused(
            "a grammar needs text, and this model has no tokenizer.json", "grammar"
        )
    if not spec.stop_ids:
        raise RequestRefused("a grammar needs an end token, and this model has none", "grammar")
    begun = time.monotonic()
    wrapped = TokenizerWrapper(Vocabulary(tokenizer, spec))
    found = LLTokenizer(wrapped, eos_token=list(spec.stop_ids))
    logger.info("the tokenizer of grammars took %.2f s", time.monotonic() - begun)
    return found


def compile_grammar(
    grammar: Grammar, tokenizer: Future[LLTokenizer], spec: BackendSpec
) -> Compiled:
    """A grammar over a tokenizer that may still be made. Raises RequestRefused, StartFailed."""
    source = _source(grammar)
    vocabulary = tokenizer.result()
    matcher = LLMatcher(vocabulary, source, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise _refusal(grammar, matcher.get_error())
    ends = np.zeros(-(-spec.vocabulary // 32), dtype=np.uint32)
    for id in spec.stop_ids:
        ends[id // 32] |= np.uint32(1 << (id % 32))
    return Compiled(matcher, -(-vocabulary.vocab_size // 32), ends.view(np.int32))
