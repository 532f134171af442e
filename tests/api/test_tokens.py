"""`/tokenize` and `/detokenize`: there and back, in the words of two servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st

from api.tokens import MAX_TEXT, router
from backend.tokenizer import BYTE_TEMPLATE, ByteTokenizer
from tests.api.in_process import post, refusal

BOS = ByteTokenizer.BOS
IM_START, IM_END = 258, 259
TALK = [{"role": "user", "content": "hi"}]


def said(path: str, body: dict[str, Any], **flags: object) -> dict[str, Any]:
    response = post(router, path, body, **flags)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


@pytest.mark.parametrize("name", ["prompt", "text"])
def test_a_text_becomes_ids_as_a_prompt_does(name: str) -> None:
    ids = [BOS, *"wörld".encode()]
    wanted = {"tokens": ids, "count": 7, "max_model_len": 64}
    assert said("/tokenize", {name: "wörld"}, MAX_MODEL_LEN=64) == wanted
    plain = said("/tokenize", {name: "wörld", "add_special_tokens": False})
    assert (plain["tokens"], plain["count"]) == (ids[1:], 6)
    assert said("/tokenize", {name: "a", "add_special_tokens": None})["tokens"] == [BOS, 97]


def test_many_texts_become_lists() -> None:
    found = said("/tokenize", {"text": ["a", "", "bc"]})
    assert (found["tokens"], found["count"]) == ([[BOS, 97], [BOS], [BOS, 98, 99]], [2, 1, 3])
    assert said("/tokenize", {"text": ["a"]})["count"] == [2]


def test_a_text_too_long_for_the_context_is_counted_all_the_same() -> None:
    assert said("/tokenize", {"prompt": "a" * 100}, MAX_MODEL_LEN=16)["count"] == 101


def test_a_conversation_becomes_what_its_template_makes_of_it() -> None:
    turn = [IM_START, *b"user\nhi", IM_END, *b"\n"]
    start = [IM_START, *b"assistant\n"]
    assert said("/tokenize", {"messages": TALK})["tokens"] == turn + start
    bare = {"messages": TALK, "add_generation_prompt": False}
    assert said("/tokenize", bare)["tokens"] == turn
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert said("/tokenize", {"messages": parts})["tokens"] == turn + start
    assert "im_start" in BYTE_TEMPLATE


def test_ids_become_text_under_both_names() -> None:
    ids = [BOS, *"wörld".encode(), ByteTokenizer.EOS]
    assert said("/detokenize", {"tokens": ids}) == {"prompt": "wörld", "text": "wörld"}
    shown = said("/detokenize", {"tokens": ids, "skip_special_tokens": False})
    assert shown["text"] == "<|bos|>wörld<|eos|>"
    assert said("/detokenize", {"tokens": []})["text"] == ""
    assert said("/detokenize", {"tokens": [0xC3]})["text"] == "\ufffd"


def test_lists_of_ids_become_texts() -> None:
    assert said("/detokenize", {"tokens": [[97], [], [98, 99]]})["text"] == ["a", "", "bc"]


@given(st.text(max_size=40))
@settings(max_examples=20, deadline=None)
def test_a_text_comes_back_as_it_was(text: str) -> None:
    tokens = said("/tokenize", {"text": text})["tokens"]
    special = any(name in text for name in ByteTokenizer.SPECIALS)
    assert special or said("/detokenize", {"tokens": tokens})["text"] == text


def test_the_small_model_is_tokenized_by_its_own_file(small_model: Path) -> None:
    text = "The capital of France is Paris."
    reference = tokenizers.Tokenizer.from_file(str(small_model / "tokenizer.json"))
    flags = {"MODEL_LOCAL_DIR": small_model}
    tokens = said("/tokenize", {"prompt": text}, **flags)["tokens"]
    assert tokens == reference.encode(text).ids
    assert said("/detokenize", {"tokens": tokens}, **flags)["text"] == text


TOKENIZE: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt.1"),
    ({"prompt": "a", "text": "a"}, "text"),
    ({"text": "a", "messages": TALK}, "messages"),
    ({"text": "a" * (MAX_TEXT + 1)}, "text"),
    ({"text": "a", "add_special_tokens": 1}, "add_special_tokens"),
    ({"text": "a", "add_generation_prompt": False}, "add_generation_prompt"),
    ({"text": "a", "chat_template_kwargs": {}}, "chat_template_kwargs"),
    ({"messages": TALK, "add_special_tokens": True}, "add_special_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": TALK, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
    ({"messages": TALK, "tools": [{}]}, "tools"),
    ({"text": "a", "return_token_strs": True}, "return_token_strs"),
    ({"text": "a", "chat_template": "x"}, "chat_template"),
    ({"text": "a", "model": 5}, "model"),
]
DETOKENIZE: list[tuple[dict[str, Any], str]] = [
    ({}, "tokens"),
    ({"tokens": "a"}, "tokens"),
    ({"tokens": None}, "tokens"),
    ({"tokens": [260]}, "tokens"),
    ({"tokens": [-1]}, "tokens"),
    ({"tokens": [10**30]}, "tokens"),
    ({"tokens": [[1], [260]]}, "tokens"),
    ({"tokens": [1, "a"]}, "tokens.1"),
    ({"tokens": [True]}, "tokens.0"),
    ({"tokens": [1.0]}, "tokens.0"),
    ({"tokens": [[1], 2]}, "tokens.0"),
    ({"tokens": [1], "skip_special_tokens": "no"}, "skip_special_tokens"),
]


@pytest.mark.parametrize(("body", "param"), TOKENIZE)
def test_what_cannot_be_tokenized_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    assert refusal(post(router, "/tokenize", body)) == (400, param)


@pytest.mark.parametrize(("body", "param"), DETOKENIZE)
def test_what_cannot_be_detokenized_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    assert refusal(post(router, "/detokenize", body)) == (400, param)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"text": "\xff"}', b'{"text": "\\ud800"}'])
@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_what_is_no_json_object_is_refused(path: str, body: bytes) -> None:
    assert refusal(post(router, path, body)) == (400, None)


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", {"text": "a"}), ("/detokenize", {"tokens": [1]})]
)
def test_an_unknown_field_is_a_warning_and_another_model_a_404(
    path: str, body: dict[str, Any]
) -> None:
    assert said(path, body | {"model": "fake"}).get("warnings") is None
    (warning,) = said(path, body | {"colour": 1})["warnings"]
    assert warning.startswith("colour ")
    assert refusal(post(router, path, body | {"colour": 1}, STRICT_FIELDS=1)) == (400, "colour")
    assert refusal(post(router, path, body | {"model": "gpt"})) == (404, "model")


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 16}')
    for path, body, param in (
        ("/tokenize", {"text": "a"}, "text"),
        ("/tokenize", {"messages": TALK}, "messages"),
        ("/detokenize", {"tokens": [1]}, "tokens"),
    ):
        response = post(router, path, body, MODEL_LOCAL_DIR=tmp_path)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param


def test_the_routes_are_in_the_openapi_document() -> None:
    for route in router.routes:
        extra = getattr(route, "openapi_extra", None)
        assert extra is not None
        assert extra["requestBody"]["content"]["application/json"]["schema"]["properties"]
