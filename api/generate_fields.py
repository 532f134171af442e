"""What both forms of `POST /generate` are asked in the same words, and the `Ask` that it means.

Our own form has these fields beside its prompt, SGLang's in `sampling_params`.
"""

from __future__ import annotations

from pydantic import Field

from api.answers import Ask
from api.bodies import Stops
from api.sampling_fields import SamplingDefaults, SamplingFields
from api.structured import GrammarFields, check_grammar
from backend.interface import RequestRefused
from backend.tokenizer import Tokenizer
from engine.stop_regex import stop_patterns


class GenerateFields(SamplingFields, GrammarFields):
    """How an answer is drawn, what form it has, and where it ends."""

    max_new_tokens: int | None = Field(
        None, description="default: MAX_NEW_TOKENS_DEFAULT, clamped to the room in the context"
    )
    min_new_tokens: int | None = None
    stop_regex: Stops | None = Field(
        None, description="the text ends before what matches first; in Python's syntax"
    )
    no_stop_trim: bool | None = Field(None, description="the text ends with what stopped it")

    def ask(self, defaults: SamplingDefaults, tokenizer: Tokenizer, path: str = "") -> Ask:
        """All but the prompt and what is said beside these fields; `path` goes before their names.

        Raises ApiError and RequestRefused; the grammar is for `check` to compile.
        """
        grammar = self.grammar(path)
        if grammar is not None and not tokenizer.longest:
            field = path + self.grammar_field
            raise RequestRefused(f"{field} needs text, and this model has no tokenizer.json", field)
        return Ask(
            (),
            self.params(defaults, self.max_new_tokens, self.min_new_tokens, grammar),
            self.stops(tokenizer),
            n=self.n or 1,
            skip_special_tokens=self.skip_special_tokens is not False,
            keep_stop=bool(self.no_stop_trim),
            stop_regex=self._patterns(tokenizer),
        )

    def _patterns(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        found = stop_patterns(self.stop_regex)
        if found and not tokenizer.longest:
            raise RequestRefused(
                "stop_regex needs text, and this model has no tokenizer.json: give stop_token_ids",
                "stop_regex",
            )
        return found

    async def check(self, ask: Ask, path: str = "") -> None:
        """Compile the grammar that `ask` made. Raises ApiError."""
        await check_grammar(ask.sampling.grammar, path + self.grammar_field)
