"""What a start needs, what it refuses, and that a folder is read as its writer meant it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ConcatenateKVCache
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from backend.interface import (
    ModelBroken,
    ModelNotFound,
    StartFailed,
    Unsupported,
    Wants,
)
from backend.mlx import library
from backend.mlx.folder import context_length, end_ids, rotation
from backend.mlx.opening import choose_device
from config import BackendSettings, DeviceSettings, ModelSettings
from engine.opening import open_backend
from tests.backend.mlx.drivers import (
    edited_copy,
    native_answers,
    opened,
    settings_of,
)
from tests.conformance.cases import PROMPTS, ask

GREEDY = [ask(str(number), ids) for number, ids in enumerate(PROMPTS)]


@pytest.mark.parametrize(
    ("device", "flag"),
    [
        ({"attention": "sdpa"}, "ATTN_IMPL=sdpa"),
        ({"tensor_parallel": 2}, "TENSOR_PARALLEL_SIZE=2"),
        ({"deterministic": True}, "DETERMINISTIC=1"),
        ({"compile_model": True}, "COMPILE_MODEL=1"),
        ({"device": "cuda"}, "DEVICE=cuda"),
    ],
)
def test_a_flag_that_means_nothing_here_is_refused_by_its_name(
    device: dict[str, Any], flag: str
) -> None:
    settings = BackendSettings(impl="mlx", device=DeviceSettings(**device))
    with pytest.raises(Unsupported, match=rf"^{flag}: [^\n]*BACKEND_IMPL=hf$"):
        open_backend(settings)


@pytest.mark.parametrize("format", ["gguf", "dummy"])
def test_a_format_that_mlx_lm_does_not_load_is_refused_by_its_name(
    llama: Path, format: Any
) -> None:
    model = ModelSettings(local_dir=str(llama), load_format=format)
    with pytest.raises(Unsupported, match=rf"^LOAD_FORMAT={format}: [^\n]*$"):
        open_backend(BackendSettings(impl="mlx", model=model))


def test_what_is_not_there_is_not_found_and_the_message_names_the_flag(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    for model, words in (
        (ModelSettings(local_dir=missing), rf"^MODEL_LOCAL_DIR={missing} does not exist: "),
        (ModelSettings(name="nobody/nothing"), "^MODEL_NAME=nobody/nothing is no local path, "),
        (ModelSettings(local_dir=str(tmp_path)), rf"^{tmp_path} is no folder with "),
        (ModelSettings(local_dir=__file__), "^[^\n]*test_opening.py is no folder with "),
    ):
        with pytest.raises(ModelNotFound, match=words + r"[^\n]*$"):
            open_backend(BackendSettings(impl="mlx", model=model))


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"model_type": "unheard of"}'])
def test_a_config_that_says_nothing_of_use_is_refused_in_one_line_that_names_the_folder(
    tmp_path: Path, content: str | None
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(StartFailed, match=rf"^[^\n]*{tmp_path}[^\n]*$"):
        open_backend(settings_of(tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "unheard of"},
        {"hidden_size": 64},  # not what the weights have
        {"num_hidden_layers": 3},
        {"rms_norm_eps": None},
        {"vocab_size": "many"},
    ],
    ids=str,
)
def test_what_mlx_lm_cannot_load_is_said_in_one_line(
    llama: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = edited_copy(llama, tmp_path / "model", **config)
    with pytest.raises(StartFailed, match=rf"^mlx-lm cannot load {folder}: [^\n]+$"):
        open_backend(settings_of(folder))


def test_a_file_of_weights_that_ends_too_early_is_said_in_one_line(
    llama: Path, tmp_path: Path
) -> None:
    folder = edited_copy(llama, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(StartFailed, match=rf"^mlx-lm cannot load {folder}: [^\n]+$"):
        open_backend(settings_of(folder))


def test_a_model_that_mlx_lm_cannot_batch_is_refused_at_the_start(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def caches(model: Any) -> list[ConcatenateKVCache]:
        return [ConcatenateKVCache() for _ in model.layers]

    monkeypatch.setattr(library, "make_prompt_cache", caches)
    with pytest.raises(StartFailed, match=rf"^mlx-lm cannot load {llama}: [^\n]*batching[^\n]*$"):
        open_backend(settings_of(llama))


def test_a_folder_with_code_of_its_own_runs_only_when_that_is_trusted(
    llama: Path, tmp_path: Path
) -> None:
    folder = edited_copy(llama, tmp_path / "model", model_file="own.py")
    (folder / "own.py").write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    with pytest.raises(Unsupported, match=r"^[^\n]*own.py[^\n]*TRUST_REMOTE_CODE=1$"):
        open_backend(settings_of(folder))
    trusted = ModelSettings(local_dir=str(folder), dtype="float32", trust_remote_code=True)
    backend = open_backend(settings_of(folder).model_copy(update={"model": trusted}))
    assert backend.spec.parameters > 0


def test_the_device_is_the_gpu_where_there_is_one_unless_another_is_asked_for() -> None:
    assert [choose_device(asked, metal=True) for asked in ("auto", "mps", "cpu")] == [
        "mps",
        "mps",
        "cpu",
    ]
    assert [choose_device(asked, metal=False) for asked in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(Unsupported, match=r"^DEVICE=mps: "):
        choose_device("mps", metal=False)


def test_the_context_is_the_models_own_or_less(tmp_path: Path) -> None:
    own: dict[str, Any] = {"max_position_embeddings": 128}
    for config, asked, length in (
        (own, 0, 128),
        (own, 100, 100),
        ({"n_positions": 64}, 0, 64),
        ({"text_config": own, "n_positions": 7}, 0, 128),
        ({}, 50, 50),
    ):
        assert context_length(ModelSettings(max_model_len=asked), config, tmp_path) == length
    with pytest.raises(Unsupported, match="MAX_MODEL_LEN=129 exceeds the model's context of 128"):
        context_length(ModelSettings(max_model_len=129), own, tmp_path)
    with pytest.raises(Unsupported, match="set MAX_MODEL_LEN"):
        context_length(ModelSettings(), {}, tmp_path)
    with pytest.raises(ModelBroken, match="n_positions must be a number from 1, is 'x'"):
        context_length(ModelSettings(), {"n_positions": "x"}, tmp_path)


def test_end_tokens_are_one_or_many_or_none() -> None:
    assert end_ids({"eos_token_id": 2}) == (2,)
    assert end_ids({"eos_token_id": [2, 5]}) == (2, 5)
    assert end_ids({}) == ()
    with pytest.raises(ModelBroken, match="eos_token_id must be token ids, has True"):
        end_ids({"eos_token_id": True})


def test_rotations_are_told_in_the_words_that_every_model_of_mlx_lm_reads() -> None:
    scaled = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    assert rotation({"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}}) == {
        "rope_theta": 300.0
    }
    assert rotation({"rope_parameters": scaled}) == {"rope_theta": 5e5, "rope_scaling": scaled}
    assert rotation({"rope_theta": 1.0, "rope_parameters": scaled}) == {}
    assert rotation({"rope_parameters": {"full_attention": scaled}}) == {}
    assert rotation({}) == {}


@pytest.mark.parametrize(
    "rotations",
    [
        {"rope_type": "default", "rope_theta": 300.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda each: str(each["rope_type"]),
)
def test_a_folder_that_transformers_5_wrote_answers_as_with_the_native_backend(
    llama: Path, tmp_path: Path, rotations: dict[str, Any]
) -> None:
    folder = edited_copy(llama, tmp_path / "model", rope_parameters=rotations)
    found = [answer.tokens for answer in opened(folder).run(*GREEDY)]
    assert found == [answer.tokens for answer in native_answers(folder, *GREEDY)]
    assert found != [answer.tokens for answer in opened(llama).run(*GREEDY)]


def test_weights_are_held_as_they_are_stored_or_as_dtype_says(llama: Path) -> None:
    stored, half = opened(llama, dtype="auto").spec, opened(llama, dtype="bfloat16").spec
    assert (stored.dtype, half.dtype) == ("float32", "bfloat16")
    assert stored.weight_bytes == 2 * half.weight_bytes
    assert stored.kv_bytes_per_token == 2 * half.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert stored.parameters == half.parameters


def test_a_quantized_folder_of_mlx_answers_and_is_near_the_one_it_was_made_from(
    llama: Path, tmp_path: Path
) -> None:
    folder = quantized_copy(llama, tmp_path / "model")
    driver, whole = opened(folder, dtype="auto"), opened(llama)
    assert driver.spec.weight_bytes < whole.spec.weight_bytes / 2
    assert driver.spec.parameters == whole.spec.parameters
    wants = Wants(prompt_logprobs_from=0, logprobs=True)
    for ids in PROMPTS[2:]:
        (found,) = driver.run(ask("found", ids, wants=wants))
        (near,) = whole.run(ask("near", ids, wants=wants))
        for one, other in zip(found.prompt_logprobs, near.prompt_logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=0.5)
        assert found.tokens == quantized_greedy(folder, ids, len(found.tokens))


def quantized_copy(folder: Path, target: Path) -> Path:
    """An MLX folder with 8 bits a weight, made by mlx-lm from a folder of safetensors."""
    edited_copy(folder, target)
    for path in target.glob("*.safetensors"):
        path.unlink()
    model, config = load_model(folder)
    model, config = quantize_model(model, config, group_size=32, bits=8)
    save_model(target, model)
    save_config(config, config_path=target / "config.json")
    return target


def quantized_greedy(folder: Path, prompt: tuple[int, ...], count: int) -> list[int]:
    """The greedy answer of mlx-lm's own model, each token by a forward pass over everything."""
    model, _ = load_model(folder)
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1])))
    return ids[len(prompt) :]


def test_a_backend_opened_in_one_thread_answers_in_another(llama: Path) -> None:
    driver = opened(llama)
    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.append(driver.run(ask("a"))[0].tokens))
    thread.start()
    thread.join()
    assert found == [opened(llama).run(ask("a"))[0].tokens]
