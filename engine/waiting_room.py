"""Who waits, in which order, for how long: the one queue in front of a backend.

Owned by whoever admits requests (an engine without a pool, or the pool of replicas). Highest
priority first, then first come, first served. The bound and the honest answer beyond it are here
too.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

from backend.interface import Overloaded, Submission
from config import QueueSettings

LOOK_AHEAD = 8  # who a backend holds beyond its rows, so that a freed row is filled at once
DEPARTURES_REMEMBERED = 64  # enough to smooth a burst, few enough to follow the load
WAIT_UNKNOWN_S = 1.0  # what is said while nothing has left yet


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request with its place in line."""

    priority: int
    number: int
    submission: Submission
    since: float  # when it came

    @property
    def place(self) -> tuple[int, int]:
        """Sorts the next one first."""
        return -self.priority, self.number


class WaitingRoom:
    """A bounded queue of submissions. Times are `time.monotonic()` seconds, given by the caller."""

    def __init__(self, settings: QueueSettings) -> None:
        self.bound = settings.max_queued  # may be changed while requests wait; 0: none
        self._line: list[Waiting] = []
        self._count = 0
        self._departures: deque[float] = deque()  # of those who had to wait
        self._counted_from = 0.0  # the departure before these, or when the line began

    def __len__(self) -> int:
        return len(self._line)

    def check(self, count: int, free: int, now: float) -> None:
        """Raise Overloaded when `count` more are too many. The bound is not for the first `free` of
        all who wait: they leave at once.
        """
        depth = max(0, len(self._line) - free)
        excess = len(self._line) + count - free - self.bound
        if self.bound and excess > 0:
            raise Overloaded(
                f"{depth} requests wait and {count} more are too many (MAX_QUEUED={self.bound}): "
                "try again later",
                queue_depth=depth,
                retry_after_s=self.expected_wait(excess, now),
                est_wait_s=self.expected_wait(depth, now),
            )

    def push(self, submission: Submission, now: float) -> None:
        """Queue a submission that `check` had room for."""
        if not self._line:
            self._departures.clear()
            self._counted_from = now
        waiting = Waiting(submission.priority, self._count, submission, now)
        insort(self._line, waiting, key=_place)
        self._count += 1

    def next(self, now: float) -> Submission | None:
        """Take the first in line; None when nobody waits."""
        if not self._line:
            return None
        first = self._line.pop(0)
        if now > first.since:  # who is served at once says how fast requests come, no more
            self._departures.append(now)
        if len(self._departures) > DEPARTURES_REMEMBERED:
            self._counted_from = self._departures.popleft()
        return first.submission

    def expire(self, now: float) -> list[Submission]:
        """Take out everybody whose deadline has passed."""
        late = [each for each in self._line if _is_late(each.submission, now)]
        if late:
            self._line = [each for each in self._line if not _is_late(each.submission, now)]
        return [each.submission for each in late]

    def remove(self, id: str) -> bool:
        """Take out one submission. False when it does not wait here."""
        position = self.position(id)
        if position is None:
            return False
        del self._line[position]
        return True

    def position(self, id: str) -> int | None:
        """How many are ahead of `id`; None when it does not wait here."""
        ids = (index for index, each in enumerate(self._line) if each.submission.id == id)
        return next(ids, None)

    def clear(self) -> list[Submission]:
        """Take out everybody."""
        everybody, self._line = self._line, []
        return [each.submission for each in everybody]

    def expected_wait(self, ahead: int, now: float) -> float:
        """Seconds until `ahead` requests have left, by the rate at which the last ones did.

        It grows while nobody leaves.
        """
        if not self._departures:
            return WAIT_UNKNOWN_S
        return ahead * (now - self._counted_from) / len(self._departures)


def _place(waiting: Waiting) -> tuple[int, int]:
    return waiting.place


def _is_late(submission: Submission, now: float) -> bool:
    return submission.deadline is not None and submission.deadline <= now
