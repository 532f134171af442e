"""What the tests of the native backend share: a driver, and transformers as the oracle."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from backend.hf.opening import open_backend
from backend.interface import (
    Delta,
    Load,
    SamplingParams,
    StepExecutor,
    Submission,
    TokenLogprob,
    Wants,
)
from config import (
    BackendSettings,
    BatchSettings,
    CacheSettings,
    DeviceSettings,
    ModelSettings,
)
from engine.scheduler import Scheduler

EVERYTHING = Wants(logprobs=True, prompt_logprobs_from=0, top=2)


def tiny_sizes(context: int) -> dict[str, Any]:
    """Of a random model that has all there is: grouped queries, and sides no power of two."""
    return {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "eos_token_id": None,
        "initializer_range": 0.2,
    }


@dataclass(frozen=True, slots=True)
class Schedule:
    """Submissions, the step before which each arrives, and how little room there is."""

    submissions: list[Submission]
    arrivals: list[int]
    step_tokens: int
    page_tokens: int
    pages: int
    max_running: int

    @classmethod
    def random(cls, rng: random.Random, vocabulary: int) -> Schedule:
        """Prompts that share beginnings, in a cache that all of them together overflow."""
        stems = [random_ids(rng, 40, vocabulary) for _ in range(2)]
        submissions = [
            Submission(
                id=str(number),
                prompt=(*rng.choice(stems)[: rng.randint(0, 40)], *random_ids(rng, 9, vocabulary)),
                sampling=SamplingParams(max_new_tokens=rng.randint(1, 110)),
                seed=0,
            )
            for number in range(8)
        ]
        page_tokens = rng.choice([1, 4, 16])
        return cls(
            submissions,
            arrivals=[rng.randint(0, 25) for _ in submissions],
            step_tokens=rng.choice([5, 17, 64]),
            page_tokens=page_tokens,
            pages=-(-200 // page_tokens),  # the longest needs 159 positions
            max_running=rng.randint(3, 8),
        )


class Driver(Scheduler):
    """A scheduler that accounts for every page after every step."""

    def answer(self, submission: Submission) -> tuple[int, ...]:
        """The tokens of one submission, with nothing else in the batch and nothing cached."""
        self.flush()
        self.submit(submission)
        return tuple(token for delta in self.drain() for token in delta.tokens)

    def answers(self, schedule: Schedule) -> list[tuple[int, ...]]:
        """The tokens of every submission, which arrive while others run."""
        tokens: dict[str, list[int]] = {each.id: [] for each in schedule.submissions}
        step = 0
        while step <= max(schedule.arrivals) or self.busy:
            for submission, arrival in zip(schedule.submissions, schedule.arrivals, strict=True):
                if arrival == step:
                    self.submit(submission)
            for delta in self.advance(0).deltas:
                tokens[delta.id] += delta.tokens
            self.cache.check()
            step += 1
        assert self.cache.leased == 0
        return [tuple(found) for found in tokens.values()]

    @property
    def busy(self) -> bool:
        load: Load = self.load()
        return bool(load.running or load.waiting)

    def drain(self) -> list[Delta]:
        deltas = []
        while self.busy:
            deltas += self.advance(0).deltas
            self.cache.check()
        return deltas


def open_scheduler(
    folder: Path,
    *,
    step_tokens: int = 512,
    page_tokens: int = 16,
    pages: int = 1024,
    max_running: int = 16,
    dtype: Any = "float32",
) -> Driver:
    """The native backend over `folder`, on the CPU."""
    settings = BackendSettings(
        impl="hf",
        model=ModelSettings(local_dir=str(folder), dtype=dtype),
        device=DeviceSettings(device="cpu"),
        cache=CacheSettings(page_tokens=page_tokens, budget_tokens=pages * page_tokens),
        batch=BatchSettings(max_running=max_running, max_step_tokens=step_tokens),
    )
    return cast(Driver, open_backend(settings, _drive))


def _drive(executor: StepExecutor) -> Driver:
    return Driver(executor)


def random_ids(rng: random.Random, count: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(rng.randrange(vocabulary) for _ in range(count))


def random_prompts(
    rng: random.Random, count: int, longest: int, vocabulary: int
) -> list[tuple[int, ...]]:
    return [random_ids(rng, rng.randint(1, longest), vocabulary) for _ in range(count)]


def check_against(
    reference: Any,
    scheduler: Driver,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    tolerance: float,
) -> None:
    """Answer all prompts at once; assert that tokens and log-probabilities are transformers'."""
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(max_new_tokens=new_tokens)
        scheduler.submit(Submission(str(number), tuple(prompt), sampling, 0, EVERYTHING))
    found: dict[str, list[Delta]] = {}
    for delta in scheduler.drain():
        found.setdefault(delta.id, []).append(delta)
    for number, prompt in enumerate(prompts):
        _check_answer(reference, prompt, found[str(number)], tolerance)


def _check_answer(
    reference: Any, prompt: Sequence[int], deltas: list[Delta], tolerance: float
) -> None:
    """One forward pass over prompt and answer tells every token that transformers would choose."""
    answer = [token for delta in deltas for token in delta.tokens]
    ids = [*prompt, *answer]
    with torch.inference_mode():
        logits = reference(torch.tensor([ids]), use_cache=False).logits[0].float()
    expected = logits.log_softmax(-1)
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    scores = [
        *(score for delta in deltas for score in delta.prompt_logprobs),
        *(score for delta in deltas for score in delta.logprobs),
    ]
    assert [score.token for score in scores] == ids[1:]
    for row, score in zip(expected, scores, strict=False):
        _check_score(row, score, tolerance)


def _check_score(expected: torch.Tensor, score: TokenLogprob, tolerance: float) -> None:
    assert abs(score.logprob - expected[score.token].item()) < tolerance
    best = expected.topk(len(score.top)).values.tolist()
    for (token, logprob), wanted in zip(score.top, best, strict=True):
        assert abs(logprob - wanted) < tolerance
        assert abs(expected[token].item() - wanted) < tolerance
