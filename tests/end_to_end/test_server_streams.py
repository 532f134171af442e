"""The server over real sockets, with the fake backend: many clients, of whom many leave."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import zmq

from tests.end_to_end.server_process import PATIENCE_S, ServerProcess, eventually, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all: steps of 3 ms, a queue that holds 512, and a control socket."""
    folder = tmp_path_factory.mktemp("server")
    with zmq.Context() as context, context.socket(zmq.REP) as probe:
        port = probe.bind_to_random_port("tcp://127.0.0.1")
    control = {"ZMQ_CONTROL": 1, "ZMQ_CONTROL_ENDPOINT": f"tcp://127.0.0.1:{port}"}
    with serving(folder / "log", FAKE_STEP_MS=3, MAX_QUEUED=512, **control) as found:
        found.ready()
        yield found
        assert "Traceback" not in found.text


def body(tokens: int, **more: object) -> dict[str, Any]:
    return {"prompt": "hello", "max_new_tokens": tokens, "ignore_eos": True, **more}


def at_rest(url: str) -> bool:
    """Whether nothing runs and every page is home."""
    stats = httpx.get(f"{url}/stats").json()
    pages = stats["pages"]
    return (stats["running"], stats["waiting"], pages["leased"]) == (0, 0, 0)


async def read(client: httpx.AsyncClient, url: str, draw: random.Random, leaves: bool) -> str:
    """A client that reads its stream to the end, or leaves somewhere in it. Returns the text."""
    content = body(60, prompt=f"client {draw.random()}")
    patience = draw.randrange(40)
    text = ""
    async with client.stream("POST", f"{url}/generate", json=content) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            news = json.loads(line)
            text += news.get("text_delta", "")
            patience -= 1
            if leaves and patience < 0:
                break
    return text


def test_of_two_hundred_streams_half_leave_and_nothing_is_left_of_them(
    server: ServerProcess,
) -> None:
    url = server.url
    before = httpx.post(f"{url}/generate", json=body(20, stream=False)).json()["text"]

    async def scenario() -> list[str]:
        draw = random.Random(1)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=PATIENCE_S, limits=limits) as client:
            readers = [read(client, url, draw, leaves=number % 2 == 0) for number in range(200)]
            return await asyncio.gather(*readers)

    texts = asyncio.run(scenario())
    assert all(texts[1::2])
    eventually(lambda: at_rest(url), "rest")
    assert httpx.post(f"{url}/generate", json=body(20, stream=False)).json()["text"] == before


def test_a_client_that_waits_for_a_whole_answer_and_leaves_is_noticed(
    server: ServerProcess,
) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/generate", json=body(6000, stream=False), timeout=0.5)
    eventually(lambda: at_rest(server.url), "rest")


def test_beyond_the_queue_there_is_an_honest_429(server: ServerProcess) -> None:
    url = server.url

    async def scenario() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=PATIENCE_S, limits=limits) as client:
            whole = body(10, n=100, stream=False)
            return await asyncio.gather(
                *(client.post(f"{url}/generate", json=whole) for _ in range(8))
            )

    responses = asyncio.run(scenario())
    refused = [response for response in responses if response.status_code == 429]
    served = [response for response in responses if response.status_code == 200]
    assert len(refused) + len(served) == 8
    assert refused
    for response in refused:
        error = response.json()["error"]
        assert int(response.headers["Retry-After"]) >= 1
        assert error["queue_depth"] > 0
        assert 0 < error["est_wait_s"] < PATIENCE_S
    counted = f'minisgl_rejected_total{{reason="queue_full"}} {len(refused)}.0'
    assert counted in httpx.get(f"{url}/metrics").text
    for response in served:
        assert [each["finish_reason"] for each in response.json()["answers"]] == ["length"] * 100


