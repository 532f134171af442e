"""SGLang's FlashAttention-3 against `sdpa`: what we ask it for, by a stand-in on any machine, and
what its kernels answer, where they run.

On the chip every position that no sequence holds is NaN in the pools, but where a page is copied
whole.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor

from backend.hf.attention import (
    AttentionOptions,
    AttentionSetup,
    KvGeometry,
    PagedAttention,
    sgl_kernel as ours,
)
from backend.hf.attention.choice import lack, open_attention
from backend.hf.attention.sgl_kernel import SPLIT_TOKENS, SglKernelAttention
from backend.hf.batch import DecodeRows, ForwardBatch, PrefillSpan
from tests.backend.hf.kernels.paged_sequences import Case, Part, Sequences

PAGE = 4
GEOMETRY = KvGeometry(layers=3, kv_heads=2, key_width=8, value_width=8)
HEADS = 6
SETUP = AttentionSetup(GEOMETRY, 60, PAGE, torch.float32, "cpu")
SINKS = torch.arange(-2.0, 4.0)  # each a bfloat16
OPTIONS = {
    "plain": AttentionOptions(scale=0.3),
    "window": AttentionOptions(scale=0.3, window=5),
    "softcap": AttentionOptions(scale=0.9, softcap=2.0),
    "sinks": AttentionOptions(scale=0.3, sinks=SINKS),
    "all": AttentionOptions(scale=0.9, window=7, softcap=2.0, sinks=SINKS),
}


class StandIn:
    """The two functions of the package as far as we call them, one query at a time."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.schedules: list[dict[str, Any]] = []

    def get_scheduler_metadata(self, **shapes: Any) -> Tensor:
        self.schedules.append(shapes)
        return torch.tensor([len(self.schedules)], dtype=torch.int32)

    def flash_attn_with_kvcache(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, *, out: Tensor, **rest: Any
    ) -> None:
        self.calls.append(rest)
        assert rest["causal"]
        for name in ("cache_seqlens", "page_table", "cu_seqlens_q"):
            assert rest[name].dtype == torch.int32
        bounds = rest["cu_seqlens_q"].tolist()
        assert bounds[-1] == len(q) == len(out)
        for sequence, length in enumerate(rest["cache_seqlens"].tolist()):
            pages = rest["page_table"][sequence].long()
            keys, values = k_cache[pages].flatten(0, 1), v_cache[pages].flatten(0, 1)
            first, end = bounds[sequence : sequence + 2]
            assert end - first <= rest["max_seqlen_q"]
            for row in range(first, end):
                last = length - (end - row)
                left, right = rest["window_size"]
                start = 0 if left < 0 else max(0, last - left)
                assert right == (-1 if left < 0 else 0)
                seen = slice(start, last + 1)
                out[row] = attended(q[row], keys[seen], values[seen], rest)


def attended(query: Tensor, keys: Tensor, values: Tensor, rest: dict[str, Any]) -> Tensor:
    """query [heads, width] over [positions, kv_heads, width]; [heads, width]."""
    group = len(query) // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("hd,phd->hp", query, keys) * rest["softmax_scale"]
    if rest["softcap"]:
        scores = rest["softcap"] * torch.tanh(scores / rest["softcap"])
    if rest["sinks"] is not None:
        assert rest["sinks"].dtype == torch.bfloat16
        scores = torch.cat([scores, rest["sinks"].float()[:, None]], 1)
    return torch.einsum("hp,phd->hd", scores.softmax(1)[:, : len(values)], values)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(ours, "package_of", lambda *_: "stand_in")
    monkeypatch.setattr(ours, "load_package", lambda _: stand_in)
    return stand_in


class Chunk(NamedTuple):
    start: int
    tokens: int


