"""A scheduler over the fake device, its plans watched and its answers collected, and what is right:
the same answers made one by one from the ids alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from zlib import crc32

from backend.cache import PrefixCache
from backend.fake import FakeExecutor, FakeStep, open_backend
from backend.fake_model import FakeModel, Row
from backend.interface import (
    BackendSpec,
    Finish,
    SamplingParams,
    SlotSetup,
    StepExecutor,
    StepHandle,
    StepPlan,
    StepTokens,
    Submission,
    TokenMask,
    Wants,
)
from config import BackendSettings, BatchSettings, CacheSettings, FakeSettings, ModelSettings
from engine.scheduler import Scheduler
from tests.conformance.driver import Answer, Driver

CONTEXT = 40  # tokens
NOTHING = Wants()


class Recorder:
    """A fake device that keeps the plans and holds each against what a plan may be."""

    def __init__(self, inner: FakeExecutor) -> None:
        self.inner = inner
        self.plans: list[StepPlan] = []
        self.starts: dict[int, list[int]] = {}  # seed -> where each of its placements began
        self.order: list[int] = []  # seeds, a placement each
        self._seeds: dict[int, int] = {}
        self._ends: dict[int, int] = {}

    @property
    def spec(self) -> BackendSpec:
        return self.inner.spec

    @property
    def cache(self) -> PrefixCache:
        return self.inner.cache

    def prepare(self) -> bool:
        return self.inner.prepare()

    def launch(self, plan: StepPlan) -> FakeStep:
        assert 0 < plan.tokens <= self.spec.max_step_tokens
        decodes = [chunk.tokens is None for chunk in plan.chunks]
        assert decodes == sorted(decodes, reverse=True), "decodes come first"
        slots = [chunk.slot for chunk in plan.chunks]
        assert len(set(slots)) == len(slots)
        assert {setup.slot for setup in plan.taken} == {c.slot for c in plan.chunks if c.first}
        self._seeds.update({setup.slot: setup.seed for setup in plan.taken})
        for chunk in plan.chunks:
            if chunk.first:
                self.starts.setdefault(self._seeds[chunk.slot], []).append(chunk.start)
                self.order.append(self._seeds[chunk.slot])
            else:
                assert chunk.start == self._ends[chunk.slot]
            self._ends[chunk.slot] = chunk.start + chunk.count
        self.plans.append(plan)
        return self.inner.launch(plan)

    def sample(self, handle: StepHandle, masks: Mapping[int, TokenMask]) -> None:
        assert set(masks) <= set(self.plans[-1].masked)
        self.inner.sample(handle, masks)

    def collect(self, handle: StepHandle) -> StepTokens:
        return self.inner.collect(handle)

    def close(self) -> None:
        self.inner.close()


class Bench(Driver):
    """A scheduler, its device, and what came out."""

    def __init__(
        self,
        *,
        pages: int = 64,
        page_tokens: int = 4,
        max_running: int = 4,
        max_step_tokens: int = 16,
        depth: int = 1,
        prefix: bool = True,
        fail_at_step: int = 0,
    ) -> None:
        self.recorder: Recorder

        def build(executor: StepExecutor) -> Scheduler:
            assert isinstance(executor, FakeExecutor)
            self.recorder = Recorder(executor)
            return Scheduler(self.recorder)

        backend_settings = BackendSettings(
            model=ModelSettings(max_model_len=CONTEXT),
            cache=CacheSettings(
                page_tokens=page_tokens, budget_tokens=pages * page_tokens, prefix=prefix
            ),
            batch=BatchSettings(max_running=max_running, max_step_tokens=max_step_tokens),
            fake=FakeSettings(depth=depth, fail_at_step=fail_at_step),
        )
        super().__init__(open_backend(backend_settings, build))
        self.model = self.recorder.inner.model
        self.cache = self.recorder.cache

    def advance(self) -> None:
        super().advance()
        self.cache.check()


def alone(model: FakeModel, spec: BackendSpec, submission: Submission) -> Answer:
    """What is right, one token at a time, without pages, batch or cache."""
    sampling, wants, prompt = submission.sampling, submission.wants, submission.prompt
    stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else spec.stop_ids)}
    first = len(prompt) + sampling.min_new_tokens
    row = Row(
        SlotSetup(0, sampling, submission.seed, tuple(stops), first, prompt, submission.received)
    )
    answer, ids = Answer(), [*prompt, *submission.received]
    if wants.prompt_logprobs_from is not None and not submission.received:
        answer.prompt_logprobs = [
            model.logprob(prompt[at], model.after(prompt[:at]), wants.top)
            for at in range(wants.prompt_logprobs_from + 1, len(prompt))
        ]
    while len(ids) < len(prompt) + submission.max_new_tokens:
        candidates = model.after(ids)
        token = row.sample(model, candidates, len(ids))
        ids.append(token)
        answer.tokens.append(token)
        if wants.logprobs:
            answer.logprobs.append(model.logprob(token, candidates, wants.top))
        if token in stops:
            answer.finishes = [Finish("stop", matched=token)]
            return answer
    answer.finishes = [Finish("length")]
    return answer


def ask(
    id: str,
    prompt: Sequence[int] = (1, 2, 3, 4, 5, 6),
    new: int = 6,
    *,
    group: str | None = None,
    namespace: str = "",
    wants: Wants = NOTHING,
    received: tuple[int, ...] = (),
    ignore_eos: bool = True,
    stop: tuple[int, ...] = (),
) -> Submission:
    sampling = SamplingParams(max_new_tokens=new, ignore_eos=ignore_eos, stop_token_ids=stop)
    return Submission(
        id,
        tuple(prompt),
        sampling,
        seed=seed_of(id),
        group=group,
        namespace=namespace,
        wants=wants,
        received=received,
    )


def seed_of(id: str) -> int:
    """A seed of its own for each id, which names it in the recorder."""
    return crc32(id.encode())
