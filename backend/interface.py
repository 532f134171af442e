"""What the engine and its backends say to each other: two protocols and plain values.

Loads without torch. Everything here is a value that can travel to another process or be written
down; a live object never crosses this seam. `Backend` works on requests and batches by itself;
`StepExecutor` only runs steps that a scheduler plans. Errors (drawn in `backend/errors.py`),
submissions with what checks them, and sampling parameters have files of their own and are handed on
from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from backend.errors import (
    BackendFailed as BackendFailed,
    DeviceLost as DeviceLost,
    EngineError as EngineError,
    ModelBroken as ModelBroken,
    ModelNotFound as ModelNotFound,
    NeverFits as NeverFits,
    Overloaded as Overloaded,
    RequestRefused as RequestRefused,
    StartFailed as StartFailed,
    TooLong as TooLong,
    Unavailable as Unavailable,
    Unsupported as Unsupported,
    first_line as first_line,
)
from backend.sampling_params import (
    MAX_TOP_LOGPROBS as MAX_TOP_LOGPROBS,
    NOTHING_MORE as NOTHING_MORE,
    Grammar as Grammar,
    GrammarKind as GrammarKind,
    Pooling as Pooling,
    SamplingParams as SamplingParams,
    Wants as Wants,
)
from backend.submission import (
    BackendSpec as BackendSpec,
    Submission as Submission,
    settled_seed as settled_seed,
    with_default_length as with_default_length,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from backend.cache import PrefixCache


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of `token` at one position, and the most probable tokens there, best
    first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Finish:
    """Why an answer ended. Each accepted submission gets exactly one."""

    reason: FinishReason
    matched: int | str | None = None  # with "stop": the token id or the stop string
    message: str | None = None  # with "error": one line for the client


EXPIRED = Finish("abort", message="the deadline passed while the request waited")


@dataclass(frozen=True, slots=True)
class Work:
    """What one answer took of its engine."""

    steps: int  # that it took part in
    rows: int  # of all these steps together: `rows / steps` is the mean batch
    yields: int  # how often it had to make room for others and came back
    computed: int  # positions of its prompt, and after a yield of its answer, given to the device


@dataclass(slots=True)
class Delta:
    """News of one sequence.

    `cached` counts the prompt tokens answered by the cache, and comes once, with the first delta.

    `prompt_logprobs` come once too, with the first token: one entry for each position after
    `Wants.prompt_logprobs_from`. `pooled` comes with the finish of a submission that asked for it,
    `work` with any finish whose backend counts it. `prefilled` is the news of a prompt that goes
    on, for `Wants.progress` alone: positions known to the device.
    """

    id: str
    tokens: Sequence[int] = ()
    finish: Finish | None = None
    cached: int | None = None
    logprobs: Sequence[TokenLogprob] = ()  # parallel to tokens when asked for
    prompt_logprobs: Sequence[TokenLogprob] = ()
    pooled: Sequence[float] = ()
    work: Work | None = None
    prefilled: int | None = None


@dataclass(slots=True)
class StepOutput:
    """What one `advance` brought. The engine owns it until it is published."""

    deltas: list[Delta] = field(default_factory=list)
    step_tokens: int = 0  # positions the settled step computed
    step_seconds: float = 0.0  # from its launch to its settlement
    entered: Sequence[int] = ()  # cached prefixes that are new: `backend/prefix_keys.py`
    evicted: Sequence[int] = ()  # those that are gone


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a backend is, for placement, metrics and backpressure."""

    running: int
    waiting: int
    pages_total: int
    pages_free: int
    pages_cached: int  # in the tree, given up when needed
    pages_leased: int  # held by running sequences
    preemptions: int
    steps: int


class Backend(Protocol):
    """Answers submissions and batches by itself. One owner (the engine), one thread."""

    @property
    def spec(self) -> BackendSpec:
        """What was decided at start-up."""

    def submit(self, submission: Submission) -> None:
        """Take over a submission that passed `spec.check`.

        It ends with exactly one Delta that has a finish.
        """

    def cancel(self, id: str) -> None:
        """End a submission early, with finish "abort".

        Unknown or ended ids are ignored: the race is the caller's to lose.
        """

    def advance(self, wait: float) -> StepOutput:
        """Do the next piece of work. Blocks for `wait` seconds at most when there is none.

        Any number of tokens a sequence may come at once. Raises BackendFailed when nothing more
        will come.
        """

    def fileno(self) -> int | None:
        """A descriptor that turns readable when `advance` has something, to be polled with an
        inbox; None: call `advance`.
        """

    def load(self) -> Load:
        """How busy it is."""

    def warm(self, tokens: int) -> int:
        """Run `tokens` decode steps of a throwaway sequence, so that no request pays for what is
        built lazily. Returns the steps run.

        Called while nothing runs.
        """

    def prepare(self) -> bool:
        """Do one bounded piece of work that makes later steps faster, a tenth of a second or so.

        Called while nothing runs. False: nothing is left to do.
        """

    def flush(self) -> int:
        """Give up every cached prefix that is not in use. Returns the pages freed."""

    def close(self) -> None:
        """Give back the device. Called once."""


