"""Replicas behind a placement policy, in virtual time: what each policy does to the same requests.

Every replica is a real scheduler with a real cache over the fake device. Only time is made up: a
step takes a base and a little for each token. As in the pool, a replica has its rows full and a
small look-ahead at most, and all others wait in one line, first come, first served.

`python -m tests.engine.fleet_simulation` prints the table of `docs/benchmarks.md`.
"""

from __future__ import annotations

import heapq
import random
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from backend.fake import open_backend
from backend.interface import SamplingParams, StepOutput, Submission
from config import BackendSettings, BatchSettings, CacheSettings
from engine.placement import PLACEMENTS, CacheAware, Placement
from engine.scheduler import Scheduler
from engine.waiting_room import LOOK_AHEAD

REPLICAS = 4
PAGE_TOKENS = 16
CACHE_TOKENS = 49_152  # of a replica
MAX_RUNNING = 16
STEP_TOKENS = 512
STEP_S = 0.010  # a step
TOKEN_S = 0.0001  # and more for each of its tokens

PREFIX_TOKENS = 2048
GROUPS = 64
OWN_TOKENS = 64  # of a prompt, behind the prefix that it shares
NEW_TOKENS = 16  # of an answer


@dataclass(frozen=True)
class Arrival:
    """A request, and when it comes, in seconds."""

    at: float
    submission: Submission


@dataclass
class Outcome:
    """What became of a request. Times are virtual seconds."""

    arrival: float
    prompt: int  # tokens
    replica: int
    cached: int = 0  # of the prompt
    first: float = 0.0  # when its first token came
    ended: float = 0.0


@dataclass
class Replica:
    """An engine: a scheduler, and the output of the step that it is in."""

    backend: Scheduler
    under_way: StepOutput | None = None
    requests: int = 0  # ever given to it


@dataclass
class Fleet:
    """The pool of replicas, as far as placement goes."""

    placement: Placement
    replicas: list[Replica] = field(
        default_factory=lambda: [open_replica() for _ in range(REPLICAS)]
    )
    line: deque[Arrival] = field(default_factory=deque)  # who waits for a free replica
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def run(self, arrivals: Sequence[Arrival]) -> None:
        """Serve all of `arrivals`, in order of time, to the end."""
        number = count()
        events: list[tuple[float, int, Arrival | int]] = [
            (arrival.at, next(number), arrival) for arrival in arrivals
        ]  # a request comes, or the step of a replica ends
        while events:
            now, _, what = heapq.heappop(events)
            if isinstance(what, Arrival):
                self.line.append(what)
            else:
                self._settle(what, now)
            self._place()
            for index, seconds in self._launch():
                heapq.heappush(events, (now + seconds, next(number), index))

    def _place(self) -> None:
        limit = MAX_RUNNING + LOOK_AHEAD
        while self.line:
            free = [i for i in range(REPLICAS) if self.placement.inflight(i) < limit]
            if not free:
                return
            arrival = self.line.popleft()
            submission = arrival.submission
            index = self.placement.choose(submission, free)
            self.outcomes[submission.id] = Outcome(arrival.at, len(submission.prompt), index)
            self.replicas[index].backend.submit(submission)

    def _launch(self) -> Iterator[tuple[int, float]]:
        """Start a step wherever one can be. Yields the replica and the seconds that it takes."""
        for index, replica in enumerate(self.replicas):
            if replica.under_way is None and self.placement.inflight(index):
                replica.under_way = replica.backend.advance(0.0)
                yield index, STEP_S + TOKEN_S * replica.under_way.step_tokens

    def _settle(self, index: int, now: float) -> None:
        output = self.replicas[index].under_way
        assert output is not None
        self.replicas[index].under_way = None
        self.placement.cached(index, output.entered, output.evicted)
        for delta in output.deltas:
            outcome = self.outcomes[delta.id]
            if delta.cached is not None:
                outcome.cached, outcome.first = delta.cached, now
                self.placement.began(delta.id)
            if delta.finish is not None:
                outcome.ended = now
                self.placement.ended(delta.id)


