"""From the start of a process to its first token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from backend.interface import BackendFailed, SamplingParams
from bench.script import process_age
from config import Settings

PROMPT = tuple(range(100, 132))


def start(settings: Settings) -> Iterator[Mapping[str, Any]]:
    """What this process has taken when its first token is there, and how far it was before."""
    from engine.llm import LLM

    imported = process_age()
    with LLM(settings) as llm:
        loaded = process_age()
        sampling = SamplingParams(max_new_tokens=1, ignore_eos=True)
        answer = llm.generate(PROMPT, sampling)[0]
        age = process_age()
    if not answer.token_ids:
        raise BackendFailed(f"there was no first token: {answer.finish.message}")
    phases = {"imported_s": imported, "loaded_s": loaded, "first_token_s": age}
    yield {
        "starts_to_first_token_s": [round(age, 3)],
        "start_phases": [{name: round(value, 3) for name, value in phases.items()}],
    }
