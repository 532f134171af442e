"""From settings to a spec: what SGLang decided, less what it keeps free."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backend.interface import ModelBroken, ModelNotFound, StartFailed, Unsupported
from backend.sglang.arguments import SPARE_CONTEXT
from backend.sglang.bridge import Facts
from backend.sglang.folder import find_model
from backend.sglang.opening import log_level, make_spec
from config import ModelSettings
from tests.backend.sglang.engine_double import MEASURED_TOKENS, Script, stand_in
from tests.backend.sglang.opened import driven, open_sglang, settings, write_folder

FACTS = Facts(
    context=128,
    vocabulary=96,
    end_ids=frozenset({3}),
    dtype="bfloat16",
    attention="fa3",
    tokens=66 * 4,
    max_running=8,
    max_step_tokens=64,
    page_tokens=4,
    prefix=True,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    return stand_in(monkeypatch)


def test_the_spec_tells_what_sglang_decided(folder: Path, script: Script) -> None:
    with driven(settings(folder, max_running=5, max_step_tokens=30)) as driver:
        spec = driver.spec
        assert (spec.name, spec.model, spec.folder) == ("sglang", "model", str(folder))
        assert (spec.vocabulary, spec.stop_ids) == (96, (3,))
        assert spec.max_model_len == 128 - SPARE_CONTEXT
        assert (spec.pages, spec.page_tokens) == (64, 4)
        assert (spec.max_running, spec.max_step_tokens) == (5, 32)
        assert (spec.device, spec.dtype, spec.attention) == ("cuda", "bfloat16", "fa3")


@pytest.mark.parametrize(("asked", "found"), [(0, 121), (100, 100), (121, 121), (128, 121)])
def test_a_context_is_what_was_asked_for_as_far_as_the_model_goes(
    folder: Path, script: Script, asked: int, found: int
) -> None:
    with driven(settings(folder, max_model_len=asked)) as driver:
        assert driver.spec.max_model_len == found


def test_without_a_budget_the_pages_are_what_sglang_has_measured(
    folder: Path, script: Script
) -> None:
    given = settings(folder)
    given = given.model_copy(update={"cache": given.cache.model_copy(update={"budget_tokens": 0})})
    with driven(given) as driver:
        assert driver.spec.pages == MEASURED_TOKENS // 4 - 2


def test_a_budget_that_does_not_fit_stops_the_start_with_what_would(folder: Path) -> None:
    given = settings(folder, pages=65)
    with pytest.raises(Unsupported, match=r"^PAGE_TOKEN_BUDGET=260 does not fit: .* 256 tokens"):
        make_spec(given, find_model(given.model), FACTS)


@pytest.mark.parametrize(
    ("other", "flag"),
    [({"page_tokens": 64}, "PAGE_SIZE_TOKENS=4"), ({"prefix": False}, "PREFIX_CACHE=1")],
)
def test_what_sglang_took_in_place_of_what_it_was_asked_for_stops_the_start(
    folder: Path, other: dict[str, Any], flag: str
) -> None:
    given = settings(folder)
    model = find_model(given.model)
    assert make_spec(given, model, FACTS).pages == 64
    with pytest.raises(Unsupported, match=rf"^{flag}: SGLang[^\n]*fa3"):
        make_spec(given, model, replace(FACTS, **other))


def test_a_runtime_that_does_not_fit_is_ended_again(
    folder: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.sglang.arguments._capacity", lambda *_: 40)
    with pytest.raises(StartFailed, match="PAGE_TOKEN_BUDGET"):
        open_sglang(settings(folder))
    assert script.engines[0].shut


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("DEBUG", "info"), ("INFO", "warning"), ("WARNING", "warning"), ("ERROR", "error")],
)
def test_its_processes_log_as_others_do_here(
    caplog: pytest.LogCaptureFixture, ours: str, theirs: str
) -> None:
    caplog.set_level(ours, logger="backend.sglang.opening")
    assert log_level() == theirs


# Which model


def found(**model: Any) -> Any:
    return find_model(ModelSettings(**model))


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 3}, None, (3,)),
        ({"eos_token_id": [3, 4]}, {}, (3, 4)),
        ({"eos_token_id": 3}, {"eos_token_id": [5, 6]}, (5, 6)),
        ({}, {"eos_token_id": 7}, (7,)),
        ({}, None, ()),
    ],
)
def test_the_end_tokens_are_the_generation_configs_else_the_configs(
    tmp_path: Path, config: Any, generation: Any, ends: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_positions": 77}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    model = found(local_dir=str(tmp_path), load_format="dummy")
    assert (model.path, model.end_ids, model.context) == (tmp_path, ends, 77)


def test_the_context_of_a_model_of_several_kinds_is_that_of_its_text(tmp_path: Path) -> None:
    text = {"text_config": {"max_position_embeddings": 55}}
    (tmp_path / "config.json").write_text(json.dumps(text))
    assert found(local_dir=str(tmp_path), load_format="dummy").context == 55


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_a_folder_without_safetensors_is_refused_unless_weights_are_made_up(
    folder: Path, load_format: str
) -> None:
    with pytest.raises(ModelNotFound, match=r"is no folder with config.json and safetensors"):
        found(local_dir=str(folder), load_format=load_format)
    (folder / "model.safetensors").touch()
    assert found(local_dir=str(folder), load_format=load_format).path == folder


def test_a_gguf_is_refused_with_what_reads_it(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    for place in (tmp_path, tmp_path / "a.gguf"):
        with pytest.raises(ModelNotFound, match="BACKEND_IMPL=hf"):
            found(local_dir=str(place))


def test_a_model_that_is_nowhere_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"^MODEL_LOCAL_DIR=.*gone does not exist$"):
        found(local_dir=str(tmp_path / "gone"))
    with pytest.raises(ModelNotFound, match=r"^MODEL_NAME=nobody/nothing is no local path[^\n]*$"):
        found(name="nobody/nothing")


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_config_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelBroken, match=r"config\.json"):
        found(local_dir=str(tmp_path), load_format="dummy")


def test_end_tokens_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ModelBroken, match="eos_token_id"):
        found(local_dir=str(tmp_path), load_format="dummy")
