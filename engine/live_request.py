"""A request that the front has accepted, until its finish.

Made by the handler that answers it; filled by the pool alone. It holds what another engine needs to
carry it on: the submission and the ids received.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from backend.interface import Finish, Submission, TokenLogprob, Work


@dataclass(eq=False, slots=True)
class LiveRequest:
    """One answer under way. Times are `time.monotonic()` seconds."""

    submission: Submission
    request_id: str  # what the client calls it; the answers of one request share it
    owner: str  # who asked: the fingerprint of an API key, or ""
    notify: Callable[[LiveRequest], None]  # called when there is news, on the event loop
    received: list[int] = field(default_factory=list)  # ids of the answer
    logprobs: list[TokenLogprob] = field(default_factory=list)  # parallel to `received`, if wanted
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    cached: int = 0  # prompt tokens answered by the cache
    prefilled: int = 0  # prompt tokens known to the device, where `Wants.progress` asks
    pooled: Sequence[float] = ()  # the prompt as a vector, where `Wants.pooling` asks
    work: Work | None = None  # what the engine spent; None: it has not told
    finish: Finish | None = None
    replica: int | None = None  # where it runs; None: it waits
    placed: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None

    @property
    def name(self) -> tuple[str, str]:
        """What no other request may be called meanwhile, among those of one client."""
        return self.owner, self.request_id

    @property
    def id(self) -> str:
        """The submission's."""
        return self.submission.id
