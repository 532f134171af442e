"""Chat in a terminal. Ctrl-C stops an answer, /reset forgets what was said, /exit ends."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count
from typing import TYPE_CHECKING

from backend.interface import BackendFailed, Finish, RequestRefused, SamplingParams, Unavailable
from bench.chat import Chat, Counts, Message, Piece, RemoteChat
from bench.http_connection import Address, key_of
from bench.script import Parser, positive, run_script, start_log
from config import Settings, read_settings

if TYPE_CHECKING:
    from rich.console import Console

    from engine.llm import LLM


def parse() -> argparse.Namespace:
    """The command line. What contradicts itself is an error."""
    parser = Parser(prog="cli_demo.py", description=__doc__)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="length of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: greedy")
    parser.add_argument("--seed", type=int, help="of the first answer; the next counts on from it")
    parser.add_argument(
        "--base-url", metavar="URL", help="of a server that runs, to ask instead of loading a model"
    )
    parser.add_argument("--api-key", metavar="KEY", help="of it; default: the first one of API_KEY")
    options = parser.parse_args()
    if options.api_key is not None and options.base_url is None:
        parser.error("--api-key goes with --base-url")
    return options


@dataclass(frozen=True, slots=True)
class LocalChat:
    """The model in this process."""

    llm: LLM
    sampling: SamplingParams

    @property
    def title(self) -> str:
        spec = self.llm.spec
        return f"{spec.model} on {spec.device}, {spec.dtype}"

    def stream(self, messages: Sequence[Message], seed: int | None) -> Generator[Piece, None, None]:
        prompt = self.llm.encode_chat(messages)
        tokens = 0
        with closing(self.llm.stream(prompt, self.sampling, seed=seed)) as pieces:
            for piece in pieces:
                tokens += len(piece.token_ids)
                counts = Counts(piece.prompt_tokens, piece.cached_tokens, tokens)
                yield Piece(piece.text, _reason(piece.finish), counts)


def _reason(finish: Finish | None) -> str | None:
    """Why an answer ended. Raises BackendFailed for one that failed: so will the next."""
    if finish is None:
        return None
    if finish.reason == "error":
        raise BackendFailed(finish.message or "the answer failed")
    return finish.reason


@dataclass(slots=True)
class Answer:
    """What has come of an answer."""

    text: str = ""
    ending: str = "stopped"  # by the user, as long as no piece says otherwise
    counts: Counts | None = None
    asked: float = field(default_factory=time.perf_counter)
    first: float | None = None  # when the first piece came

    def add(self, piece: Piece) -> None:
        """The next piece."""
        self.first = self.first or time.perf_counter()
        self.text += piece.text
        self.ending = piece.finish or self.ending
        self.counts = piece.counts or self.counts

    def summary(self) -> str:
        """Its closing line. A server counts tokens when the answer has come to its end."""
        if self.first is None:
            return f"({self.ending}) before the first token"
        told = f"({self.ending}), first after {1000 * (self.first - self.asked):.0f} ms"
        if self.counts is None:
            return f"{told}, tokens not counted"
        decode_s = max(time.perf_counter() - self.first, 1e-9)
        return (
            f"{self.counts.answer} tokens {told}, then "
            f"{max(self.counts.answer - 1, 0) / decode_s:.1f} tokens/s, "
            f"cached {self.counts.cached}/{self.counts.prompt} tokens"
        )


@dataclass(slots=True)
class Conversation:
    """All that was said goes with each question, so its prefix is in the cache."""

    chat: Chat
    console: Console
    seeds: Iterator[int | None]
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, question: str) -> None:
        """Answer on stdout, and remember both. A question that is not answered is forgotten."""
        self.messages.append({"role": "user", "content": question})
        try:
            answer = self._answer()
        except RequestRefused as error:
            self._forget(f"{error} (/reset forgets what was said)")
        except Unavailable as error:
            self._forget(str(error))
        else:
            self.messages.append({"role": "assistant", "content": answer.text})
            self.console.print(answer.summary(), style="dim")

    def _answer(self) -> Answer:
        """What came until the end, or until Ctrl-C."""
        answer = Answer()
        try:
            pieces = self.chat.stream(self.messages, next(self.seeds))
            with suppress(KeyboardInterrupt), closing(pieces):
                for piece in pieces:
                    answer.add(piece)
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
        finally:
            sys.stdout.write("\n" if answer.text else "")
        return answer

    def _forget(self, reason: str) -> None:
        self.messages.pop()
        self.console.print(reason, style="red")


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


@contextmanager
def local_chat(settings: Settings, sampling: SamplingParams) -> Iterator[Chat]:
    """The model of this environment, loaded for the time of the block. Raises StartFailed."""
    from engine.llm import LLM

    with LLM(settings) as llm:
        yield LocalChat(llm, sampling)


def chat_of(options: argparse.Namespace, settings: Settings) -> AbstractContextManager[Chat]:
    """Who answers: the server that was named, or else a model in this process."""
    sampling = SamplingParams(
        temperature=options.temperature, max_new_tokens=options.max_new_tokens
    )
    if options.base_url is None:
        return local_chat(settings, sampling)
    key = key_of(options.api_key, settings.server)
    return nullcontext(RemoteChat.connect(Address(options.base_url.rstrip("/"), key), sampling))


def main() -> int:
    """Chat until the user has had enough."""
    options, settings = parse(), read_settings()
    start_log(settings.log_level)
    from rich.console import Console  # after the flags, so that a wrong one is told at once

    console = Console(highlight=False, markup=False)
    with chat_of(options, settings) as chat:
        console.print(f"{chat.title}. {__doc__}", style="dim")
        seeds = iter(lambda: None, 0) if options.seed is None else count(options.seed)
        conversation = Conversation(chat, console, seeds, options.system)
        conversation.reset()
        for question in questions():
            if question == "/reset":
                conversation.reset()
            else:
                conversation.ask(question)
    return 0


if __name__ == "__main__":
    run_script(main)
