"""Chat in a terminal. Ctrl-C stops an answer, /reset forgets what was said, /exit ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count
from typing import TYPE_CHECKING

from backend.interface import BackendFailed, RequestRefused, SamplingParams
from bench.script import Parser, positive, run_script, start_log
from config import read_settings

if TYPE_CHECKING:
    from rich.console import Console

    from engine.llm import LLM


def parser() -> Parser:
    """The command line."""
    options = Parser(prog="cli_demo.py", description=__doc__)
    options.add_argument("--system", metavar="TEXT", help="what the model is told first")
    options.add_argument("--max-new-tokens", type=positive, metavar="N", help="length of an answer")
    options.add_argument("--temperature", type=float, default=0.0, help="0, the default: greedy")
    options.add_argument("--seed", type=int, help="of the first answer; the next counts on from it")
    return options


@dataclass(slots=True)
class Chat:
    """A conversation: all that was said goes with each question, so its prefix is in the cache."""

    llm: LLM
    console: Console
    sampling: SamplingParams
    seeds: Iterator[int | None]
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, question: str) -> None:
        """Answer on stdout, and remember both. A question that cannot be served is forgotten."""
        self.messages.append({"role": "user", "content": question})
        try:
            answer = self._answer()
        except RequestRefused as error:
            self.messages.pop()
            self.console.print(f"{error} (/reset forgets what was said)", style="red")
        else:
            self.messages.append({"role": "assistant", "content": answer})

    def _answer(self) -> str:
        prompt = self.llm.encode_chat(self.messages)
        pieces = self.llm.stream(prompt, self.sampling, seed=next(self.seeds))
        text, tokens, cached, ending = "", 0, 0, "stopped"
        start = first = time.perf_counter()
        with suppress(KeyboardInterrupt), closing(pieces):
            for piece in pieces:
                first = first if tokens else time.perf_counter()
                text += piece.text
                tokens += len(piece.token_ids)
                cached = piece.cached_tokens
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                if piece.finish is not None:
                    if piece.finish.reason == "error":
                        raise BackendFailed(piece.finish.message or "the answer failed")
                    ending = piece.finish.reason
        decode_s = max(time.perf_counter() - first, 1e-9)
        sys.stdout.write("\n")
        self.console.print(
            f"{tokens} tokens ({ending}), first after {1000 * (first - start):.0f} ms, then "
            f"{max(tokens - 1, 0) / decode_s:.1f} tokens/s, cached {cached}/{len(prompt)} tokens",
            style="dim",
        )
        return text


def questions() -> Iterator[str]:
    """What the user types, line by line, until the end of input or /exit."""
    if sys.stdin is None:  # closed by whoever started us
        return
    with suppress(ImportError):
        import_module("readline")  # where it exists, `input` edits lines and knows the last ones
    prompt = "you> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            continue
        if line == "/exit":
            return
        if line:
            yield line


def main() -> int:
    """Chat until the user has had enough."""
    options = parser().parse_args()
    settings = read_settings()
    start_log(settings.log_level)
    sampling = SamplingParams(
        temperature=options.temperature, max_new_tokens=options.max_new_tokens
    )
    from rich.console import Console  # after the flags, so that a wrong one is told at once

    from engine.llm import LLM

    console = Console(highlight=False, markup=False)
    with LLM(settings) as llm:
        spec = llm.spec
        console.print(f"{spec.model} on {spec.device}, {spec.dtype}. {__doc__}", style="dim")
        seeds = iter(lambda: None, 0) if options.seed is None else count(options.seed)
        chat = Chat(llm, console, sampling, seeds, options.system)
        chat.reset()
        for question in questions():
            if question == "/reset":
                chat.reset()
            else:
                chat.ask(question)
    return 0


if __name__ == "__main__":
    run_script(main)
