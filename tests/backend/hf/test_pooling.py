"""Prompts as vectors, against transformers' own hidden states."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from backend.interface import Pooling, RequestRefused, SamplingParams, Submission, Wants
from tests.backend.hf.reference import Driver, open_scheduler, random_prompts, tiny_sizes

NO_TOKENS = SamplingParams(max_new_tokens=0)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    model = AutoModelForCausalLM.from_config(LlamaConfig(**tiny_sizes(256))).eval()
    model.save_pretrained(folder)
    return model, folder


def vectors(scheduler: Driver, prompts: Sequence[Sequence[int]], pooling: Pooling) -> torch.Tensor:
    for number, prompt in enumerate(prompts):
        wants = Wants(pooling=pooling)
        submission = Submission(str(number), tuple(prompt), NO_TOKENS, 0, wants)
        scheduler.spec.check(submission)
        scheduler.submit(submission)
    found = {delta.id: delta for delta in scheduler.drain()}
    assert all(delta.tokens == () for delta in found.values())
    return torch.tensor([found[str(number)].pooled for number in range(len(prompts))])


def expected(model: Any, prompts: Sequence[Sequence[int]], pooling: Pooling) -> torch.Tensor:
    rows = []
    with torch.inference_mode():
        for prompt in prompts:
            state = model.model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0]
            rows.append(state.mean(0) if pooling == "mean" else state[-1])
    return torch.stack(rows)


@pytest.mark.parametrize("step_tokens", [7, 64, 512])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_vector_is_that_of_transformers_however_its_prompt_is_cut(
    reference: tuple[Any, Path], pooling: Pooling, step_tokens: int
) -> None:
    model, folder = reference
    prompts = random_prompts(random.Random(step_tokens), 6, 120, 97)
    scheduler = open_scheduler(folder, step_tokens=step_tokens, page_tokens=4)
    found = vectors(scheduler, prompts, pooling)
    torch.testing.assert_close(found, expected(model, prompts, pooling), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("pooling", "cached"), [("mean", 0), ("last", 96)])
def test_a_cached_prefix_never_skips_positions_of_a_mean(
    reference: tuple[Any, Path], pooling: Pooling, cached: int
) -> None:
    model, folder = reference
    prompt = random_prompts(random.Random(1), 1, 1, 97)[0] * 100
    scheduler = open_scheduler(folder, page_tokens=4)
    first = vectors(scheduler, [prompt], pooling)
    scheduler.submit(Submission("again", tuple(prompt), NO_TOKENS, 0, Wants(pooling=pooling)))
    (again,) = scheduler.drain()
    assert again.cached == cached
    torch.testing.assert_close(torch.tensor([again.pooled]), first, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(first, expected(model, [prompt], pooling), atol=2e-4, rtol=1e-4)


def test_a_prompt_that_is_a_vector_has_no_tokens(reference: tuple[Any, Path]) -> None:
    spec = open_scheduler(reference[1]).spec
    some = SamplingParams(max_new_tokens=1)
    with pytest.raises(RequestRefused, match="pooling"):
        spec.check(Submission("x", (1,), some, 0, Wants(pooling="mean")))
