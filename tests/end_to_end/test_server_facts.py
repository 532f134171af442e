"""A server with the small real model, asked for what it knows besides answers: scores, vectors,
receipts, and its cache. transformers is the oracle.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.end_to_end.server_process import PATIENCE_S, ServerProcess, serving

PROMPT = "The capital of France is"
STORY = "Once upon a time a small engine lived in a large machine, and it counted tokens. " * 12


@pytest.fixture(scope="module")
def server(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = {"BACKEND_IMPL": "hf", "DTYPE": "float32", "PAGE_TOKEN_BUDGET": 8192}
    flags["MAX_STEP_TOKENS"] = 64
    with serving(log, MODEL_LOCAL_DIR=small_model, **flags) as found:
        found.ready()
        yield found


@pytest.fixture(scope="module")
def oracle(small_model: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(small_model)


def ask(server: ServerProcess, path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{server.url}{path}", json=body, timeout=PATIENCE_S)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_scores_are_the_log_probabilities_of_transformers(
    server: ServerProcess, oracle: tuple[Any, Any]
) -> None:
    model, tokenizer = oracle
    texts = [" Paris", " London, of course", " a"]
    scores = ask(server, "/v1/score", prompt=PROMPT, continuations=texts)["scores"]
    head = len(tokenizer(PROMPT).input_ids)
    for text, found in zip(texts, scores, strict=True):
        ids = tokenizer(PROMPT + text).input_ids
        with torch.inference_mode():
            rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [rows[at - 1, ids[at]].item() for at in range(head, len(ids))]
        assert found["token_ids"] == ids[head:]
        assert found["token_logprobs"] == pytest.approx(expected, abs=1e-3)
        assert found["greedy"] == (rows[head - 1 : -1].argmax(-1).tolist() == ids[head:])
    assert max(scores, key=lambda each: each["mean_logprob"])["index"] == 0


def test_labels_have_the_probabilities_of_transformers(
    server: ServerProcess, oracle: tuple[Any, Any]
) -> None:
    model, tokenizer = oracle
    labels = [tokenizer(text).input_ids[0] for text in (" Paris", " Berlin")]
    items = [" France is", " Germany is"]
    answer = ask(server, "/v1/score", query="The capital of", items=items, label_token_ids=labels)
    for item, found in zip(items, answer["scores"], strict=True):
        ids = tokenizer("The capital of" + item).input_ids
        with torch.inference_mode():
            row = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        assert found == pytest.approx(row[labels].tolist(), abs=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_pooled_hidden_states_of_transformers(
    server: ServerProcess, oracle: tuple[Any, Any], pooling: str
) -> None:
    model, tokenizer = oracle
    texts = ["hello there", STORY]  # the second takes several steps
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        (served,) = client.models.list()
        found = client.embeddings.create(
            model=served.id, input=texts, extra_body={"pooling": pooling}
        )  # asks for base64 by itself
    for text, each in zip(texts, found.data, strict=True):
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.inference_mode():
            hidden = model.model(ids).last_hidden_state[0]
        expected = hidden.mean(0) if pooling == "mean" else hidden[-1]
        similarity = torch.cosine_similarity(torch.tensor(each.embedding), expected, dim=0)
        assert similarity.item() == pytest.approx(1, abs=1e-5)
        assert torch.tensor(each.embedding).norm().item() == pytest.approx(1, abs=1e-5)
    assert found.usage.prompt_tokens == sum(len(tokenizer(text).input_ids) for text in texts)


def test_the_cache_is_explained_as_the_next_request_finds_it(server: ServerProcess) -> None:
    def claim(text: str) -> dict[str, Any]:
        (found,) = ask(server, "/cache/explain", prompt=text)["replicas"]
        return dict(found)

    def cached(text: str) -> int:
        usage = ask(server, "/generate", prompt=text, max_new_tokens=4, stream=False)["usage"]
        return int(usage["cached_tokens"])

    told = "A story. " + STORY
    assert claim(told)["hit_tokens"] == 0
    assert cached(told) == 0
    for prompt in (told, told[: len(told) // 2] + " Then it all changed, for good. " * 4, told * 2):
        found = claim(prompt)
        assert found["hit_tokens"] == cached(prompt) > 0, found
    assert ask(server, "/flush_cache")["ok"]
    assert claim(told)["hit_tokens"] == cached(told) == 0


def test_a_receipt_counts_the_steps_of_an_answer(server: ServerProcess) -> None:
    body = {"prompt": "Counted once: " + STORY, "max_new_tokens": 5, "stream": False}
    answer = ask(server, "/generate", **body, receipt=True, ignore_eos=True)
    receipt, tokens = answer["receipt"], answer["usage"]["prompt_tokens"]
    assert receipt["cached_tokens"] + receipt["computed_tokens"] == tokens
    assert receipt["steps"] == -(-receipt["computed_tokens"] // 64) + 4
    assert (receipt["mean_batch"], receipt["yields"], receipt["replica"]) == (1.0, 0, 0)
    assert all(receipt[name] > 0 for name in ("queue_s", "prefill_s", "decode_s"))


def test_a_stream_that_asks_for_it_tells_how_far_its_prompt_is(server: ServerProcess) -> None:
    body = {"text": "Told: " + STORY, "sampling_params": {"max_new_tokens": 1}, "stream": True}
    url = f"{server.url}/generate"
    plain = httpx.post(url, json=body, timeout=PATIENCE_S).text
    asked = httpx.post(url, json=body, headers={"x-progress": "1"}, timeout=PATIENCE_S).text
    assert not plain.startswith(":")
    assert asked.startswith((": prefill ", ": queued "))
    assert asked.endswith("data: [DONE]\n\n")
    bad = httpx.post(url, json=body, headers={"x-progress": "yes"}, timeout=PATIENCE_S)
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "x-progress")
