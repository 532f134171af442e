"""One prompt end to end in this process: prefill, decode, streaming, cache. The exit code says pass
or fail.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from backend.interface import BackendFailed, Finish, SamplingParams
from bench.script import Parser, positive, process_age, run_script, start_log
from config import read_settings

if TYPE_CHECKING:
    from engine.llm import LLM


@dataclass(slots=True)
class Streamed:
    """An answer as it came."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish: Finish | None = None
    process_s: float = 0.0  # from the start of the process to the first token
    first_s: float = 0.0  # from submission to the first token
    whole_s: float = 0.0  # from submission to the end

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first."""
        return (len(self.token_ids) - 1) / max(self.whole_s - self.first_s, 1e-9)


def parser() -> Parser:
    """The command line."""
    options = Parser(prog="smoke_test.py", description=__doc__)
    options.add_argument("prompt", nargs="?", default="Hello mini-sglang")
    options.add_argument("--max-new-tokens", type=positive, default=32, metavar="N")
    return options


def stream(llm: LLM, prompt: str, sampling: SamplingParams) -> Streamed:
    """Answer `prompt` on stdout, piece by piece."""
    seen = Streamed()
    start = time.perf_counter()
    for delta in llm.stream(prompt, sampling):
        if delta.token_ids and not seen.token_ids:
            seen.first_s = time.perf_counter() - start
            seen.process_s = process_age()
        sys.stdout.write(delta.text)
        sys.stdout.flush()
        seen.text += delta.text
        seen.token_ids += delta.token_ids
        seen.finish = delta.finish
    seen.whole_s = time.perf_counter() - start
    if seen.finish is not None and seen.finish.reason == "error":
        raise BackendFailed(seen.finish.message or "the answer ended with an error")
    return seen


def checks(
    llm: LLM, prompt: str, sampling: SamplingParams, seen: Streamed, prefix_cache: bool
) -> Iterator[tuple[bool, str]]:
    """What must hold, and whether it does. Answers `prompt` twice more, not streamed: from an empty
    cache, so that every step is the same as before, and from a full one.
    """
    llm.engine.flush()
    answer, again = (llm.generate(prompt, sampling)[0] for _ in range(2))
    yield len(seen.token_ids) > 0, f"{len(seen.token_ids)} tokens were streamed"
    yield (
        (answer.text, answer.token_ids) == (seen.text, seen.token_ids),
        "the whole answer equals the streamed one",
    )
    # the last prompt token is always computed: its logits give the first token of the answer
    whole_pages = (again.prompt_tokens - 1) // llm.spec.page_tokens
    expected = whole_pages * llm.spec.page_tokens if prefix_cache else 0
    yield (
        again.cached_tokens == expected,
        f"the cache answered {again.cached_tokens} of {again.prompt_tokens} prompt tokens "
        f"at the end, {expected} were expected",
    )
    load = llm.engine.load()
    yield load.pages_leased == 0, f"{load.pages_leased} of {load.pages_total} pages are leased"


def main() -> int:
    """Run, report on stdout, and say 0 or 1."""
    options = parser().parse_args()
    settings = read_settings()
    start_log(settings.log_level)
    from engine.llm import LLM  # after the flags, so that a wrong one is told at once

    sampling = SamplingParams(max_new_tokens=options.max_new_tokens)
    with LLM(settings) as llm:
        seen = stream(llm, options.prompt, sampling)
        sys.stdout.write(
            f"\n\nfirst token {seen.process_s:.2f} s after the start of the process, "
            f"{1000 * seen.first_s:.0f} ms after submission; then {seen.decode_rate:.1f} tokens/s\n"
        )
        results = list(checks(llm, options.prompt, sampling, seen, settings.backend.cache.prefix))
    for holds, what in results:
        sys.stdout.write(f"{'ok  ' if holds else 'FAIL'} {what}\n")
    passed = all(holds for holds, _ in results)
    sys.stdout.write("pass\n" if passed else "fail\n")
    return 0 if passed else 1


if __name__ == "__main__":
    run_script(main)