def test_the_official_client_chats_and_completes_streamed_and_whole(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        (name,) = [model.id for model in client.models.list()]
        more: dict[str, Any] = {"model": name, "max_tokens": 12, "temperature": 0, "seed": 1}
        whole = client.completions.create(prompt="hello", **more)
        chunks = list(client.completions.create(prompt="hello", stream=True, **more))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == (
            whole.choices[0].finish_reason
        )
        messages: Any = [{"role": "user", "content": "hello"}]
        answer = client.chat.completions.create(messages=messages, **more)
        options: Any = {"include_usage": True}
        pieces = list(
            client.chat.completions.create(
                messages=messages, stream=True, stream_options=options, **more
            )
        )
        assert pieces[0].choices[0].delta.role == "assistant"
        said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert said == answer.choices[0].message.content
        assert len({piece.id for piece in pieces}) == 1
        counted, usage = pieces[-1].usage, answer.usage
        assert counted is not None
        assert usage is not None
        assert counted.completion_tokens == usage.completion_tokens
        assert counted.prompt_tokens == usage.prompt_tokens
        ends = [c.finish_reason for piece in pieces for c in piece.choices if c.finish_reason]
        assert ends == [answer.choices[0].finish_reason]


def test_a_peer_on_the_control_socket_is_answered(server: ServerProcess) -> None:
    with zmq.Context() as context, context.socket(zmq.REQ) as peer:
        peer.connect(server.control)
        peer.setsockopt(zmq.RCVTIMEO, int(PATIENCE_S * 1000))

        def ask(command: bytes) -> dict[str, Any]:
            peer.send(command)
            answer: dict[str, Any] = json.loads(peer.recv())
            return answer

        assert ask(b'{"cmd":"warm","tokens":8}') == {"ok": True, "warmed_tokens": 8, "replicas": 1}
        assert ask(b"{")["error"] == "invalid_json"
        assert ask(b'{"cmd":"dance"}')["error"] == "unknown_command"
        assert ask(b'{"cmd":"drain","wait":5}')["ok"]
        refused = httpx.post(f"{server.url}/generate", json=body(2))
        assert refused.status_code == 503
        assert "Retry-After" in refused.headers
        assert ask(b'{"cmd":"resume"}')["ok"]
        assert httpx.post(f"{server.url}/generate", json=body(2)).status_code == 200


def test_the_control_client_prints_the_answer(server: ServerProcess) -> None:
    async def run(*arguments: str) -> tuple[int | None, bytes]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "ipc.zmq_control",
            *arguments,
            cwd=Path(__file__).parent.parent.parent,
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        return process.returncode, out

    code, out = asyncio.run(run("--endpoint", server.control, "metrics"))
    assert code == 0
    assert json.loads(out)["generated_tokens_total"] > 0


def test_every_malformed_body_is_a_400_and_the_server_lives_on(server: ServerProcess) -> None:
    prompt = b'{"prompt": "%b"}' % (b"x" * 10_000_000)
    for content in (b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": "\\ud800"}', prompt):
        for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
            response = httpx.post(f"{server.url}{path}", content=content, timeout=PATIENCE_S)
            assert response.status_code == 400, (path, content[:20], response.text[:200])
            assert response.json()["error"]["message"]
    assert at_rest(server.url)


HUGE = 1 << 65
MANY = 500_000
HOSTILE: dict[str, bytes] = {
    "a number beyond 64 bits": b'{"prompt": "a", "temperature": 1, "top_k": %d}' % HUGE,
    "a length beyond 64 bits": b'{"prompt": "a", "max_new_tokens": %d}' % HUGE,
    "a seed beyond 64 bits": b'{"prompt": "a", "seed": %d}' % HUGE,
    "a stop id beyond 64 bits": b'{"prompt": "a", "stop_token_ids": [%d]}' % HUGE,
    "wrong stops": b'{"prompt": "a", "stop": [%b0]}' % (b"0," * MANY),
    "wrong stop ids": b'{"prompt": "a", "stop_token_ids": [%b""]}' % (b'"",' * MANY),
    "wrong names": b'{"text": "a", "rid": [%b0]}' % (b"0," * MANY),
    "wrong parameters": b'{"text": ["a"], "sampling_params": [%b0]}' % (b"0," * MANY),
    "many unknown fields": b'{"prompt": "a" %b}'
    % b"".join(b',"f%d":0' % number for number in range(MANY)),
    "many biases": b'{"prompt": "a", "logit_bias": {%b}}'
    % b",".join(b'"%d":"x"' % number for number in range(MANY)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_a_400_that_holds_up_nobody(server: ServerProcess, name: str) -> None:
    response = httpx.post(f"{server.url}/generate", content=HOSTILE[name], timeout=PATIENCE_S)
    assert response.status_code == 400, response.text[:200]
    assert len(response.content) < 1000
    assert httpx.post(f"{server.url}/generate", json=body(2), timeout=1).status_code == 200
    assert at_rest(server.url)


def test_a_client_that_leaves_while_it_sends_is_no_fault(server: ServerProcess) -> None:
    address = urlsplit(server.url)
    with socket.socket() as client:
        client.connect((address.hostname, address.port))
        client.sendall(b"POST /generate HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\n{")
    assert httpx.post(f"{server.url}/generate", json=body(2)).status_code == 200
