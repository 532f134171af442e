"""COMPILE_MODEL: the same answers by compiled functions, and a refusal where nothing compiles."""

from __future__ import annotations

import logging
import random
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from backend.hf.models import compiled_blocks
from backend.hf.opening import open_backend
from backend.hf.precision import choose_precision
from backend.interface import SamplingParams, Submission, Unsupported
from config import BackendSettings, BatchSettings, CacheSettings, DeviceSettings, ModelSettings
from tests.backend.hf.reference import Driver, random_prompts

CONFIG = Qwen3Config(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    eos_token_id=None,
    initializer_range=0.2,
)


@pytest.mark.skipif(
    compiled_blocks.compiler_lack("cpu") is not None, reason="there is no C++ compiler here"
)
def test_a_compiled_model_answers_the_tokens_of_an_eager_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).save_pretrained(tmp_path)
    prompts = random_prompts(random.Random(0), count=5, longest=90, vocabulary=97)
    eager, compiled = (_answers(tmp_path, prompts, compiles) for compiles in (False, True))
    assert "COMPILE_MODEL=1: the first steps wait for torch.compile" in caplog.messages
    assert eager == compiled


def _answers(folder: Path, prompts: list[tuple[int, ...]], compiles: bool) -> list[list[int]]:
    """Of all prompts at once, then of the first alone."""
    settings = BackendSettings(
        model=ModelSettings(local_dir=str(folder), dtype="float32"),
        device=DeviceSettings(device="cpu", compile_model=compiles),
        cache=CacheSettings(page_tokens=4, budget_tokens=2048),
        batch=BatchSettings(max_running=8, max_step_tokens=64),
    )
    driver = cast(Driver, open_backend(settings, Driver))
    tokens: list[list[int]] = [[] for _ in prompts]
    for company in (prompts, prompts[:1]):
        for number, prompt in enumerate(company):
            sampling = SamplingParams(max_new_tokens=12)
            driver.submit(Submission(id=str(number), prompt=prompt, sampling=sampling, seed=0))
        for delta in driver.drain():
            tokens[int(delta.id)] += delta.tokens
    return tokens


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_without_a_compiler_it_is_refused_with_one_line(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "c++-of-nobody")
    monkeypatch.setattr(compiled_blocks, "find_spec", lambda name: None)
    line = r"^COMPILE_MODEL=1 [^\n]*: use COMPILE_MODEL=0$"
    with pytest.raises(Unsupported, match=line) as error:
        compiled_blocks.compiled_blocks(choose_precision("float32", device), device)
    wanted = {"cpu": "c++-of-nobody", "cuda": "triton is not installed", "mps": "DEVICE is mps"}
    assert wanted[device] in str(error.value)


def test_on_cuda_it_needs_triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(compiled_blocks, "find_spec", lambda name: find_spec("torch"))
    assert compiled_blocks.compiler_lack("cuda") is None
