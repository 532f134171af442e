"""The Triton attention against `SdpaAttention` in float32, and its tokens against those of a CPU.

Keys, values and queries are rounded to the dtype first, so what is bounded is the kernels' own
error. Every position that no sequence holds is NaN in the kernels' pool.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from backend.hf.attention import AttentionSetup
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
from tests.backend.hf.kernels.paged_sequences import Case, Part, Sequences
from tests.backend.hf.reference import random_prompts, tiny_sizes

pytestmark = pytest.mark.gpu

MOST_ERROR = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of values in +-5


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


def error(
    case: Case, lengths: list[int], steps: list[tuple[list[int], list[tuple[int, int]]]]
) -> float:
    """The largest difference over steps that decode the last position of sequences, and attend from
    a start to the end in chunks (sequence, start).
    """
    sequences = Sequences(case, lengths)
    kernels = sequences.open("triton", case.dtype)
    reference = sequences.open("sdpa", torch.float32)
    sequences.fill(kernels.pools[0], torch.nan)
    sequences.fill(reference.pools[0], 0.0)
    errors = []
    for decodes, chunks in steps:
        parts = (
            [Part(s, lengths[s] - 1, lengths[s]) for s in decodes],
            [Part(s, start, lengths[s]) for s, start in chunks],
        )
        got = sequences.attend(kernels, *parts)
        assert got.dtype == case.dtype
        assert not got.isnan().any()
        errors.append((got.float() - sequences.attend(reference, *parts)).abs().max().item())
    return max(errors)


@pytest.mark.parametrize("name", CASES)
def test_decodes_and_chunks_attend_as_sdpa_does(name: str) -> None:
    case = CASES[name]
    rng = random.Random(name)
    long = [1, 2, 16, 17, 255, 257, 512, 3000, rng.randint(1, 3000), 3000, 70, 600]
    mixed = list(range(8)), [(8, 0), (9, 2500), (10, 69), (11, 1)]
    chunks: tuple[list[int], list[tuple[int, int]]] = [], [(7, 1003), (0, 0), (8, 0)]
    assert error(case, long, [mixed, chunks]) < MOST_ERROR[case.dtype]
    many = [1, *(rng.randint(1, 300) for _ in range(198)), 300, 3000]
    assert error(case, many, [(list(range(201)), [])]) < MOST_ERROR[case.dtype]


@pytest.mark.parametrize("seed", range(20))
def test_a_random_mixed_batch_attends_as_sdpa_does(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, rng.choice([20, 300, 3000])) for _ in range(rng.randint(2, 40))]
    case = replace(Case(), dtype=rng.choice([torch.bfloat16, torch.float32]))
    cut = rng.randint(0, len(lengths) - 1)
    chunks = [(s, rng.randrange(lengths[s])) for s in range(cut, len(lengths))]
    assert error(case, lengths, [(list(range(cut)), chunks)]) < MOST_ERROR[case.dtype]


@pytest.mark.parametrize("count", [4096, 2500])
def test_a_prompt_of_wide_tiles_attends_as_sdpa_does(count: int) -> None:
    for case in (Case(), Case(kv_heads=8), Case(kv_heads=1, group=16, sinks=True)):
        steps: list[tuple[list[int], list[tuple[int, int]]]] = [([2], [(0, 0), (1, 77)])]
        assert error(case, [count, count, 50], steps) < MOST_ERROR[case.dtype]


def test_a_sequence_of_nan_leaves_its_neighbours_alone() -> None:
    sequences = Sequences(Case(), [100, 33, 300])
    sequences.rows[1].fill_(torch.nan)
    kernels = sequences.open("triton", torch.bfloat16)
    sequences.fill(kernels.pools[0], 0.0)
    got = sequences.attend(kernels, [], [Part(0, 0, 100), Part(1, 0, 33), Part(2, 0, 300)])
    assert not got[:100].isnan().any()
    assert got[100:133].isnan().all()
    assert not got[133:].isnan().any()


@pytest.mark.parametrize("count", [1, 9, 300])
@pytest.mark.parametrize("window", [None, 500])
def test_a_plan_deals_out_what_each_row_sees_and_splits_what_is_long(
    count: int, window: int | None
) -> None:
    rng = random.Random(count)
    lengths = [rng.randint(1, 400) for _ in range(count)] + [60_000]
    sequences = Sequences(Case(kv_heads=1, group=1, key_width=16, value_width=16), lengths)
    launch = import_module("backend.hf.attention.triton_launch")
    decode = import_module("backend.hf.attention.triton_decode")
    setup = AttentionSetup(sequences.case.geometry, 1, 16, torch.bfloat16, "cuda")
    rows = sequences.batch([Part(s, n - 1, n) for s, n in enumerate(lengths)], []).decodes
    plan = decode.DecodeAttention(launch.Kernels(setup))._plan(rows, window, 1, 0)
    keys = plan.cutting.tiling.keys
    ranges = plan.ranges.tolist()
    assert len(ranges) == plan.programs + 1
    assert ranges[0] == 0
    assert ranges == sorted(ranges)
    assert not plan.counters.any()
    fields, places = plan.blocks.tolist(), plan.places.tolist()
    number = 0  # of the block
    for row, length in enumerate(lengths):
        first = number
        position = max(0, length - (window or length))  # the next to be read
        while position < length:
            owner, low, high, _ = fields[number]
            begin = position - low
            assert owner == row
            assert low < high <= keys
            assert begin % plan.span == 0
            spans = torch.arange(begin, begin + high, plan.span, device="cuda")
            assert places[number][: len(spans)] == sequences.places(row, spans).tolist()
            position, number = begin + high, number + 1
        assert position == length
        edges = [block[3] for block in fields[first:number]]
        assert edges == [(n == first) + 2 * (n == number - 1) for n in range(first, number)]
        parts = [p for p in range(plan.programs) if ranges[p] < number and ranges[p + 1] > first]
        assert plan.parts_of[row].tolist() == [parts[0], len(parts)]
    assert ranges[-1] == number
    dealt = [end - begin for begin, end in pairwise(ranges)]
    if plan.cutting.smallest is None:
        assert max(dealt) - min(dealt) <= 1
    else:
        smallest, wanted = plan.cutting.smallest // keys, plan.programs - len(lengths)
        assert max(dealt) <= -(-number // wanted // smallest) * smallest + smallest


def test_a_graph_attends_at_every_length() -> None:
    lengths = [5000, 300, 1, 2000]
    sequences = Sequences(Case(), lengths)
    kernels = sequences.open("triton", torch.bfloat16)
    sequences.fill(kernels.pools[0], torch.nan)
    batch = sequences.batch([Part(s, 0, 1) for s in range(4)], [])
    query = torch.randn(4, 8, 128, device="cuda").bfloat16()
    kv = torch.zeros(4, 1024, device="cuda").bfloat16()

    def attend() -> torch.Tensor:
        output = torch.empty_like(query)
        kernels.attend(0, query, kv, batch, sequences.case.options(), output)
        return output

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend()
    for now in ([1, 1, 1, 1], lengths, [64, 300, 1, 129], [3111, 17, 1, 2000]):
        batch.decodes.lengths.copy_(torch.tensor(now))
        batch.decodes.slots.copy_(sequences.slots)
        graph.replay()
        assert torch.equal(output, attend())
        assert not output.isnan().any()
        only = sequences.rows[2][0, 512:].view(4, 128)  # what one key alone has for value
        assert torch.equal(output[2], only.repeat_interleave(2, 0))


SIZES = tiny_sizes(1024)
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