@dataclass(frozen=True, slots=True)
class SlotSetup:
    """Sampling state of a row, sent once when a sequence takes the slot; the executor advances it
    by itself from then on.

    A sequence that comes back after a yield is set up again, from the ids it has by then.
    """

    slot: int
    sampling: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]  # never drawn while the position drawn is below `min_position`
    min_position: int
    prompt: tuple[int, ...] = ()  # filled only where `sampling.penalised`
    output: tuple[int, ...] = ()  # likewise: generated before the slot was taken


@dataclass(slots=True)  # not frozen: that triples the cost of what is made for every row and step
class Chunk:
    """Consecutive positions of one sequence in one step. A decode is a chunk of one. Nobody changes
    it.

    `tokens` None: the input is the id that the slot sampled last, which may still be on the device.
    A chunk that samples draws the token at position `start + count`. `targets` are the ids whose
    log-probabilities are wanted: `targets[i]` is the successor of position `score_start + i`.
    `pools` says which final hidden states are wanted, summed: "mean" those of all its positions,
    "last" that of the last one.
    """

    slot: int
    start: int
    count: int
    tokens: Sequence[int] | None
    # appended to the slot's page table before the step; the first chunk brings all (table reset)
    pages: Sequence[int]
    first: bool  # the slot was newly taken: its page table starts empty
    samples: bool
    logprobs: bool = False  # of the sampled token
    top: int = 0
    score_start: int = 0
    targets: Sequence[int] = ()
    pools: Pooling | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass: decodes first, then chunks of prompts.

    Plain values only, so that it can travel and be recorded. `masked` are the chunks, by index,
    whose token a grammar binds: what they may draw is not known when the step is launched.
    """

    chunks: Sequence[Chunk]
    taken: Sequence[SlotSetup] = ()
    masked: Sequence[int] = ()

    @property
    def tokens(self) -> int:
        """Positions that the step computes."""
        return sum(chunk.count for chunk in self.chunks)


@dataclass(slots=True)
class StepTokens:
    """Results of a step, parallel to the plan's chunks.

    The maps hold only the chunks (by index) that asked.
    """

    tokens: list[Sequence[int]]  # empty for a chunk that does not sample
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    scores: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    pooled: dict[int, list[float]] = field(default_factory=dict)


# The ids that a row may draw: id i is bit i % 32 of word i // 32, the words cover the vocabulary.
TokenMask: TypeAlias = "NDArray[np.int32]"

StepHandle: TypeAlias = Any  # a step in flight; the executor's own, opaque to the scheduler


class StepExecutor(Protocol):
    """Runs planned steps on a device. One owner (the scheduler), one thread.

    A step may be launched before the one ahead of it is collected (`spec.depth` in flight at most),
    so `launch` never needs a token of a step in flight: it is on the device already. Handles are
    collected in launch order, each exactly once.

    A step with masked chunks takes two calls: `launch` starts its forward pass and leaves the draw
    out; `sample` draws, before anything else is launched.
    """

    @property
    def spec(self) -> BackendSpec:
        """What was decided at start-up."""

    @property
    def cache(self) -> PrefixCache:
        """The pages of this device. Only the scheduler calls it."""

    def launch(self, plan: StepPlan) -> StepHandle:
        """Start one step. On a CPU the step runs here; on a GPU this returns at once.

        Raises nothing about a single sequence: what can be refused was refused at submit. Raises
        DeviceLost.
        """

    def sample(self, handle: StepHandle, masks: Mapping[int, TokenMask]) -> None:
        """Let a step that was launched with masked chunks draw its tokens, theirs among the ids in
        `masks` (by index of the chunk; one that is not there draws freely, and nobody wants its
        token). Called once, right after its launch as far as the executor sees; never for another
        step. On a GPU it returns at once, and what it draws is what the next step reads.

        The masks are the caller's again when this returns. Raises DeviceLost.
        """

    def collect(self, handle: StepHandle) -> StepTokens:
        """Wait for the step.

        Raises DeviceLost when the device is gone: every sequence then ends with that error.
        """

    def prepare(self) -> bool:
        """As `Backend.prepare`."""

    def close(self) -> None:
        """Give back the device. Called once."""
