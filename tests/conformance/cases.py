"""The backends that must conform, and what they are asked.

A new backend is one entry of `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from backend.interface import SamplingParams, Submission
from config import BackendSettings, DeviceSettings, FakeSettings, ModelSettings
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


def ask(
    id: str, prompt: Sequence[int] = PROMPTS[2], sampling: SamplingParams = PLAIN, **more: Any
) -> Submission:
    return Submission(id, tuple(prompt), sampling, **{"seed": 1, **more})


def varied() -> list[Submission]:
    return [
        ask(str(index), prompt, sampling, seed=index)
        for index, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True))
    ]
