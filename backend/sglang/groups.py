"""Answers of one group share a prompt: all but the first wait until it is computed, and find it in
the cache then.
"""

from __future__ import annotations

from collections import deque

from backend.sglang.answers import Answer


class Groups:
    """Who waits for whom. Owned by the backend."""

    def __init__(self) -> None:
        self._ahead: dict[str, Answer] = {}  # by group: whose prompt is under way
        self._behind: dict[str, deque[Answer]] = {}

    def holds(self, answer: Answer) -> bool:
        """Whether `answer` has to wait. If not, the others of its group wait for it."""
        group = answer.submission.group
        if group is None:
            return False
        if group in self._ahead:
            self._behind[group].append(answer)
            return True
        self._ahead[group], self._behind[group] = answer, deque()
        return False

    def release(self, answer: Answer) -> list[Answer]:
        """Those that waited for `answer`, which has come so far that none needs to, or is gone."""
        group = answer.submission.group
        if group is None or self._ahead.get(group) is not answer:
            return []
        del self._ahead[group]
        return list(self._behind.pop(group))

    def remove(self, answer: Answer) -> None:
        """It waits no longer, if it did."""
        waiting = self._behind.get(answer.submission.group or "", deque())
        if answer in waiting:
            waiting.remove(answer)
