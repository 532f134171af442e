"""The Triton attention against `SdpaAttention` in float32, and its tokens against those of a CPU.

Keys, values and queries are rounded to the dtype first, so what is bounded is the kernels' own
error. Every position that no sequence holds is NaN in the kernels' pool.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from backend.hf.attention import (
    ATTENTION,
    AttentionOptions,
    AttentionSetup,
    KvGeometry,
    PagedAttention,
)
from backend.hf.batch import DecodeRows, ForwardBatch, PrefillSpan
from backend.interface import SamplingParams
from config import (
    BackendSettings,
    BatchSettings,
    CacheSettings,
    DeviceSettings,
    ModelSettings,
    Settings,
)
from engine.llm import LLM
from tests.backend.hf.reference import random_prompts

pytestmark = pytest.mark.gpu

MOST_ERROR = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of values in +-5


@dataclass(frozen=True, slots=True)
class Case:
    """What the kernels are compiled for."""

    dtype: torch.dtype = torch.bfloat16
    group: int = 2
    key_width: int = 128
    value_width: int = 128
    page: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    kv_heads: int = 4

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def options(self) -> AttentionOptions:
        sinks = torch.linspace(-2, 6, self.heads, device="cuda") if self.sinks else None
        return AttentionOptions(self.key_width**-0.5, self.window, self.softcap, sinks)

    def open(self, name: str, pages: int, dtype: torch.dtype) -> Any:
        geometry = KvGeometry(1, self.kv_heads, self.key_width, self.value_width)
        module, kind = ATTENTION[name].split(":")
        setup = AttentionSetup(geometry, pages, self.page, dtype, "cuda")
        return getattr(import_module(module), kind)(setup)


def of_width(width: int, dtype: torch.dtype) -> Case:
    return Case(dtype, key_width=width, value_width=width)


CASES = {
    **{f"bf16, width {w}": of_width(w, torch.bfloat16) for w in (8, 64, 80, 96, 128, 256)},
    **{f"fp32, width {w}": of_width(w, torch.float32) for w in (8, 64, 96, 128, 256)},
    "fp16": of_width(128, torch.float16),
    **{f"group {group}": Case(group=group) for group in (1, 3, 4, 8, 20)},
    **{f"pages of {page}": Case(page=page) for page in (1, 48, 64, 256)},
    "window": Case(window=5),
    "wide window": Case(window=700, dtype=torch.float32),
    "softcap": Case(softcap=2.0),
    "sinks": Case(sinks=True),
    "all": Case(torch.float32, 3, 64, 64, 4, window=90, softcap=2.0, sinks=True),
    "values narrower than keys": Case(key_width=192, value_width=128, kv_heads=3),
}


class Sequences:
    """Sequences of random keys and values in pages of random order."""

    def __init__(self, case: Case, lengths: list[int]) -> None:
        torch.manual_seed(sum(lengths))
        self.case = case
        width = case.kv_heads * (case.key_width + case.value_width)
        self.rows = [self.random(length, width) for length in lengths]
        pages = [-(-length // case.page) for length in lengths]
        self.tables: list[Tensor] = list(torch.randperm(sum(pages), device="cuda").split(pages))
        self.kernels = case.open("triton", sum(pages), case.dtype)
        self.reference = case.open("sdpa", sum(pages), torch.float32)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").to(self.case.dtype)

    def places(self, sequence: int, positions: Tensor) -> Tensor:
        page, table = self.case.page, self.tables[sequence]
        return table[positions // page] * page + positions % page

    def error(self, decodes: list[int], chunks: list[tuple[int, int]]) -> float:
        """Decode the last position of `decodes`; attend for the positions of each chunk (sequence,
        start) on. Returns the largest difference.
        """
        starts = [(s, len(self.rows[s]) - 1) for s in decodes] + chunks
        parts = [(s, torch.arange(at, len(self.rows[s]), device="cuda")) for s, at in starts]
        batch = self.batch(parts, len(decodes))
        kv = torch.cat([self.rows[s][positions] for s, positions in parts])
        wide = self.random(len(kv), self.case.heads + 1, self.case.key_width)
        query = wide[:, : self.case.heads]  # a view, as the decoder's is
        got, right = (
            self.attend(attention, rest, query.to(dtype), kv.to(dtype), batch, starts)
            for attention, rest, dtype in (
                (self.kernels, torch.nan, self.case.dtype),
                (self.reference, 0.0, torch.float32),
            )
        )
        assert got.dtype == self.case.dtype
        assert not got.isnan().any()
        return (got.float() - right).abs().max().item()

    def attend(
        self,
        attention: PagedAttention,
        rest: float,
        query: Tensor,
        kv: Tensor,
        batch: ForwardBatch,
        starts: list[tuple[int, int]],
    ) -> Tensor:
        (pool,) = attention.pools
        pool.fill_(rest)
        for s, at in starts:
            before = torch.arange(at, device="cuda")
            pool[self.places(s, before)] = self.rows[s][before].to(pool.dtype)
        pool.index_copy_(0, batch.write_at, kv)
        return attention.attend(0, query, kv, batch, self.case.options())

    def batch(self, parts: list[tuple[int, Tensor]], decodes: int) -> ForwardBatch:
        lengths = [len(self.rows[s]) for s, _ in parts[:decodes]]
        longest = -(-max(lengths, default=0) // self.case.page)
        tables = torch.zeros(decodes, longest, dtype=torch.int64, device="cuda")
        for row, (s, _) in enumerate(parts[:decodes]):
            tables[row, : len(self.tables[s])] = self.tables[s]
        spans, offset = [], decodes
        for s, positions in parts[decodes:]:
            spans.append(PrefillSpan(offset, len(positions), int(positions[0]), self.tables[s]))
            offset += len(positions)
        return ForwardBatch(
            token_ids=torch.zeros(offset, dtype=torch.int64, device="cuda"),
            positions=torch.cat([positions for _, positions in parts]),
            write_at=torch.cat([self.places(s, positions) for s, positions in parts]),
            decodes=DecodeRows(
                decodes,
                torch.arange(decodes, device="cuda"),
                torch.tensor(lengths, device="cuda"),
                tables,
                tables.shape[1],
            ),
            spans=tuple(spans),
        )


@pytest.mark.parametrize("name", CASES)
def test_decodes_and_chunks_attend_as_sdpa_does(name: str) -> None:
    case = CASES[name]
    rng = random.Random(name)
    long = Sequences(case, [1, 2, 16, 17, 255, 257, 512, 3000, rng.randint(1, 3000), 3000, 70, 600])
    mixed = long.error(list(range(8)), [(8, 0), (9, 2500), (10, 69), (11, 1)])
    assert mixed < MOST_ERROR[case.dtype]
    assert long.error([], [(7, 1003), (0, 0), (8, 0)]) < MOST_ERROR[case.dtype]
    many = Sequences(case, [1, *(rng.randint(1, 300) for _ in range(198)), 300])  # never split
    assert many.error(list(range(200)), []) < MOST_ERROR[case.dtype]


@pytest.mark.parametrize("seed", range(20))
def test_a_random_mixed_batch_attends_as_sdpa_does(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, rng.choice([20, 300, 3000])) for _ in range(rng.randint(2, 40))]
    case = replace(Case(), dtype=rng.choice([torch.bfloat16, torch.float32]))
    sequences = Sequences(case, lengths)
    cut = rng.randint(0, len(lengths) - 1)
    chunks = [(s, rng.randrange(lengths[s])) for s in range(cut, len(lengths))]
    assert sequences.error(list(range(cut)), chunks) < MOST_ERROR[case.dtype]


def test_splits_fill_the_chip_but_are_not_shorter_than_it_pays() -> None:
    attention = import_module("backend.hf.attention.triton")
    assert attention.split_count(programs=5000, tokens=100_000, wanted=4000) == 1
    assert attention.split_count(programs=256, tokens=4096, wanted=3000) == 8
    assert attention.split_count(programs=8, tokens=1000, wanted=3000) == 8
    assert attention.split_count(programs=8, tokens=128, wanted=3000) == 1
    assert attention.split_count(programs=1, tokens=1 << 20, wanted=3000) == 64


SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral with a window": lambda: MistralConfig(**SIZES, sliding_window=24, head_dim=8),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=64),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_answers_the_same_tokens_as_with_sdpa_and_on_a_cpu(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    prompts = random_prompts(random.Random(name), count=12, longest=400, vocabulary=97)
    answers = [
        _answers(tmp_path, prompts, DeviceSettings(device=device, attention=attention))
        for device, attention in (("cpu", "sdpa"), ("cuda", "sdpa"), ("cuda", "triton"))
    ]
    assert answers[0] == answers[1]
    assert answers[0] == answers[2]


def _answers(
    folder: Path, prompts: list[tuple[int, ...]], device: DeviceSettings
) -> list[list[int]]:
    settings = BackendSettings(
        model=ModelSettings(local_dir=str(folder), dtype="float32"),
        device=device,
        cache=CacheSettings(page_tokens=4, budget_tokens=8192),
        batch=BatchSettings(max_step_tokens=100),
    )
    with LLM(Settings(backend=settings)) as llm:
        found = llm.generate(prompts, SamplingParams(max_new_tokens=40))
    return [list(answer.token_ids) for answer in found]
