"""`POST /v1/embeddings`: what is refused, and what becomes of the engine's vectors."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from api.embedding_model import EmbeddingModel, embedding_model
from api.embeddings import EmbeddingsBody, _reply, router, unit
from api.errors import ApiError
from tests.api.in_process import post, refusal


def test_a_model_that_says_nothing_of_pooling_is_refused_with_the_way_out() -> None:
    response = post(router, "/v1/embeddings", {"input": "hello"})
    assert refusal(response) == (400, "pooling")
    assert '"mean" or "last"' in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": "hello", "pooling": "mean"}, "pooling"),  # the fake backend has no vectors
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": "a", "pooling": "cls"}, "pooling"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ],
)
def test_what_cannot_be_had_is_a_400_that_names_it(body: dict[str, Any], param: str) -> None:
    assert refusal(post(router, "/v1/embeddings", body)) == (400, param)


def folder_with(path: Path, modules: object, pooling: object, config: object) -> str:
    (path / "1_Pooling").mkdir()
    for name, content in (
        ("modules.json", modules),
        ("1_Pooling/config.json", pooling),
        ("config.json", config),
    ):
        (path / name).write_text(json.dumps(content))
    return str(path)


def module(kind: str, path: str = "") -> dict[str, str]:
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


USUAL = [module("Transformer"), module("Pooling", "1_Pooling"), module("Normalize", "2_Normalize")]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("pooling_mode_mean_tokens", "mean"), ("pooling_mode_lasttoken", "last")],
)
def test_pooling_is_what_the_folder_says(tmp_path: Path, mode: str, expected: str) -> None:
    modes = {"pooling_mode_cls_token": False, "word_embedding_dimension": 8, mode: True}
    found = embedding_model(folder_with(tmp_path, USUAL, modes, {}))
    assert found.choose(None) == expected
    assert found.choose("mean") == "mean"


@pytest.mark.parametrize(
    ("modules", "pooling", "said"),
    [
        (USUAL, {"pooling_mode_cls_token": True}, "pooling_mode_cls_token"),
        (USUAL, {}, "nothing"),
        (USUAL, [], "nothing"),
        ([*USUAL, module("Dense", "3_Dense")], {"pooling_mode_lasttoken": True}, "Dense"),
        ({}, {}, "modules.json"),
    ],
)
def test_a_pooling_that_is_not_served_is_named(
    tmp_path: Path, modules: object, pooling: object, said: str
) -> None:
    found = embedding_model(folder_with(tmp_path, modules, pooling, {}))
    with pytest.raises(ApiError, match=said) as error:
        found.choose(None)
    assert (error.value.status, error.value.param) == (400, "pooling")


@pytest.mark.parametrize(
    ("config", "allowed", "refused"),
    [
        ({}, [8], [4, 9]),
        ({"is_matryoshka": True}, [1, 4, 8], [9]),
        ({"matryoshka_dimensions": [2, 4]}, [2, 4, 8], [3, 9]),
    ],
)
def test_vectors_are_cut_only_for_models_that_allow_it(
    tmp_path: Path, config: object, allowed: list[int], refused: list[int]
) -> None:
    found = embedding_model(folder_with(tmp_path, USUAL, {}, config))
    for size in allowed:
        found.check_dimensions(size, 8)
    for size in refused:
        with pytest.raises(ApiError) as error:
            found.check_dimensions(size, 8)
        assert (error.value.status, error.value.param) == (400, "dimensions")


class Pooled:
    """A finished answer, as far as a reply looks at it."""

    prompt_tokens = 3

    def __init__(self, *pooled: float) -> None:
        self.live, self.pooled, self.answer = self, pooled, self


def test_vectors_are_cut_first_and_then_scaled_to_length_1() -> None:
    body = EmbeddingsBody(input="a", dimensions=2)
    wholes: Any = [Pooled(3.0, 4.0, 12.0), Pooled(0.0, 0.0, 1.0)]
    reply = _reply(body, EmbeddingModel("mean", shortens=True), wholes)
    assert [each["embedding"] for each in reply["data"]] == [[0.6, 0.8], [0.0, 0.0]]
    assert reply["usage"] == {"prompt_tokens": 6, "total_tokens": 6}


def test_base64_holds_the_same_numbers_as_float32() -> None:
    wholes: Any = [Pooled(*range(1, 9))]
    body = EmbeddingsBody(input="a", encoding_format="base64")
    text = _reply(body, EmbeddingModel("mean"), wholes)["data"][0]["embedding"]
    found = np.frombuffer(base64.b64decode(text), dtype="<f4")
    np.testing.assert_allclose(found, unit(range(1, 9)), rtol=1e-6)