def open_replica() -> Replica:
    settings = BackendSettings(
        cache=CacheSettings(page_tokens=PAGE_TOKENS, budget_tokens=CACHE_TOKENS),
        batch=BatchSettings(max_running=MAX_RUNNING, max_step_tokens=STEP_TOKENS),
    )
    backend = open_backend(settings, Scheduler)
    assert isinstance(backend, Scheduler)
    return Replica(backend)


class LongestMatch(CacheAware):
    """For comparison: what cache_aware would be with no eye for the load."""

    def _cost(self, replica: int, missing: int) -> int:
        return missing


POLICIES: dict[str, type[Placement]] = {**PLACEMENTS, "(longest match)": LongestMatch}


# Workloads


def arrivals(
    prompt: Callable[[random.Random], Sequence[int]], requests: int, rate: float, seed: int
) -> list[Arrival]:
    """Poisson arrivals, `rate` a second."""
    chance = random.Random(seed)
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    result, at = [], 0.0
    for number in range(requests):
        at += chance.expovariate(rate)
        submission = Submission(str(number), tuple(prompt(chance)), sampling, seed=number)
        result.append(Arrival(at, submission))
    return result


def ids(chance: random.Random, length: int) -> list[int]:
    return list(chance.randbytes(length))


def shared(groups: int) -> Callable[[random.Random], Sequence[int]]:
    """Prompts that each share a prefix with one group of them."""
    prefixes = [ids(random.Random(group), PREFIX_TOKENS) for group in range(groups)]
    return lambda chance: [*chance.choice(prefixes), *ids(chance, OWN_TOKENS)]


def unshared(chance: random.Random) -> Sequence[int]:
    """Prompts of many lengths that share nothing."""
    return ids(chance, chance.randrange(64, 1024))


WORKLOADS: dict[str, Callable[[int], list[Arrival]]] = {
    "shared prefixes": lambda seed: arrivals(shared(GROUPS), 600, 14.0, seed),
    "one hot prefix": lambda seed: arrivals(shared(1), 800, 120.0, seed),
    "nothing shared": lambda seed: arrivals(unshared, 400, 30.0, seed),
}


# Results


@dataclass(frozen=True)
class Report:
    """How one policy did. Times in seconds."""

    hit_rate: float  # cached over all prompt tokens
    ttft_p50: float
    ttft_p99: float
    e2e_p99: float
    spread: float  # requests of the busiest replica over the mean


def simulate(policy: str, workload: str, seed: int = 0) -> Report:
    """Run one of WORKLOADS under one of POLICIES."""
    fleet = Fleet(POLICIES[policy](PAGE_TOKENS, seed))
    fleet.run(WORKLOADS[workload](seed))
    outcomes = list(fleet.outcomes.values())
    ttft = [each.first - each.arrival for each in outcomes]
    given = [sum(each.replica == index for each in outcomes) for index in range(REPLICAS)]
    return Report(
        hit_rate=sum(each.cached for each in outcomes) / sum(each.prompt for each in outcomes),
        ttft_p50=percentile(ttft, 50),
        ttft_p99=percentile(ttft, 99),
        e2e_p99=percentile([each.ended - each.arrival for each in outcomes], 99),
        spread=max(given) / statistics.mean(given),
    )


def percentile(values: Sequence[float], share: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]


HEAD = """\
| workload | policy | hit rate | TTFT p50, ms | TTFT p99, ms | e2e p99, ms | max/mean requests |
| --- | --- | --- | --- | --- | --- | --- |
"""


def table(seed: int = 0) -> str:
    """All policies under all workloads, as Markdown."""
    rows = []
    for workload in WORKLOADS:
        for policy in POLICIES:
            it = simulate(policy, workload, seed)
            times = (f"{1000 * each:.0f}" for each in (it.ttft_p50, it.ttft_p99, it.e2e_p99))
            cells = (workload, policy, f"{it.hit_rate:.0%}", *times, f"{it.spread:.2f}")
            rows.append(f"| {' | '.join(cells)} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(table())
