"""What every handler works with: the model, its names, and the way from prompts to token ids."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast
from unittest.mock import patch

import pytest
from fastapi import Request

from api.errors import ApiError
from api.sampling_fields import SamplingDefaults
from api.service import Model, Service, new_id, owner_of
from backend.interface import BackendSpec, RequestRefused, StartFailed, TooLong, Unavailable
from backend.tokenizer import ByteTokenizer, IdTokenizer, Tokenizer
from config import DialectSettings
from engine.multi_device import EnginePool
from tests.api.doubles import SPEC
from tests.api.hand_fed import HandFedPool, ask
from tests.api.in_process import settings_of

Result = TypeVar("Result")

BOS = ByteTokenizer.BOS
ROOM = SPEC.max_model_len * ByteTokenizer().longest  # characters that might fit
HUGE = "a" * 10_000_000


class StartedPool(HandFedPool):
    """A pool whose first engine is ready, or has failed."""

    def __init__(self, failure: StartFailed | None = None) -> None:
        super().__init__()
        self.failure = failure

    async def ready(self) -> BackendSpec:
        if self.failure is not None:
            raise self.failure
        return SPEC


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, 20))


def starting(pool: HandFedPool, **flags: object) -> Service:
    """A service whose model is not there yet."""
    return Service(settings_of(**flags), cast(EnginePool, pool))


def serving(tokenizer: Tokenizer | None = None, **flags: object) -> Service:
    """A service whose model is there."""
    service = starting(StartedPool(), **flags)
    with patch("api.service.open_tokenizer", return_value=tokenizer or ByteTokenizer()):
        run(service.wait_for_model())
    return service


# The model


def test_whatever_needs_a_model_is_unavailable_until_it_is_there() -> None:
    service = starting(StartedPool())
    needs: list[Callable[[], object]] = [
        lambda: service.model,
        lambda: service.check_model("scripted"),
        lambda: run(service.encode(["a"], "prompt")),
        lambda: run(service.encode_chat([{"role": "user", "content": "a"}])),
        lambda: service.open("gen-1", [ask()], ""),
    ]
    for need in needs:
        with pytest.raises(Unavailable, match="starting"):
            need()
    service.check_model(None)
    run(service.wait_for_model())
    for need in needs:
        need()


def test_an_engine_that_does_not_start_says_why() -> None:
    service = starting(StartedPool(StartFailed("no such device")))
    with pytest.raises(StartFailed, match="no such device"):
        run(service.wait_for_model())
    with pytest.raises(Unavailable):
        _ = service.model


def test_a_model_goes_by_its_alias_its_name_and_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    spec = replace(SPEC, folder=str(folder))
    assert Model.open(spec, "pet", DialectSettings()).names == ("pet", "scripted", "tiny")
    assert Model.open(spec, None, DialectSettings()).names == ("scripted", "tiny")
    assert Model.open(spec, "tiny", DialectSettings()).names == ("tiny", "scripted")
    assert Model.open(SPEC, None, DialectSettings()).names == ("scripted",)


def test_any_other_name_is_not_found() -> None:
    service = serving(MODEL_ALIAS="pet")
    for name in (None, "pet", "scripted"):
        service.check_model(name)
    for name in ("", "Pet", "scripted ", "gpt-4"):
        with pytest.raises(ApiError) as refusal:
            service.check_model(name)
        found = refusal.value
        assert (found.status, found.param, found.code) == (404, "model", "model_not_found")
        assert repr(name) in found.message


def test_a_model_folder_brings_its_own_defaults_and_no_tokenizer_means_ids(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_k": 7}))
    model = Model.open(replace(SPEC, folder=str(tmp_path)), None, DialectSettings())
    assert model.defaults == SamplingDefaults(temperature=0.5, top_k=7)
    assert isinstance(model.tokenizer, IdTokenizer)
    assert Model.open(SPEC, None, DialectSettings()).defaults == SamplingDefaults()


# Prompts


class Watched(ByteTokenizer):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Sequence[str], bool]] = []
        self.threads: set[int] = set()

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        self.calls.append((texts, add_special_tokens))
        self.threads.add(threading.get_ident())
        return super().encode_batch(texts, add_special_tokens)


def test_prompts_are_encoded_together_and_beside_the_loop() -> None:
    tokenizer = Watched()
    service = serving(tokenizer)
    assert run(service.encode(["hi", ""], "prompt")) == [[BOS, 104, 105], [BOS]]
    assert tokenizer.calls == [(["hi", ""], True)]
    assert threading.get_ident() not in tokenizer.threads


def test_many_prompts_are_encoded_in_slices() -> None:
    tokenizer = Watched()
    slices = [["ab", "cd"], ["e", "", "fghijk"], ["l", "", "m"]]
    texts = [text for slice in slices for text in slice]
    with patch("api.service.SLICE", 3):
        ids = run(serving(tokenizer).encode(texts, "prompt"))
    assert [slice for slice, _ in tokenizer.calls] == slices
    assert ids == ByteTokenizer().encode_batch(texts)


def test_a_conversation_gets_no_special_tokens_but_those_of_its_template() -> None:
    tokenizer = Watched()
    service = serving(tokenizer)
    messages = [{"role": "user", "content": "hi"}]
    for begins, text in (
        (True, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        (False, "<|im_start|>user\nhi<|im_end|>\n"),
    ):
        ids = run(service.encode_chat(messages, add_generation_prompt=begins))
        assert ids == ByteTokenizer().encode(text, add_special_tokens=False)
    assert threading.get_ident() not in tokenizer.threads


def test_tools_and_options_reach_a_template_that_knows_them() -> None:
    with patch.object(ByteTokenizer, "template_text", "{{ tools }}"):
        service = serving()
    with patch.object(ByteTokenizer, "render", return_value="x") as render:
        tools = [{"name": "search"}]
        options = {"enable_thinking": False}
        assert run(service.encode_chat([], tools=tools, template_kwargs=options)) == [120]
    render.assert_called_once_with(
        [], tools=tools, add_generation_prompt=True, enable_thinking=False
    )


def test_tools_are_told_in_words_where_the_template_knows_none() -> None:
    messages = [{"role": "user", "content": "Go."}]
    ids = run(serving().encode_chat(messages, tools=[{"name": "search"}]))
    assert b'<tools>\n{"name": "search"}\n</tools>' in bytes(id for id in ids if id < 256)


@pytest.mark.parametrize("text", [HUGE, "a" * (ROOM + 1), "好" * (ROOM + 1)])
def test_what_cannot_fit_is_refused_before_it_is_tokenized(text: str) -> None:
    tokenizer = Watched()
    service = serving(tokenizer)
    with pytest.raises(TooLong, match=f"text of {len(text):,} characters") as refusal:
        run(service.encode(["a", text], "text"))
    assert refusal.value.param == "text"
    with pytest.raises(TooLong, match="messages of") as refusal:
        run(service.encode_chat([{"role": "user", "content": text}]))
    assert refusal.value.param == "messages"
    assert tokenizer.calls == []


def test_what_might_fit_is_tokenized() -> None:
    special = ByteTokenizer.SPECIALS[2]  # the longest token there is
    text = special * SPEC.max_model_len
    assert len(text) == ROOM
    [ids] = run(serving().encode([text], "prompt"))
    assert len(ids) == SPEC.max_model_len + 1


@pytest.mark.parametrize("param", ["prompt", "text", "input"])
def test_what_cannot_be_encoded_is_refused_in_the_name_of_its_field(param: str) -> None:
    cases = [
        (ByteTokenizer(), ["a", "\ud800"], "surrogate"),
        (IdTokenizer(260), ["a"], "no tokenizer.json"),
    ]
    for tokenizer, texts, why in cases:
        with pytest.raises(RequestRefused, match=why) as refusal:
            run(serving(tokenizer).encode(texts, param))
        assert refusal.value.param == param
        assert str(refusal.value).startswith(f"{param}: ")


def test_a_conversation_that_cannot_be_rendered_is_refused_in_the_name_of_messages() -> None:
    for tokenizer, content in ((IdTokenizer(260), "a"), (ByteTokenizer(), "\ud800")):
        with pytest.raises(RequestRefused, match="messages") as refusal:
            run(serving(tokenizer).encode_chat([{"role": "user", "content": content}]))
        assert refusal.value.param == "messages"


def test_no_texts_have_no_ids_even_without_a_tokenizer() -> None:
    """As at a start without WARM_PREFIXES."""
    assert run(serving(IdTokenizer(260)).encode([], "WARM_PREFIXES")) == []


# Answers


def test_answers_are_opened_with_the_defaults_of_the_server() -> None:
    service = serving(MAX_NEW_TOKENS_DEFAULT=5)
    pool = cast(StartedPool, service.pool)
    pool.warnings = ["lowered"]
    answers = service.open("gen-1", [ask(max_new_tokens=None)], "somebody", ["unknown"])
    [request] = pool.requests
    assert request.submission.max_new_tokens == 5
    assert (request.request_id, request.owner) == ("gen-1", "somebody")
    assert answers.warnings == ["unknown", "lowered"]
    answers.close()
    assert pool.going == 0


def test_warnings_of_a_request_are_its_own() -> None:
    given = ["unknown"]
    service = serving()
    cast(StartedPool, service.pool).warnings = ["lowered"]
    service.open("gen-1", [ask()], "", given)
    assert given == ["unknown"]


def test_a_pool_that_refuses_leaves_nothing_open() -> None:
    service = serving()
    pool = cast(StartedPool, service.pool)
    pool.refusal = Unavailable("draining")
    with pytest.raises(Unavailable, match="draining"):
        service.open("gen-1", [ask()], "")
    assert (pool.requests, pool.ended) == ([], [])


def test_new_ids_are_new_and_say_what_they_are_of() -> None:
    ids = {new_id("gen") for _ in range(1000)}
    assert len(ids) == 1000
    assert all(id.startswith("gen-") for id in ids)


def test_the_owner_is_whom_the_key_says_or_nobody() -> None:
    assert owner_of(Request({"type": "http"})) == ""
    assert owner_of(Request({"type": "http", "state": {}})) == ""
    assert owner_of(Request({"type": "http", "state": {"owner": "f00d"}})) == "f00d"
