"""`/v1/models`: what clients ask first."""

from __future__ import annotations

from pathlib import Path

import pytest
from openai import AsyncOpenAI, NotFoundError

from tests.api.in_process import Server
from tests.api.openai_bench import refusal, run


def test_the_official_client_lists_the_one_model() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        (model,) = [model async for model in client.models.list()]
        assert (model.id, model.object, model.owned_by) == ("fake", "model", "mini-sglang")
        assert model.created > 1_700_000_000
        assert model.to_dict()["max_model_len"] == server.pool.spec.max_model_len
        assert await client.models.retrieve("fake") == model

    run(check)


def test_the_alias_is_shown_and_every_name_finds_the_model(small_model: Path) -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        (model,) = [model async for model in client.models.list()]
        assert model.id == "team/our-model"
        assert model.to_dict()["root"] == small_model.name
        for name in ("team/our-model", small_model.name):
            assert (await server.client.get(f"/v1/models/{name}")).json()["id"] == model.id

    run(check, MODEL_ALIAS="team/our-model", MODEL_LOCAL_DIR=small_model)


@pytest.mark.parametrize("name", ["gpt-4", "fake/", "fake/more", "Fake"])
def test_another_name_is_not_found(name: str) -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        response = await server.client.get(f"/v1/models/{name}")
        assert refusal(response) == (404, "model")
        with pytest.raises(NotFoundError) as error:
            await client.models.retrieve(name)
        assert error.value.code == "model_not_found"

    run(check)
