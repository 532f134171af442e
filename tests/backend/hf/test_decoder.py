"""Our decoder against transformers' own modelling code, float32, on tiny random models."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from backend.interface import Unsupported
from tests.backend.hf.reference import (
    Schedule,
    check_against,
    open_scheduler,
    random_prompts,
    tiny_sizes,
)

SIZES = tiny_sizes(256)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama tied, biases, wide heads": LlamaConfig(
        **SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=16
    ),
    "llama without grouped queries": LlamaConfig(**(SIZES | {"num_key_value_heads": 6})),
    "llama3 rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "linear rope": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "yarn rope": Qwen2Config(**SIZES, rope_parameters=YARN),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=24, head_dim=8),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2 with a window in its upper layers": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=24, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}


def save(config: PreTrainedConfig, folder: Path) -> Any:
    """A random model of `config` in `folder`; returns transformers' own."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_and_log_probabilities_equal_those_of_transformers(
    name: str, tmp_path: Path
) -> None:
    reference = save(CONFIGS[name], tmp_path)
    scheduler = open_scheduler(tmp_path, step_tokens=32, page_tokens=4)
    prompts = random_prompts(random.Random(name), count=6, longest=90, vocabulary=97)
    check_against(reference, scheduler, prompts, new_tokens=12, tolerance=1e-3)


@pytest.mark.parametrize("name", ["llama3 rope", "mistral with a window", "qwen3"])
def test_company_chunks_cache_hits_and_yields_change_no_answer(name: str, tmp_path: Path) -> None:
    save(CONFIGS[name], tmp_path)
    alone = open_scheduler(tmp_path, step_tokens=256, page_tokens=16)
    yields = 0
    for seed in range(3):
        schedule = Schedule.random(random.Random(f"{name} {seed}"), vocabulary=97)
        wanted = [alone.answer(submission) for submission in schedule.submissions]
        crowd = open_scheduler(
            tmp_path,
            step_tokens=schedule.step_tokens,
            page_tokens=schedule.page_tokens,
            pages=schedule.pages,
            max_running=schedule.max_running,
        )
        assert crowd.answers(schedule) == wanted
        yields += crowd.load().preemptions
    assert yields, "no schedule forced a yield"


def test_a_rope_scaling_that_moves_cached_keys_is_refused_by_name(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    save(LlamaConfig(**SIZES, rope_parameters=rope), tmp_path)
    with pytest.raises(Unsupported, match="'dynamic'"):
        open_scheduler(tmp_path)


def test_another_activation_is_refused_by_name(tmp_path: Path) -> None:
    save(LlamaConfig(**SIZES, hidden_act="gelu"), tmp_path)
    with pytest.raises(Unsupported, match="'gelu'"):
        open_scheduler(tmp_path)