def step(lengths: list[int], chunks: list[Chunk]) -> ForwardBatch:
    """Decodes at these lengths, then chunks; pages in random order, beyond a sequence any."""
    order = torch.randperm(SETUP.pages).tolist()

    def pages(positions: int) -> Tensor:
        return torch.tensor([order.pop() for _ in range(-(-positions // PAGE))])

    bound = max((-(-length // PAGE) for length in lengths), default=0) + 1
    table = torch.randint(SETUP.pages, (len(lengths) + 2, bound))
    slots = torch.randperm(len(table))[: len(lengths)]
    places = []  # of the queries
    for slot, length in zip(slots.tolist(), lengths, strict=True):
        held = pages(length)
        table[slot, : len(held)] = held
        places.append(held[(length - 1) // PAGE] * PAGE + (length - 1) % PAGE)
    spans, offset = [], len(lengths)
    for start, count in chunks:
        held = pages(start + count)
        at = torch.arange(start, start + count)
        places += list(held[at // PAGE] * PAGE + at % PAGE)
        spans.append(PrefillSpan(offset, count, start, held))
        offset += count
    rows = DecodeRows(len(lengths), slots, torch.tensor(lengths).long(), table, bound)
    nothing = torch.zeros(offset, dtype=torch.int64)
    return ForwardBatch(nothing, nothing, torch.tensor(places), rows, tuple(spans))


def attend(
    attention: PagedAttention, batch: ForwardBatch, layer: int, options: AttentionOptions
) -> Tensor:
    """[tokens, heads, width]: the same queries and pools for every attention."""
    generator = torch.Generator().manual_seed(layer)
    for pool in attention.pools:
        pool.copy_(torch.randn(pool.shape, generator=generator))
    query = torch.randn(len(batch.write_at), HEADS, 8, generator=generator)
    output = torch.full_like(query, torch.nan)
    kv = attention.pools[layer][batch.write_at]
    attention.attend(layer, query, kv, batch, options, output)
    return output


BATCHES = {
    "mixed": ([1, 4, 5, 33, 8], [Chunk(0, 9), Chunk(6, 11), Chunk(20, 1), Chunk(0, 1)]),
    "decodes": ([7, 1, 12], []),
    "chunks": ([], [Chunk(3, 30), Chunk(0, 4)]),
}


@pytest.mark.parametrize("which", BATCHES)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_package_is_asked_for_what_sdpa_computes(
    name: str, which: str, package: StandIn
) -> None:
    torch.manual_seed(1)
    batch = step(*BATCHES[which])
    got = attend(SglKernelAttention(SETUP), batch, 1, OPTIONS[name])
    right = attend(open_attention("sdpa", SETUP), batch, 1, OPTIONS[name])
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    assert len(package.calls) == 1 + (which == "mixed")


def test_decodes_are_scheduled_once_a_step_for_the_shapes_of_the_kernels_call(
    package: StandIn,
) -> None:
    attention = SglKernelAttention(SETUP)
    batch = step([1, 4, 30], [Chunk(0, 5)])
    for layer, name in enumerate(("plain", "window", "sinks")):
        attend(attention, batch, layer, OPTIONS[name])
    decodes, chunks = package.calls[0::2], package.calls[1::2]
    marks = [call["scheduler_metadata"] for call in decodes]
    assert [mark if mark is None else mark.item() for mark in marks] == [1, None, 1]
    assert all(call["scheduler_metadata"] is None for call in chunks)
    (shapes,) = package.schedules
    assert shapes["batch_size"] == 3
    assert shapes["max_seqlen_k"] == decodes[0]["page_table"].shape[1] * PAGE
    assert shapes["page_size"] == PAGE
    assert (shapes["num_heads"], shapes["num_heads_k"], shapes["headdim"]) == (HEADS, 2, 8)
    assert shapes["qkv_dtype"] == torch.float32
    assert not shapes["has_softcap"]
    for name in ("cache_seqlens", "cu_seqlens_q", "num_splits", "max_seqlen_q", "causal"):
        assert shapes[name] is decodes[0][name], name


def test_a_softcap_has_a_schedule_of_its_own(package: StandIn) -> None:
    attention, batch = SglKernelAttention(SETUP), step([9, 2], [])
    for layer, name in enumerate(("plain", "softcap", "plain")):
        attend(attention, batch, layer, OPTIONS[name])
    assert [shapes["has_softcap"] for shapes in package.schedules] == [False, True]
    assert [call["scheduler_metadata"].item() for call in package.calls] == [1, 2, 1]


def test_another_pass_over_a_batch_is_read_again_as_a_graph_must_hold_it(package: StandIn) -> None:
    attention, batch = SglKernelAttention(SETUP), step([9, 2], [])
    for layer in (0, 1, 2, 0, 2):
        attend(attention, batch, layer, OPTIONS["plain"])
    assert [call["scheduler_metadata"].item() for call in package.calls] == [1, 1, 1, 2, 2]
    tables = [call["page_table"] for call in package.calls]
    assert tables[0] is tables[2]
    assert tables[2] is not tables[3]
    attend(attention, step([9, 2], []), 2, OPTIONS["plain"])  # the next step, of later layers
    assert package.calls[-1]["scheduler_metadata"].item() == 3


def test_many_queries_are_not_split(package: StandIn) -> None:
    setup = AttentionSetup(GEOMETRY, 4 * SPLIT_TOKENS, PAGE, torch.float32, "cpu")
    attention = SglKernelAttention(setup)
    for count, splits in ((SPLIT_TOKENS, 0), (SPLIT_TOKENS + 1, 1)):
        span = PrefillSpan(0, count, 0, torch.arange(-(-count // PAGE)))
        none = DecodeRows(0, torch.tensor([]), torch.tensor([]), torch.zeros(1, 1).long(), 0)
        ids = torch.arange(count)
        attend(attention, ForwardBatch(ids, ids, ids, none, (span,)), 0, OPTIONS["plain"])
        assert package.calls[-1]["num_splits"] == splits


MOST_ERROR = {torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of values in +-5
WHOLE_PAGES = 128  # tokens: pages of as many or more are copied whole


def of_width(width: int) -> Case:
    return Case(key_width=width, value_width=width)


CASES = {
    **{f"width {width}": of_width(width) for width in (8, 64, 80, 96, 128, 192, 256)},
    "fp16": Case(torch.float16),
    **{f"group {group}": Case(group=group) for group in (1, 3, 8)},
    "one KV head": Case(kv_heads=1, group=16),
    **{f"pages of {page}": Case(page=page) for page in (1, 48, 64, 256)},
    "window": Case(window=100),
    "softcap": Case(softcap=2.0),
    "sinks": Case(kv_heads=3, group=3, sinks=True),  # nine of them, each a bfloat16
    "window and sinks": Case(kv_heads=3, group=3, window=100, sinks=True),
}
LENGTHS = [1, 2, 16, 17, 255, 257, 3000, 600, 70, 33, 1, 400, 3000]
DECODES = [Part(s, LENGTHS[s] - 1, LENGTHS[s]) for s in range(7)]
# prompts whole, the end of one, one query far behind, the middle of one
CHUNKS = [Part(7, 0, 600), Part(8, 0, 70), Part(9, 20, 33), Part(12, 2999, 3000), Part(6, 5, 900)]
STEPS: dict[str, tuple[list[Part], list[Part]]] = {
    "decodes": (DECODES, []),
    "one decode": (DECODES[6:], []),
    "few queries": ([], CHUNKS[1:4]),  # whose keys may be split
    "many queries": ([], CHUNKS),
    "mixed": (DECODES, CHUNKS),
}


def opened(case: Case, sequences: Sequences) -> PagedAttention:
    """Over filled pools. Skips, with the reason, where it cannot run."""
    missing = lack("sgl_kernel", "cuda", case.dtype, case.geometry)
    if missing is not None:
        pytest.skip(missing)
    attention = sequences.open("sgl_kernel", case.dtype)
    sequences.fill(attention.pools[0], 0.0 if case.page >= WHOLE_PAGES else torch.nan)
    return attention


def right(sequences: Sequences, decodes: list[Part], chunks: list[Part]) -> Tensor:
    reference = sequences.open("sdpa", torch.float32)
    sequences.fill(reference.pools[0], 0.0)
    return sequences.attend(reference, decodes, chunks)


def check(got: Tensor, wanted: Tensor, case: Case, where: str) -> None:
    """Says which rows are wrong: a row is a token of the step, in the order of its parts."""
    assert got.dtype == case.dtype
    assert got.shape == wanted.shape
    errors = (got.float() - wanted).abs().amax((1, 2))
    wrong = (~(errors < MOST_ERROR[case.dtype])).nonzero().flatten().tolist()
    worst = errors.nan_to_num(torch.inf).max().item()
    assert not wrong, f"{len(wrong)} of {len(errors)} rows, worst {worst:.3g}: {wrong[:8]} {where}"


@pytest.mark.gpu
@pytest.mark.parametrize("which", STEPS)
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_attend_as_sdpa_does(name: str, which: str) -> None:
    case, (decodes, chunks) = CASES[name], STEPS[which]
    sequences = Sequences(case, LENGTHS)
    got = sequences.attend(opened(case, sequences), decodes, chunks)
    check(got, right(sequences, decodes, chunks), case, f"of {decodes + chunks}")


@pytest.mark.gpu
@pytest.mark.parametrize("count", [201, SPLIT_TOKENS + 1, 1200])
def test_many_rows_attend_as_sdpa_does(count: int) -> None:
    rng = random.Random(count)
    lengths = [1, *(rng.randint(1, 300) for _ in range(count - 2)), 3000]
    case = Case()
    sequences = Sequences(case, lengths)
    decodes = [Part(s, length - 1, length) for s, length in enumerate(lengths)]
    got = sequences.attend(opened(case, sequences), decodes, [])
    check(got, right(sequences, decodes, []), case, "by sequence")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["width 128", "width 64", "one KV head", "window", "sinks"])
def test_a_graph_attends_at_every_length(name: str) -> None:
    """Two layers' worth of it, so that the second reads what the first has left of the schedule."""
    case = CASES[name]
    lengths = [5000, 300, 1, 2000]
    sequences = Sequences(case, lengths)
    kernels = opened(case, sequences)
    reference = sequences.open("sdpa", torch.float32)
    sequences.fill(reference.pools[0], 0.0)
    batch = sequences.batch([Part(s, 0, 1) for s in range(4)], [])
    query = sequences.random(4, case.heads, case.key_width)
    kv = torch.zeros(4, case.geometry.row, device="cuda", dtype=case.dtype)
    cast(SglKernelAttention, kernels).pools *= 2

    def attend() -> list[Tensor]:
        outputs = [torch.full_like(query, torch.nan) for _ in range(2)]
        for layer, output in enumerate(outputs):
            kernels.attend(layer, query, kv, batch, case.options(), output)
        return outputs

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = attend()
    for now in ([1, 1, 1, 1], lengths, [64, 300, 1, 129], [3111, 17, 1, 2000], [5000, 1, 1, 1]):
        batch.decodes.lengths.copy_(torch.tensor(now))
        for _ in range(2):  # a graph leaves everything as it has to find it
            graph.replay()
            wanted = torch.empty_like(query, dtype=torch.float32)
            plain = sequences.batch([Part(s, n - 1, n) for s, n in enumerate(now)], [])
            keys = reference.pools[0][plain.write_at]
            reference.attend(0, query.float(), keys, plain, case.options(), wanted)
            for output in outputs:
                check(output, wanted, case, f"at lengths {now}")


@pytest.mark.gpu
def test_a_sequence_of_nan_leaves_its_neighbours_alone() -> None:
    sequences = Sequences(Case(), [100, 33, 300])
    sequences.rows[1].fill_(torch.nan)
    kernels = opened(sequences.case, sequences)
    parts = [Part(0, 0, 100), Part(1, 0, 33), Part(2, 0, 300)]
    got = sequences.attend(kernels, [], parts)
    assert not got[:100].isnan().any()
    assert got[100:133].isnan().all()
    assert not got[133:].isnan().any()
