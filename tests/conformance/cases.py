"""The backends that must conform, and what they are asked.

A new backend is one entry of `BACKENDS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from backend.interface import BackendSpec, SamplingParams, Submission
from config import BackendSettings, DeviceSettings, FakeSettings, ModelSettings
from tests.backend.sglang.engine_double import stand_in
from tests.conformance.driver import Answer, Driver

Opener = Callable[..., Driver]
Alone = Callable[[Submission], Answer]

VOCABULARY = 96  # of the tiny models
END = 3
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # so that no two logits are close
    "eos_token_id": END,
    "bos_token_id": 1,
}


def fake(depth: int) -> Callable[[Path], BackendSettings]:
    return lambda folder: BackendSettings(impl="fake", fake=FakeSettings(depth=depth))


def tiny(family: str) -> Callable[[Path], BackendSettings]:
    """The native backend over a random model of `family`, in float32 on the CPU."""

    def settings(folder: Path) -> BackendSettings:
        if not (folder / "config.json").exists():
            save_tiny_model(family, folder)
        return BackendSettings(
            impl="hf",
            model=ModelSettings(local_dir=str(folder), dtype="float32"),
            device=DeviceSettings(device="cpu"),
        )

    return settings


def tiny_mlx(family: str) -> Callable[[Path], BackendSettings]:
    """The same over mlx-lm, on whatever device that finds; skipped where it is not installed."""

    def settings(folder: Path) -> BackendSettings:
        pytest.importorskip("mlx_lm", reason="mlx-lm wants Python 3.11, on Linux or macOS")
        return tiny(family)(folder).model_copy(update={"impl": "mlx", "device": DeviceSettings()})

    return settings


def sglang_double(folder: Path) -> BackendSettings:
    """Our adapter over a stand-in for SGLang's engine, which reads seeds with DETERMINISTIC=1."""
    config = {**SHAPE, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    save_tiny_tokenizer(folder)
    return BackendSettings(
        impl="sglang",
        model=ModelSettings(local_dir=str(folder), load_format="dummy"),
        device=DeviceSettings(deterministic=True),
    )


def save_tiny_model(family: str, folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.generation_config.eos_token_id = END
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)


def save_tiny_tokenizer(folder: Path) -> None:
    """Each id above the special tokens is a printable character of ASCII."""
    import tokenizers

    characters = [chr(code) for code in range(ord("!"), ord("!") + VOCABULARY - 4)]
    specials = ["<unk>", "<s>", "<pad>", "</s>"]
    vocabulary = {token: id for id, token in enumerate([*specials, *characters])}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    found.decoder = tokenizers.decoders.ByteLevel()
    found.add_special_tokens(specials)
    found.save(str(folder / "tokenizer.json"))


BACKENDS: dict[str, Callable[[Path], BackendSettings]] = {
    "fake": fake(depth=1),
    "fake, three steps deep": fake(depth=3),
    "hf, llama": tiny("Llama"),
    "hf, qwen3": tiny("Qwen3"),
    "mlx, llama": tiny_mlx("Llama"),
    "mlx, qwen3": tiny_mlx("Qwen3"),
    "sglang, double": sglang_double,
}
# What stands in for a runtime that is not here, while its entry is tested: one whose tokens come
# two at a time, and for a while after a cancel.
DOUBLES: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "sglang, double": partial(stand_in, step_s=0.001, quiet_steps=1, late_steps=2)
}


def prompt(number: int, length: int) -> tuple[int, ...]:
    """Ids that every backend here knows, and different ones for each `number`."""
    return tuple(5 + (number * 31 + at * at * 7 + at) % (VOCABULARY - 5) for at in range(length))


PROMPTS = [prompt(number, length) for number, length in enumerate((1, 4, 9, 16, 23, 30))]
PLAIN = SamplingParams(max_new_tokens=12, ignore_eos=True)
SAMPLINGS = (
    PLAIN,
    replace(PLAIN, temperature=1.3),
    replace(PLAIN, temperature=0.9, top_p=0.9, top_k=20),
    replace(PLAIN, frequency_penalty=1.0, repetition_penalty=1.2),
    replace(PLAIN, temperature=1.0, presence_penalty=0.7, logit_bias=((7, 3.0),)),
    replace(PLAIN, stop_token_ids=tuple(range(40, 60)), min_new_tokens=4, ignore_eos=False),
)


def honoured(sampling: SamplingParams, spec: BackendSpec) -> SamplingParams:
    """`sampling` without what the backend lacks: that is refused, which has tests of its own."""
    plain: dict[str, Any] = {
        each.name: each.default for each in fields(sampling) if each.name in spec.lacks
    }
    return replace(sampling, **plain)


def ask(
    id: str, prompt: Sequence[int] = PROMPTS[2], sampling: SamplingParams = PLAIN, **more: Any
) -> Submission:
    return Submission(id, tuple(prompt), sampling, **{"seed": 1, **more})


def varied(spec: BackendSpec) -> list[Submission]:
    return [
        ask(str(index), prompt, honoured(sampling, spec), seed=index)
        for index, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True))
    ]
