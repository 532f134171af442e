"""What one H200 must reach with the shape of Qwen3-0.6B, and whether it does. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.summary import percentile

HEADER = ("", "measured", "must", "aim", "met")


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound that must hold and one that is aimed at."""

    key: str  # of the results
    what: str
    must: float
    aim: float
    form: str  # format of its numbers
    more: bool = False  # is better; else less is

    def judge(self, values: Mapping[str, Any]) -> Verdict | None:
        """None: it was not measured. Of several runs the median counts."""
        found = values.get(self.key)
        measured = percentile(found, 50) if isinstance(found, list) else found
        return None if measured is None else Verdict(self, measured)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal beside what was measured."""

    goal: Goal
    measured: float

    @property
    def must_met(self) -> bool:
        """Whether what must hold does."""
        return self._meets(self.goal.must)

    @property
    def aim_met(self) -> bool:
        """Whether the aim is reached, too."""
        return self._meets(self.goal.aim)

    def _meets(self, bound: float) -> bool:
        return self.measured >= bound if self.goal.more else self.measured <= bound

    def row(self) -> tuple[str, ...]:
        """Under HEADER."""
        goal = self.goal
        numbers = (format(value, goal.form) for value in (self.measured, goal.must, goal.aim))
        return goal.what, *numbers, self.word()

    def word(self) -> str:
        """What it comes to."""
        return "aim" if self.aim_met else "must" if self.must_met else "MISSED"

    def as_json(self) -> dict[str, object]:
        """For the file."""
        return {
            "what": self.goal.what,
            "measured": self.measured,
            "must": self.goal.must,
            "aim": self.goal.aim,
            "must_met": self.must_met,
            "aim_met": self.aim_met,
        }


GOALS = (
    Goal("failed_tests", "GPU tests that failed", 0, 0, ".0f"),
    Goal(
        "reference_output_tokens_per_s",
        "reference workload, output tokens/s",
        26_000,
        30_000,
        ",.0f",
        more=True,
    ),
    Goal("batch1_ms_per_token", "batch 1, ms a token", 1.1, 0.6, ".3f"),
    Goal("ttft_4096_ms", "first token of a prompt of 4096, ms", 13, 10, ".2f"),
    Goal("start_to_first_token_s", "process start to first token, s", 12, 7, ".2f"),
    Goal("http_share_of_offline", "HTTP as a share of offline", 0.85, 0.95, ".1%", more=True),
    Goal(
        "sglang_share_of_direct",
        "SGLang through our backend, as a share of itself driven directly",
        0.95,
        0.98,
        ".1%",
        more=True,
    ),
    Goal("memory_forecast_error", "memory forecast, off by", 0.03, 0.03, ".2%"),
)


def verdicts(values: Mapping[str, Any], goals: Iterable[Goal] = GOALS) -> Iterator[Verdict]:
    """Of every goal that was measured."""
    for goal in goals:
        if (verdict := goal.judge(values)) is not None:
            yield verdict
