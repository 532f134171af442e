"""Thoughts and calls of tools in chats: what is heard is told, whole and streamed alike.

What the fake model says is no call in any format: a reader stands in that hears calls and thoughts
in its pseudo-words, character by character.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from api import chat
from api.answers import Piece
from api.hearing import Ear, Hearing, Wish
from api.openai_messages import ChatSpeech, message
from api.service import Service
from api.speech import CallArguments, CallStart, Saying, Words
from backend.interface import Finish
from tests.api.in_process import Server
from tests.api.openai_bench import chunks, run
from tests.api.openai_fold import folded, without_names
from tests.api.test_openai_streams import check_both_ways

PATH = "/v1/chat/completions"
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    },
}
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Look"}], "tools": [TOOL]}
STOP = Finish("stop", matched=257)


@dataclass
class SpacedReader:
    """The first word is a thought, the second is said, and each one after them is a call."""

    words: int = 0
    said: list[Saying] = field(default_factory=list)

    def feed(self, text: str) -> Sequence[Saying]:
        said: list[Saying] = []
        for character in text:
            if character == " ":
                self.words += 1
                if self.words > 1:
                    index = self.words - 2
                    said.append(CallStart(index, f"call_{index}", "look"))
            elif self.words < 2:
                said.append(Words(character, thought=self.words == 0))
            else:
                said.append(CallArguments(self.words - 2, character))
        return said

    def end(self) -> Sequence[Saying]:
        return []


@dataclass
class CountingEar(Ear):
    """Counts the tokens of the first word."""

    def hear(self, piece: Piece) -> list[Saying]:
        said = super().hear(piece)
        self.reasoning_tokens += sum(isinstance(each, Words) and each.thought for each in said)
        return said


@dataclass(frozen=True, slots=True)
class SpacedHearing(Hearing):
    """Of every answer."""

    plain: bool = False

    def open_ear(self) -> Ear:
        return CountingEar(SpacedReader())


@pytest.fixture
def wishes(monkeypatch: pytest.MonkeyPatch) -> list[Wish]:
    """What was asked of the hearing, which is replaced."""
    heard: list[Wish] = []

    async def listen(service: Service, prompt: Sequence[int], wish: Wish) -> Hearing:
        heard.append(wish)
        return SpacedHearing(grammar=wish.grammar)

    monkeypatch.setattr(chat, "listen", listen)
    return heard


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0},
        {"seed": 5, "n": 3},
        {"seed": 5, "n": 2, "logprobs": True, "top_logprobs": 1, "return_token_ids": True},
        {"seed": 7, "stream_reasoning": False},
        {"seed": 7, "max_tokens": 3},
        {"seed": 7, "max_tokens": 0},
        {"seed": 7, "stop": "e"},
    ],
)
def test_a_stream_of_thoughts_and_calls_is_the_whole_in_pieces(
    more: dict[str, Any], wishes: list[Wish]
) -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        whole, seen = await check_both_ways(server, PATH, {**BODY, "max_tokens": 60, **more})
        ChatCompletion.model_validate(whole)
        for chunk in seen:
            ChatCompletionChunk.model_validate(chunk)

    run(check)
    assert [tool.name for tool in wishes[0].tools] == ["look"]


def test_the_stream_helper_of_the_official_client_puts_calls_together(wishes: list[Wish]) -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        asked: Any = {**BODY, "model": "fake", "max_tokens": 60, "temperature": 0}
        whole = await client.chat.completions.create(**asked)
        async with client.chat.completions.stream(**asked) as stream:
            events = [event.type async for event in stream]
            answer = await stream.get_final_completion()
        assert "tool_calls.function.arguments.delta" in events
        calls = whole.choices[0].message.tool_calls
        again = answer.choices[0].message.tool_calls
        assert calls
        assert again
        assert [each.to_dict() for each in calls] == [
            {k: v for k, v in each.to_dict().items() if k not in ("index",)}
            | {"function": {"name": "look", "arguments": each.function.arguments}}
            for each in again
        ]

    run(check)


def heard(text: str, finish: Finish | None = None) -> Piece:
    return Piece(text, [1] * len(text), finish)


def test_thoughts_that_are_not_streamed_come_at_once() -> None:
    speech = ChatSpeech(CountingEar(SpacedReader()), streams_thoughts=False)
    assert speech.more(heard("hm")) == []
    assert [phrase(text)["delta"] for phrase, text in speech.more(heard("m a"))] == [
        {"reasoning_content": "hmm", "reasoning": "hmm"},
        {"content": "a"},
    ]
    speech = ChatSpeech(CountingEar(SpacedReader()), streams_thoughts=False)
    (last,) = speech.more(heard("hm", Finish("length")))
    assert last[1] == "hm"


def test_a_turn_that_only_calls_has_no_content() -> None:
    said: list[Saying] = [CallStart(0, "a", "look"), CallArguments(0, "{"), CallArguments(0, "}")]
    assert message(said) == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        ],
    }
    assert message([])["content"] == ""
    assert message([Words("hm", thought=True)])["reasoning"] == "hm"


def test_thoughts_are_counted_and_calls_are_a_finish_of_their_own(wishes: list[Wish]) -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        for stream in (False, True):
            space, end = {"32": 100}, {"257": 90}
            bias: Any = {"logit_bias": space | end, "min_tokens": 3, "max_tokens": 4}
            body = {**BODY, **bias, "stream": stream, "stream_options": {"include_usage": True}}
            if not stream:
                del body["stream_options"]
            response = await server.client.post(PATH, json=body)
            reply = folded(chunks(response)) if stream else response.json()
            (choice,) = reply["choices"]
            assert choice["finish_reason"] == "length"  # cut, whatever was called
            assert len(choice["message"]["tool_calls"]) == 3
            body["stop_token_ids"] = [32]
            response = await server.client.post(PATH, json=body)
            reply = folded(chunks(response)) if stream else response.json()
            (choice,) = reply["choices"]
            assert choice["finish_reason"] == "stop"  # at once: nothing was called
            thoughts = choice["message"].get("reasoning", "")
            details = reply["usage"]["completion_tokens_details"]
            assert details == {"reasoning_tokens": len(thoughts)}

    run(check)


def test_an_answer_that_calls_and_stops_says_tool_calls(wishes: list[Wish]) -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        body = {**BODY, "seed": 1, "max_tokens": 400, "temperature": 1}
        whole, seen = await check_both_ways(server, PATH, body)
        (choice,) = whole["choices"]
        assert choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
        assert without_names(folded(seen))["choices"][0]["finish_reason"] == "tool_calls"

    run(check)


@pytest.mark.parametrize(
    ("more", "shown"), [({}, True), ({"tool_choice": "none"}, False), ({"tools": []}, False)]
)
def test_the_template_is_shown_the_tools_that_may_be_called(
    more: dict[str, Any], shown: bool, wishes: list[Wish], monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[Any] = []
    encode = Service.encode_chat

    async def encode_chat(service: Service, messages: Any, **options: Any) -> list[int]:
        rendered.append(options)
        return await encode(service, messages, **options)

    monkeypatch.setattr(Service, "encode_chat", encode_chat)

    async def check(server: Server, _: AsyncOpenAI) -> None:
        body = {**BODY, "max_tokens": 1, "reasoning": {"effort": "low", "enabled": True}, **more}
        response = await server.client.post(PATH, json=body)
        assert response.is_success, response.text

    run(check)
    (options,) = rendered
    assert bool(options["tools"]) == shown
    assert options["template_kwargs"]["reasoning_effort"] == "low"
    assert options["template_kwargs"]["enable_thinking"] is True
