"""`cli_demo.py --base-url` as a user starts it, with a real server over the fake backend."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import cli_demo
from backend.interface import RequestRefused
from bench.server_process import free_port
from tests.end_to_end.server_process import ServerProcess, eventually, serving

Start = Callable[..., "subprocess.Popen[str]"]

KEY = {"Authorization": "Bearer secret"}
CLOSING = re.compile(r"^(\d+) tokens \((\w+)\), first .* cached (\d+)/(\d+) tokens$", re.MULTILINE)
STOPPED = re.compile(r"^\(stopped\), first after \d+ ms, tokens not counted$", re.MULTILINE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One with a key, whose every token takes a while."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(log, API_KEY="secret, other", FAKE_STEP_MS=50) as server:
        server.ready()
        yield server


@pytest.fixture
def start(root: Path) -> Start:
    """Starts a chat with a server, with the first key of API_KEY."""

    def run(url: str, *arguments: str, **flags: str) -> subprocess.Popen[str]:
        given = {"BACKEND_IMPL": "fake", "API_KEY": "secret, other", "COLUMNS": "200", **flags}
        return subprocess.Popen(
            [sys.executable, "cli_demo.py", *(("--base-url", url) if url else ()), *arguments],
            env={**os.environ, "LOG_LEVEL": "WARNING", **given},
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def talk(chat: subprocess.Popen[str], *lines: str) -> str:
    """All that a chat said to these lines. It must end well."""
    out, err = chat.communicate("".join(f"{line}\n" for line in lines), timeout=60)
    assert (chat.returncode, err) == (0, "")
    return out


def say(chat: subprocess.Popen[str], line: str) -> None:
    assert chat.stdin is not None
    chat.stdin.write(f"{line}\n")
    chat.stdin.flush()


def hear(chat: subprocess.Popen[str]) -> str:
    assert chat.stdout is not None
    return chat.stdout.readline()


def running(server: ServerProcess) -> Any:
    return httpx.get(f"{server.url}/stats", headers=KEY).json()["running"]


def aborted(server: ServerProcess) -> float:
    """Requests that ended in this way, ever."""
    metrics = httpx.get(f"{server.url}/metrics").text
    found = re.search(r'^minisgl_requests_total\{.*"abort".*\} (.*)$', metrics, re.MULTILINE)
    return float(found[1]) if found else 0.0


def control(server: ServerProcess, verb: str) -> None:
    answer = httpx.post(f"{server.url}/control", json={"cmd": verb}, headers=KEY)
    assert answer.status_code == 200, answer.text


def test_a_chat_remembers_what_was_said_and_the_server_caches_it(
    server: ServerProcess, start: Start
) -> None:
    chat = start(server.url, "--max-new-tokens", "4")
    out = talk(chat, "hello", "and now?", "/reset", "hello")
    assert out.startswith(f"fake at {server.url}. ")
    first, second, again = CLOSING.findall(out)
    assert first[:3] == ("4", "length", "0")
    assert int(first[3]) < int(second[3])
    assert 0 < int(second[2]) < int(second[3])
    assert again[3] == first[3]


def test_it_says_what_the_local_chat_says(server: ServerProcess, start: Start) -> None:
    options = ("--max-new-tokens", "6", "--temperature", "1", "--seed", "7", "--system", "Rhyme.")

    def said(url: str) -> list[str]:
        _, *rest = talk(start(url, *options), "who are you?", "and I?").splitlines()
        return [CLOSING.sub(r"\1 \2 \3 \4", line) for line in rest]

    assert said(server.url) == said("")


def test_it_loads_no_engine_and_no_torch(server: ServerProcess, root: Path) -> None:
    program = (
        "import sys, cli_demo\n"
        f"sys.argv[1:] = ['--base-url', {server.url!r}, '--api-key', 'other']\n"
        "sys.argv += ['--max-new-tokens', '2']\n"
        "cli_demo.main()\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'engine.llm'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, input="hello\n", capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 tokens (length)" in done.stdout


def test_ctrl_c_cancels_the_answer_on_the_server_and_the_chat_goes_on(
    server: ServerProcess, start: Start
) -> None:
    before = aborted(server)
    with start(server.url, "--max-new-tokens", "60") as chat:
        hear(chat)  # the greeting
        say(chat, "tell me a long story")
        assert chat.stdout is not None
        begun = chat.stdout.read(3)
        assert running(server) == 1
        chat.send_signal(signal.SIGINT)
        story = begun + hear(chat)
        status = hear(chat)
        eventually(lambda: aborted(server) == before + 1, "the end of the answer")
        assert running(server) == 0
        ((_, _, cached, prompt),) = CLOSING.findall(talk(chat, "and then?"))
    assert STOPPED.match(status)
    assert int(cached) > 0
    all_that_was_said = f"tell me a long story{story.strip()}and then?"
    assert int(prompt) > len(all_that_was_said)  # a byte is a token here


def test_a_server_that_refuses_work_says_so_and_the_chat_goes_on(
    server: ServerProcess, start: Start
) -> None:
    with start(server.url, "--max-new-tokens", "4") as chat:
        hear(chat)
        control(server, "drain")
        say(chat, "hello")
        refusal = hear(chat)
        control(server, "resume")
        ((count, _, _, prompt),) = CLOSING.findall(talk(chat, "hello"))
    assert refusal.startswith(f"{server.url} answers 503: ")
    assert "drain" in refusal
    ((_, _, _, alone),) = CLOSING.findall(talk(start(server.url, "--max-new-tokens", "4"), "hello"))
    assert (count, prompt) == ("4", alone)  # what was refused is forgotten


def test_a_question_that_cannot_be_served_is_forgotten(server: ServerProcess, start: Start) -> None:
    out = talk(start(server.url), "long " * 2000)
    assert "exceed the context of 8,192" in " ".join(out.split())
    assert "(/reset forgets what was said)" in out


def test_a_server_that_dies_cuts_its_answer_and_not_the_chat(tmp_path: Path, start: Start) -> None:
    with serving(tmp_path / "log", FAKE_STEP_MS=50) as server, start(server.ready()) as chat:
        hear(chat)
        say(chat, "tell me a long story")
        assert chat.stdout is not None
        chat.stdout.read(3)
        server.stop(signal.SIGKILL)
        hear(chat)  # the rest of what was sent
        cut = hear(chat)
        gone = talk(chat, "and then?")
    assert cut.startswith("the answer was cut off")
    assert gone.startswith("no server answers at http://127.0.0.1:")


@pytest.mark.parametrize(
    ("address", "key", "says"),
    [
        ("{url}", "wrong", "{url} answers 401: this server needs an API key"),
        ("http://127.0.0.1:{port}/", "secret", "no server answers at http://127.0.0.1:{port}: "),
    ],
)
def test_a_chat_that_cannot_begin_is_one_line_and_exit_code_1(
    server: ServerProcess, start: Start, address: str, key: str, says: str
) -> None:
    facts = {"url": server.url, "port": free_port()}
    chat = start(address.format(**facts), "--api-key", key)
    out, err = chat.communicate("hello\n", timeout=60)
    assert (chat.returncode, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert says.format(**facts) in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--base-url", "localhost"), "localhost is no address of a server"),
        (("--base-url", ""), "is no address of a server"),
        (("--base-url", "http://localhost", "--temperature", "-1"), "temperature must be"),
    ],
)
def test_what_no_server_can_do_is_refused_before_one_is_asked(
    arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["cli_demo.py", *arguments])
    with pytest.raises(RequestRefused, match=says):
        cli_demo.main()
