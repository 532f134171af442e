"""What an engine is asked for, and what it says of itself: who fits is decided by these two alone.

Values. A submission is checked once, at the front, by the spec that an engine told at its start.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from backend.errors import NeverFits, RequestRefused, TooLong
from backend.sampling_params import NOTHING_MORE, SamplingParams, Wants


@dataclass(frozen=True, slots=True)
class Submission:
    """One answer to be generated: all that any engine needs to start it, or to carry it on after
    another engine died.

    `seed` decides every draw: the token at position p is a pure function of (logits, seed, p).
    Answers that share one prompt (`n` > 1) share a `group`: all but the first wait until its prompt
    pages can be leased.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    seed: int  # 0 <= seed < 2**63
    wants: Wants = NOTHING_MORE
    namespace: str = ""  # prefixes are shared within one namespace only
    group: str | None = None
    priority: int = 0  # higher goes first
    arrival: float = 0.0  # time.monotonic() at the front
    deadline: float | None = None  # time.monotonic() at which who still waits is given up
    received: tuple[int, ...] = ()  # ids of this answer that the client has already

    @property
    def max_new_tokens(self) -> int:
        """The resolved length. Raises ValueError before `with_default_length` has settled it."""
        if self.sampling.max_new_tokens is None:
            raise ValueError(f"submission {self.id} has no length: call with_default_length first")
        return self.sampling.max_new_tokens


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """Facts decided at start-up: never written back into configuration, the first thing an engine
    tells the front.
    """

    name: str  # "hf", "fake", ...
    model: str  # the name the model is served under
    folder: str | None  # the model's Hugging Face folder; None: there is no model
    vocabulary: int  # ids are below this
    max_model_len: int  # tokens of prompt and answer together
    stop_ids: tuple[int, ...]  # the model's own end tokens
    page_tokens: int  # tokens in a page
    pages: int
    max_running: int  # rows of a batch; slots are 0 .. max_running - 1
    max_step_tokens: int  # token budget of a step
    depth: int  # steps that may be in flight
    device: str
    dtype: str
    attention: str
    parameters: int = 0  # weights of the model
    weight_bytes: int = 0  # what a decode step reads besides the KV cache
    kv_bytes_per_token: int = 0
    # fields of SamplingParams and Wants that it cannot honour, and "seed": refused by name
    lacks: tuple[str, ...] = ()

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` positions."""
        return -(-tokens // self.page_tokens)

    def check(self, submission: Submission) -> None:
        """Raise RequestRefused if `submission` can never be served here.

        Pure; called once, at arrival.
        """
        for asked in (submission.sampling, submission.wants):
            self.check_asked(asked)
        prompt = submission.prompt
        if not prompt:
            raise RequestRefused("prompt is empty: give at least one token", "prompt")
        for name, ids in (
            ("prompt", prompt),
            ("received", submission.received),
            ("stop_token_ids", submission.sampling.stop_token_ids),
            ("logit_bias", [token for token, _ in submission.sampling.logit_bias]),
        ):
            self.check_ids(name, ids)
        start = submission.wants.prompt_logprobs_from
        if start is not None and start >= len(prompt):
            raise RequestRefused(
                f"prompt_logprobs_from {start} is beyond the prompt of {len(prompt)} tokens",
                "prompt_logprobs_from",
            )
        if submission.wants.pooling is not None and submission.max_new_tokens:
            raise RequestRefused(
                "pooling is of the prompt alone: ask for no tokens (max_new_tokens 0)", "pooling"
            )
        if not 0 <= submission.seed < 1 << 63:
            raise RequestRefused(f"seed must be 0 to 2**63 - 1, got {submission.seed}", "seed")
        self._check_room(len(prompt), submission.max_new_tokens)

    def check_asked(self, asked: SamplingParams | Wants) -> None:
        """Raise RequestRefused naming the first field of `asked` that this backend lacks."""
        for field in fields(asked):
            if field.name in self.lacks and getattr(asked, field.name) != field.default:
                raise RequestRefused(
                    f"{field.name}: the backend {self.name} does not support it", field.name
                )

    def check_ids(self, name: str, ids: Sequence[int]) -> None:
        """Raise RequestRefused naming `name` if it holds what is no token id of this model."""
        if not set(map(type, ids)) <= {int}:
            wrong = next(token for token in ids if type(token) is not int)
            raise RequestRefused(f"{name} must hold token ids, holds {wrong!r}", name)
        if ids and not (min(ids) >= 0 and max(ids) < self.vocabulary):
            wrong = next(token for token in ids if not 0 <= token < self.vocabulary)
            raise RequestRefused(
                f"{name} holds token id {wrong}, outside the vocabulary of {self.vocabulary}", name
            )

    def _check_room(self, prompt: int, new: int) -> None:
        asked = f"prompt {prompt:,} + max_new_tokens {new:,}"
        if prompt + new > self.max_model_len:
            raise TooLong(
                f"{asked} exceed the context of {self.max_model_len:,}: "
                "shorten the prompt or lower max_new_tokens",
                "prompt" if prompt >= self.max_model_len else "max_new_tokens",
            )
        needed = self.pages_for(prompt + new)
        if needed > self.pages:
            raise NeverFits(
                f"{asked} need {needed:,} pages of {self.page_tokens} tokens, the cache has "
                f"{self.pages:,}: shorten the request or raise PAGE_TOKEN_BUDGET",
                "prompt" if self.pages_for(prompt) > self.pages else "max_new_tokens",
            )


def settled_seed(seed: int | None, spec: BackendSpec) -> int:
    """The seed of an answer: what its client chose, else a random one.

    Raises RequestRefused where the backend draws without regard to it.
    """
    if seed is None:
        return secrets.randbits(62)
    if "seed" in spec.lacks:
        raise RequestRefused(f"seed: the backend {spec.name} draws without one", "seed")
    return seed


def with_default_length(submission: Submission, spec: BackendSpec, default: int) -> Submission:
    """Settle `max_new_tokens`: an explicit one stays, the default is clamped to the room left, and
    to one token at least.
    """
    if submission.sampling.max_new_tokens is not None:
        return submission
    room = min(spec.max_model_len, spec.pages * spec.page_tokens) - len(submission.prompt)
    length = max(1, submission.sampling.min_new_tokens, min(default, room))
    return replace(submission, sampling=replace(submission.sampling, max_new_tokens=length))
