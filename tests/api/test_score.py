"""`POST /v1/score` over the fake backend, whose logits are known from the ids alone."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from api.score import router
from backend.tokenizer import ByteTokenizer
from tests.api.in_process import MODEL, Server, post, refusal, run, serve

PROMPT = "The capital of France is"


def logprobs(ids: list[int], start: int) -> list[float]:
    """What the model thinks of the ids from `start` on."""
    return [
        MODEL.logprob(ids[at], MODEL.after(ids[:at]), 0).logprob for at in range(start, len(ids))
    ]


def test_each_continuation_has_the_log_probabilities_of_its_tokens() -> None:
    texts = [" Paris", " a", " nowhere at all"]
    answer = post(router, "/v1/score", {"prompt": PROMPT, "continuations": texts}).json()
    encode = ByteTokenizer().encode
    for index, (text, found) in enumerate(zip(texts, answer["scores"], strict=True)):
        ids = encode(PROMPT + text)
        expected = logprobs(ids, len(ids) - len(text))
        assert found["index"] == index
        assert found["token_ids"] == list(text.encode())
        assert found["token_logprobs"] == pytest.approx(expected)
        assert found["logprob"] == pytest.approx(sum(expected))
        assert found["mean_logprob"] == pytest.approx(sum(expected) / len(expected))
        assert not found["greedy"]
    assert answer["object"] == "score"
    assert answer["usage"]["prompt_tokens"] == sum(len(encode(PROMPT + text)) for text in texts)


def test_ids_are_scored_as_they_are_given_and_the_best_of_all_is_greedy() -> None:
    prompt = [1, 2, 3]
    best = MODEL.after(prompt)[0]
    body = {"prompt": prompt, "continuations": [[best], [best, 5], [5]]}
    scores = post(router, "/v1/score", body).json()["scores"]
    assert [each["token_ids"] for each in scores] == body["continuations"]
    assert [each["greedy"] for each in scores] == [True, False, False]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [256, 97], "continuations": ["bc"]},
        {"prompt": "a", "continuations": [[98, 99]]},
        {"prompt": [256, 97], "continuations": [[98, 99]]},
        {"prompt": "a", "continuations": ["bc"]},
    ],
)
def test_texts_and_ids_may_be_mixed(body: dict[str, Any]) -> None:
    (found,) = post(router, "/v1/score", body).json()["scores"]
    assert found["token_ids"] == [98, 99]
    assert found["token_logprobs"] == pytest.approx(logprobs([256, 97, 98, 99], 2))


def test_a_long_prompt_is_computed_once_for_all_its_continuations() -> None:
    async def check(server: Server) -> None:
        body = {"prompt": "x" * 1000, "continuations": ["a", "b", "c", "d"]}
        usage = (await server.client.post("/v1/score", json=body)).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 3 * 992

    run(router, check)


def test_labels_are_scored_behind_query_and_item_as_sglang_does() -> None:
    query, items, labels = "Is it? ", ["yes", "no", "perhaps"], [97, 101, 110]
    for first in (False, True):
        body = {"query": query, "items": items, "label_token_ids": labels, "item_first": first}
        answer = post(router, "/v1/score", body).json()
        for item, row in zip(items, answer["scores"], strict=True):
            ids = ByteTokenizer().encode(item + query if first else query + item)
            for label, value in zip(labels, row, strict=True):
                assert value == pytest.approx(math.exp(logprobs([*ids, label], len(ids))[0]))
        assert answer["object"] == "scoring"


def test_with_softmax_the_labels_of_an_item_add_up_to_one() -> None:
    async def check() -> None:
        async with serve(router) as server:
            body: dict[str, Any] = {"query": [1, 2], "items": [[3], [4, 5]]}
            body["label_token_ids"] = [110, 97, 101]
            plain = (await server.client.post("/v1/score", json=body)).json()["scores"]
            body["apply_softmax"] = True
            soft = (await server.client.post("/v1/score", json=body)).json()["scores"]
            for raw, row in zip(plain, soft, strict=True):
                assert row == pytest.approx([value / sum(raw) for value in raw])

    asyncio.run(check())


TWO = {"prompt": "a", "continuations": ["b"]}
LABELS = {"query": "a", "items": ["b"], "label_token_ids": [1]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a"}, "continuations"),
        ({**TWO, "continuations": []}, "continuations"),
        ({**TWO, "continuations": ["b", ""]}, "continuations.1"),
        ({**TWO, "continuations": [[]]}, "continuations.0"),
        ({**TWO, "continuations": [[999]]}, "continuations"),
        ({**TWO, "prompt": ""}, "prompt"),
        ({**TWO, "prompt": []}, "prompt"),
        ({**TWO, "prompt": None}, "prompt"),
        ({**TWO, "query": "a"}, "query"),
        ({**TWO, "text_1": "a"}, "text_1"),
        ({"text_1": "a", "text_2": "b"}, "text_1"),
        ({**TWO, "continuations": ["b"] * 1025}, "continuations"),
        ({"query": "a"}, "items"),
        ({"query": "a", "items": ["b"]}, "label_token_ids"),
        ({**LABELS, "label_token_ids": []}, "label_token_ids"),
        ({**LABELS, "label_token_ids": [260]}, "label_token_ids"),
        ({**LABELS, "items": [[1]]}, "items"),
        ({**LABELS, "items": ["b"] * 600, "label_token_ids": [1, 2]}, "items"),
        ({**LABELS, "query": [], "items": [[]]}, "items"),
        ({**TWO, "prompt": "a" * 9000}, "continuations"),
        ({**TWO, "prompt": [1] * 8192}, "continuations"),
        ({**LABELS, "query": [1] * 8192, "items": [[1]]}, "items"),
    ],
)
def test_what_cannot_be_scored_is_a_400_that_names_it(body: dict[str, Any], param: str) -> None:
    assert refusal(post(router, "/v1/score", body)) == (400, param)


def test_an_unknown_field_is_a_warning_and_strictly_a_400() -> None:
    body = {**TWO, "unheard_of": 1}
    assert post(router, "/v1/score", body).json()["warnings"]
    assert refusal(post(router, "/v1/score", body, STRICT_FIELDS=1)) == (400, "unheard_of")
