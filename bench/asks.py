"""What a load over HTTP asks for: prompts from a file, a workload or a generator, as requests."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from backend.interface import RequestRefused
from bench.workloads import LARGE_VOCABULARY, WORKLOADS

Prompt = str | tuple[int, ...]  # text or token ids


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    prompt: Prompt
    new_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class Manner:
    """What the requests of one source have in common."""

    new_tokens: int
    temperature: float
    seed: int  # of the first; each has the next one
    ignore_eos: bool

    def asks(self, prompts: Sequence[str]) -> list[Ask]:
        """One request for each prompt."""
        return [
            Ask(prompt, self.new_tokens, self.temperature, self.seed + number, self.ignore_eos)
            for number, prompt in enumerate(prompts)
        ]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the requests of every run come from."""

    name: str
    count: int  # of one run
    draw: Callable[[str, int], list[Ask]]  # by the run's name and the size of the vocabulary


def random_source(count: int, tokens: int, manner: Manner) -> Source:
    """Prompts of about `tokens` tokens, new ones in each run, so that no cache answers them."""

    def draw(run: str, _: int) -> list[Ask]:
        return manner.asks(random_prompts(count, tokens, f"{manner.seed}-{run}"))

    return Source("random prompts", count, draw)


def text_source(name: str, prompts: Sequence[str], count: int, manner: Manner) -> Source:
    """`count` of the given prompts, from the first again after the last."""
    asks = manner.asks(list(islice(cycle(prompts), count)))
    return Source(name, count, lambda *_: asks)


def workload_source(name: str, count: int | None, seed: int) -> Source:
    """The first `count` requests of a workload, or all. Raises RequestRefused."""

    def draw(_: str, vocabulary: int) -> list[Ask]:
        workload = WORKLOADS[name](vocabulary)
        jobs = (workload.first(count) if count else workload).jobs
        return [
            Ask(job.prompt, job.new_tokens, workload.temperature, seed + number, True)
            for number, job in enumerate(jobs)
        ]

    return Source(name, len(draw("", LARGE_VOCABULARY)), draw)


def random_prompts(count: int, tokens: int, seed: str) -> list[str]:
    """Prompts that share no prefix: single letters, each a token with the space before it in most
    vocabularies. The server counts what they come to.
    """
    draw = random.Random(seed)
    return [" ".join(draw.choices(string.ascii_lowercase, k=tokens)) for _ in range(count)]


def read_prompts(path: str) -> list[str]:
    """The lines of a text file that are not blank, or each "prompt" of a .jsonl file.

    Raises RequestRefused when the file cannot be read or holds none.
    """
    read = _from_json if path.endswith(".jsonl") else str
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        prompts = [read(line) for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestRefused(f"--prompts {path} cannot be read: {error}", "prompts") from None
    except (ValueError, KeyError, TypeError):
        raise RequestRefused(
            f'--prompts {path}: each line must be a JSON object with a text as its "prompt"',
            "prompts",
        ) from None
    if not prompts:
        raise RequestRefused(f"--prompts {path} holds no prompt", "prompts")
    return prompts


def _from_json(line: str) -> str:
    prompt = json.loads(line)["prompt"]
    if not isinstance(prompt, str):
        raise TypeError(prompt)
    return prompt
