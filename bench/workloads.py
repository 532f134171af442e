"""What a benchmark asks for: prompts as token ids, and how many tokens each answer has.

Made by seeded generators, so that every machine and every engine gets the same requests. Ends are
ignored: an answer is as long as its job says.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from backend.interface import Grammar, RequestRefused

LARGE_VOCABULARY = 1 << 30  # folds nothing: no vocabulary is larger


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a workload."""

    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of submission."""

    name: str
    jobs: tuple[Job, ...]
    temperature: float = 0.0
    grammar: Grammar | None = None  # that binds every answer

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(job.prompt) for job in self.jobs)

    @property
    def new_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(job.new_tokens for job in self.jobs)

    def first(self, count: int) -> Workload:
        """The same with the first `count` requests. Raises RequestRefused when there are fewer."""
        if count > len(self.jobs):
            raise RequestRefused(
                f"workload {self.name} has {len(self.jobs)} requests, {count} were asked for: "
                "lower --num-requests",
                "num_requests",
            )
        return replace(self, jobs=self.jobs[:count])

    def warm_up(self, count: int, prompt_tokens: int, new_tokens: int) -> Workload:
        """The first `count` requests cut short, to be run before the clock starts."""
        jobs = tuple(
            Job(job.prompt[:prompt_tokens], min(job.new_tokens, new_tokens))
            for job in self.jobs[:count]
        )
        return replace(self, name="warm-up", jobs=jobs)


def reference(vocabulary: int) -> Workload:
    """256 requests, 100 to 1024 tokens in and out, temperature 0.6: the one that the engines on a
    large GPU are compared by.

    Ids that a small vocabulary does not have are folded into it.
    """
    draw = random.Random(0)
    prompts = [
        tuple(draw.randint(0, 10000) % vocabulary for _ in range(draw.randint(100, 1024)))
        for _ in range(256)
    ]
    lengths = [draw.randint(100, 1024) for _ in prompts]
    return Workload("reference", tuple(map(Job, prompts, lengths)), temperature=0.6)


def mix(vocabulary: int) -> Workload:
    """32 requests, 32 to 256 tokens in and 32 to 128 out, greedy: the one for small machines.

    Ids that a small vocabulary does not have are folded into it.
    """
    draw = random.Random(154885)
    lengths = [(draw.randint(32, 256), draw.randint(32, 128)) for _ in range(32)]
    return Workload("mix", tuple(Job(_ids(draw, count, vocabulary), new) for count, new in lengths))


def alike(count: int, prompt_tokens: int, new_tokens: int, vocabulary: int, seed: int) -> Workload:
    """`count` requests of one shape, greedy. Another seed gives other prompts, so that nothing is
    answered by the prefix cache.
    """
    draw = random.Random(seed)
    jobs = (Job(_ids(draw, prompt_tokens, vocabulary), new_tokens) for _ in range(count))
    return Workload(f"{count} alike", tuple(jobs))


def shared_prefixes(
    groups: int, members: int, shared: int, own: int, new_tokens: int, vocabulary: int
) -> Workload:
    """`groups` prefixes of `shared` tokens, each in front of the `own` tokens of `members`
    requests, greedy; the first request of every group, then the second of every group, and so on.
    """
    draw = random.Random(0)
    prefixes = [_ids(draw, shared, vocabulary) for _ in range(groups)]
    jobs = tuple(
        Job((*prefix, *_ids(draw, own, vocabulary)), new_tokens)
        for _ in range(members)
        for prefix in prefixes
    )
    return Workload("shared prefixes", jobs)


def repeated(prompt: tuple[int, ...], new_tokens: int, count: int) -> Workload:
    """One prompt, `count` times, greedy."""
    return Workload("prompt", (Job(prompt, new_tokens),) * count)


def _ids(draw: random.Random, count: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(draw.randrange(40_000) % vocabulary for _ in range(count))


WORKLOADS: dict[str, Callable[[int], Workload]] = {"reference": reference, "mix": mix}
