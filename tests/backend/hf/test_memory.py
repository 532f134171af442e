"""What the pages get: peaks on a scripted allocator, and who is refused with which words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import psutil
import pytest
import torch

from backend.cache import PrefixCache
from backend.hf.attention import AttentionSetup
from backend.hf.attention.sdpa import SdpaAttention
from backend.hf.executor import HfExecutor
from backend.hf.forecast import MOST_PAGES, Peak, graph_reserve
from backend.hf.loading.dummy import DummyWeights
from backend.hf.memory import largest_decode, largest_prefill, measure_peak, page_budget
from backend.hf.models.decoder import Decoder, DecoderShape, Placing
from backend.hf.models.torch_blocks import TorchBlocks
from backend.hf.precision import Precision
from backend.interface import BackendSpec, StartFailed, StepPlan, StepTokens, TokenMask
from config import BackendSettings, BatchSettings, CacheSettings, DeviceSettings

MIB = 1 << 20
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 97, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
SHAPE = DecoderShape(
    layers=2, hidden=32, intermediate=48, heads=4, kv_heads=2, head_dim=8, vocabulary=97,
    epsilon=1e-6, tied=True, qk_norm=True,
)  # fmt: skip
SPEC = BackendSpec(
    name="hf",
    model="tiny",
    folder=None,
    vocabulary=97,
    max_model_len=128,
    stop_ids=(),
    page_tokens=16,
    pages=8,
    max_running=4,
    max_step_tokens=60,
    depth=1,
    device="cpu",
    dtype="float32",
    attention="sdpa",
)


@dataclass
class Memory:
    """An allocator whose readings are moved by hand."""

    now: int = 1000  # weights
    high: int = 0

    def restart(self) -> None:
        self.high = self.now

    def allocated(self) -> int:
        return self.now

    def highest(self) -> int:
        return self.high

    def take(self, size: int) -> None:
        self.now += size
        self.high = max(self.high, self.now)


@dataclass
class Executor:
    """Takes 50 when opened; its first step makes tables of 20 and a workspace of 7, which outlives
    it. A step takes 10 a token and 1 a log-probability while it runs.
    """

    memory: Memory
    spec: BackendSpec = SPEC
    cache: PrefixCache = field(default_factory=lambda: PrefixCache(1, 16, False))
    steps: list[StepPlan] = field(default_factory=list)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.memory.take(50)

    def launch(self, plan: StepPlan) -> StepPlan:
        if self.error is not None:
            raise self.error
        if not self.steps:
            self.memory.take(20 + 7)
        self.steps.append(plan)
        step = 10 * plan.tokens + sum(chunk.logprobs for chunk in plan.chunks)
        self.memory.take(step)
        self.memory.take(-step)
        return plan

    def sample(self, handle: StepPlan, masks: Mapping[int, TokenMask]) -> None:
        raise AssertionError("no step here is masked")

    def collect(self, handle: StepPlan) -> StepTokens:
        return StepTokens([()] * len(handle.chunks))

    def prepare(self) -> bool:
        return False

    def close(self) -> None:
        self.memory.take(-50 - 20)


def test_a_peak_is_what_steps_take_over_what_they_leave() -> None:
    memory = Memory()
    peak = measure_peak(lambda: Executor(memory), graphed=SHAPE, allocator=memory)
    prefill, decode, plain = 10 * 60 + 4, 10 * 4 + 4, 10 * 4
    graphs = graph_reserve(SHAPE, 60, "float32", plain)
    assert peak == Peak(held=50 + 20, prefill=prefill, decode=decode, graphs=graphs)
    assert memory.now == 1000 + 7
    assert peak.step == 70 + prefill


def test_without_graphs_nothing_is_kept_for_them() -> None:
    memory = Memory()
    assert measure_peak(lambda: Executor(memory), graphed=None, allocator=memory).graphs == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_steps_that_do_not_fit_end_the_start_with_one_line_and_two_flags(error: Exception) -> None:
    memory = Memory(now=3000 * MIB)
    with pytest.raises(StartFailed) as refused:
        measure_peak(lambda: Executor(memory, error=error), graphed=SHAPE, allocator=memory)
    assert str(refused.value) == (
        "a step of 60 tokens and 4 rows does not fit beside the weights, 3,000 MiB: "
        "lower MAX_STEP_TOKENS or MAX_RUNNING"
    )


def test_any_other_error_of_a_step_is_not_called_want_of_memory() -> None:
    memory, error = Memory(), RuntimeError("a shape does not match")
    with pytest.raises(RuntimeError, match="a shape does not match"):
        measure_peak(lambda: Executor(memory, error=error), graphed=SHAPE, allocator=memory)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("step_tokens", [1, 2, 50, 128, 1000])
def test_the_largest_prompts_fill_the_step_with_as_many_rows_as_there_are(
    rows: int, step_tokens: int
) -> None:
    spec = replace(SPEC, max_running=rows, max_step_tokens=step_tokens)
    plan = largest_prefill(spec)
    assert plan.tokens == min(step_tokens, rows * spec.max_model_len)
    assert len(plan.chunks) == len(plan.taken) == min(rows, step_tokens)
    for chunk in plan.chunks:
        assert 0 < chunk.count == len(chunk.tokens or ())
        assert chunk.start + chunk.count <= spec.max_model_len
        assert len(chunk.pages) == spec.pages_for(chunk.start + chunk.count)
    assert plan.chunks[0].start + plan.chunks[0].count == spec.max_model_len


def test_the_largest_decode_has_every_row_and_one_at_the_end_of_the_context() -> None:
    plan = largest_decode(SPEC)
    assert [chunk.slot for chunk in plan.chunks] == [setup.slot for setup in plan.taken]
    assert max(chunk.start for chunk in plan.chunks) == SPEC.max_model_len - 1
    assert plan.tokens == SPEC.max_running
    assert all(chunk.tokens is None for chunk in plan.chunks)


def test_the_executor_runs_the_largest_steps_on_a_single_page() -> None:
    precision = Precision(torch.float32, torch.float32)
    with DummyWeights(CONFIG) as weights:
        placing = Placing("cpu", precision, SPEC.max_model_len)
        model = Decoder(SHAPE, CONFIG, weights, TorchBlocks(precision, "cpu"), placing)
    setup = AttentionSetup(model.geometry, 1, SPEC.page_tokens, torch.float32, "cpu")

    def open_executor() -> HfExecutor:
        return HfExecutor(SPEC, PrefixCache(1, 16, False), model, SdpaAttention(setup))

    assert measure_peak(open_executor, graphed=None, allocator=Memory()) == Peak(0, 0, 0, 0)


def settings(budget: int = 0, fraction: float = 0.9) -> BackendSettings:
    return BackendSettings(
        device=DeviceSettings(memory_fraction=fraction),
        cache=CacheSettings(page_tokens=16, budget_tokens=budget),
        batch=BatchSettings(max_running=4, max_step_tokens=60),
    )


def test_on_a_cpu_pages_take_a_quarter_and_no_more_than_rows_can_fill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = psutil.virtual_memory()._replace(available=4000 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there)
    assert page_budget(settings(), MIB, context=4096, device="cpu") == 900
    assert page_budget(settings(), MIB, context=128, device="cpu") == 4 * 128
    assert page_budget(settings(budget=3000), MIB, context=128, device="cpu") == 3000
    with pytest.raises(StartFailed, match="900 MiB of memory hold no page of 16 tokens"):
        page_budget(settings(), 100 * MIB, context=128, device="cpu")
    too_many = "PAGE_TOKEN_BUDGET=5000 takes 5,000 MiB, 4,000 MiB are available: lower it to 4000"
    with pytest.raises(StartFailed, match=too_many):
        page_budget(settings(budget=5000), MIB, context=128, device="cpu")


PEAK = Peak(held=100 * MIB, prefill=500 * MIB, decode=200 * MIB, graphs=300 * MIB)


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 10,000 MiB, with 7,000 free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7000 * MIB, 10_000 * MIB))


@pytest.mark.usefixtures("_gpu")
def test_on_a_gpu_pages_take_what_a_fraction_of_it_leaves() -> None:
    left = 9000 - 3000 - 600 - 300
    assert page_budget(settings(), MIB, 4096, "cuda", PEAK) == left
    assert page_budget(settings(fraction=1.0), MIB, 4096, "cuda", PEAK) == left + 1000
    assert page_budget(settings(), 1, 4096, "cuda", PEAK) == MOST_PAGES * 16


@pytest.mark.usefixtures("_gpu")
def test_on_a_gpu_a_budget_may_take_what_is_there_and_no_more() -> None:
    assert page_budget(settings(budget=6100), MIB, 4096, "cuda", PEAK) == 6100
    message = "PAGE_TOKEN_BUDGET=6101 takes 6,101 MiB, 6,100 MiB are available: lower it to 6096"
    with pytest.raises(StartFailed, match=message):
        page_budget(settings(budget=6101), MIB, 4096, "cuda", PEAK)


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(
    ("peak", "fraction", "flag"),
    [
        (
            replace(PEAK, prefill=5000 * MIB),
            0.9,
            "lower MAX_STEP_TOKENS=60 and MAX_RUNNING=4, or raise",
        ),
        (
            replace(PEAK, graphs=5000 * MIB),
            0.9,
            "lower MAX_RUNNING=4 and MAX_STEP_TOKENS=60, or raise",
        ),
        (PEAK, 0.3, "raise MEMORY_FRACTION, free the device, or take a smaller model"),
    ],
)
def test_on_a_gpu_too_little_for_one_sequence_names_all_parts_and_the_flag_that_gives_most(
    peak: Peak, fraction: float, flag: str
) -> None:
    with pytest.raises(StartFailed) as refused:
        page_budget(settings(fraction=fraction), MIB, 4096, "cuda", peak)
    line = str(refused.value)
    assert "\n" not in line
    assert "hold no sequence of 1,024 tokens, 1,024 MiB" in line
    assert f"MEMORY_FRACTION={fraction:g} of 10,000 MiB less 3,000 MiB taken" in line
    assert flag in line


@pytest.mark.usefixtures("_gpu")
def test_on_a_gpu_a_short_context_needs_no_more_than_itself() -> None:
    peak = replace(PEAK, graphs=5200 * MIB)
    assert page_budget(settings(), MIB, context=128, device="cuda", peak=peak) == 200
