"""The file of results: numbers under flat keys, merged in as they are measured.

What a call does not measure stays as it was; `parts` says at which commit each part was measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backend.interface import RequestRefused
from bench.cuda_check.goals import verdicts
from bench.summary import percentile


class Results:
    """One file. Written after each change, so that a call that is cut has kept what it had."""

    def __init__(self, path: Path) -> None:
        """Raises RequestRefused when there is a file of another kind."""
        self._path = path
        self._values = _read(path)
        self.fresh: dict[str, Any] = {}  # measured by this call

    def add(self, new: Mapping[str, Any]) -> dict[str, Any]:
        """Take in what was measured. Returns what is new, numbers that follow from it included.

        The runs of a key that this call has measured before are joined: a measurement may be
        repeated.
        """
        for key, value in new.items():
            runs = self.fresh.get(key)
            self.fresh[key] = runs + value if isinstance(runs, list) else value
        follows = derived(self.fresh)
        self.fresh |= follows
        self._write(self.fresh)
        return {key: self.fresh[key] for key in (*new, *follows)}

    def conclude(self, part: str, facts: Mapping[str, Any]) -> None:
        """Say how a part went."""
        self._write({"parts": {**self._values.get("parts", {}), part: dict(facts)}})

    def _write(self, values: Mapping[str, Any]) -> None:
        self._values |= values
        goals = {verdict.goal.key: verdict.as_json() for verdict in verdicts(self._values)}
        text = json.dumps({**self._values, "goals": goals}, indent=1)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(f"{self._path.name}.part")
        draft.write_text(f"{text}\n", encoding="utf-8")
        os.replace(draft, self._path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RequestRefused(f"--out {path} is there and holds no JSON object", "out")
    return found


def derived(values: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from several measurements of one call."""
    found: dict[str, Any] = {}
    starts = values.get("starts_to_first_token_s", [])
    names = ("first_start_to_first_token_s", "start_to_first_token_s")
    found |= zip(names, starts, strict=False)
    if "memory_forecast_errors" in values:
        found["memory_forecast_error"] = max(values["memory_forecast_errors"])
    for name, above, below in SHARES:
        if above in values and below in values:
            found[name] = round(_middle(values[above]) / _middle(values[below]), 4)
    return found


# a share, of what, and what it is a share of
SHARES = (
    ("http_share_of_offline", "http_output_tokens_per_s", "http_offline_output_tokens_per_s"),
    ("deterministic_share", "deterministic_output_tokens_per_s", "usual_output_tokens_per_s"),
    ("sglang_share_of_direct", "sglang_output_tokens_per_s", "sglang_direct_output_tokens_per_s"),
    (
        "sglang_share_of_direct_streamed",
        "sglang_output_tokens_per_s",
        "sglang_direct_streamed_output_tokens_per_s",
    ),
    ("shared_prefix_gain", "shared_prefix_tokens_per_s", "shared_prefix_uncached_tokens_per_s"),
)


def _middle(runs: list[float]) -> float:
    middle = percentile(runs, 50)
    assert middle is not None  # a measurement that measured nothing has failed
    return middle
