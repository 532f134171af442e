"""What a model takes of a device, by arithmetic alone, and how many tokens of KV the rest holds.

`memory.py` divides what it has measured at the start, `engine/plan.py` what the formulas here
expect of a device that may not be there: by the same `count_tokens`. Pure: no torch, no device.
All sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from backend.interface import StartFailed
from config import BackendSettings, BatchSettings

if TYPE_CHECKING:
    from backend.hf.models.decoder import DecoderShape

MIB = 1 << 20
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CPU_SHARE = 0.25  # of a machine's memory that the pages may fill: other programs live there too
LEAST_TOKENS = 1024  # of KV on a CUDA device, unless the context is shorter: less serves nobody
SCORED_ROWS = 256  # of a prompt at once: the executor's HEAD_ROWS
# Tokens of the prompt graphs: the ladder of `prompt_graphs.py`
PROMPT_SIZES = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 2560, 3072, 3584, 4096)
GRAPHLESS = ("sdpa", "flashinfer")  # attention whose decodes no CUDA graph may hold
MOST_PAGES = 1 << 21  # counted on a CUDA device: the cache's books take some 100 bytes for each

# What only a start can measure. The sum of the first two was read on an H200 with torch 2.11 and
# CUDA 13: 1,933 MiB taken before the pages, less weights and rotations of 1,137 and 20. How they
# share it was not read, nor was `GRAPHS`.
DRIVER = 520 * MIB  # the CUDA context of a process
LIBRARIES = 256 * MIB  # kernels and libraries that the first steps load, and their workspaces
GRAPHS = 256 * MIB  # the graphs themselves, and the workspaces of their stream


@dataclass(frozen=True, slots=True)
class Peak:
    """What steps take beside weights and pages."""

    held: int  # between steps: page tables, the slots' sampling state
    prefill: int  # more while the largest step of prompts runs
    decode: int  # more while every row decodes
    graphs: int  # CUDA graphs: see `graph_reserve`

    @property
    def step(self) -> int:
        """At the worst moment of the largest step."""
        return self.held + max(self.prefill, self.decode)


@dataclass(frozen=True, slots=True)
class CudaMemory:
    """A CUDA device once the weights are loaded."""

    total: int
    taken: int  # by weights, the driver and other processes
    peak: Peak

    def free(self, fraction: float) -> int:
        """What is left for pages of a fraction of the device. Below 0: nothing, and not enough."""
        return int(self.total * fraction) - self.taken - self.peak.step - self.peak.graphs


@dataclass(frozen=True, slots=True)
class Room:
    """What pages may take, and the words for who gets none."""

    whole: int  # when PAGE_TOKEN_BUDGET says how many there are
    measured: int  # when nothing says it
    least: int  # tokens; fewer are refused
    most: int  # tokens; more are not made
    account: str  # how `measured` came about
    advice: str


def cpu_room(settings: BackendSettings, limits: BatchSettings, context: int, free: int) -> Room:
    """MEMORY_FRACTION of a share of what is free now, the weights being loaded, but no more than
    every row of a batch can fill.
    """
    fraction = settings.device.memory_fraction
    return Room(
        whole=free,
        measured=int(free * CPU_SHARE * fraction),
        least=settings.cache.page_tokens,
        most=limits.max_running * context,
        account=f"MEMORY_FRACTION={fraction:g} of a quarter of {mib(free)}",
        advice="free some, or lower PAGE_SIZE_TOKENS",
    )


def cuda_room(
    settings: BackendSettings, limits: BatchSettings, context: int, memory: CudaMemory
) -> Room:
    """What MEMORY_FRACTION of the device leaves beside weights, the largest step and graphs."""
    fraction = settings.device.memory_fraction
    page = settings.cache.page_tokens
    return Room(
        whole=memory.free(1.0),
        measured=memory.free(fraction),
        least=max(page, min(context, LEAST_TOKENS)),
        most=MOST_PAGES * page,
        account=(
            f"MEMORY_FRACTION={fraction:g} of {mib(memory.total)} less {mib(memory.taken)} taken "
            f"by weights and others, {mib(memory.peak.step)} for the largest step and "
            f"{mib(memory.peak.graphs)} for CUDA graphs"
        ),
        advice=_advice(memory, fraction, limits),
    )


def _advice(memory: CudaMemory, fraction: float, limits: BatchSettings) -> str:
    """Which flags give something, the one that gives the most first."""
    if memory.taken >= memory.total * fraction:
        return "raise MEMORY_FRACTION, free the device, or take a smaller model"
    peak = memory.peak
    flags = [f"MAX_RUNNING={limits.max_running}", f"MAX_STEP_TOKENS={limits.max_step_tokens}"]
    if peak.prefill > peak.held + peak.decode + peak.graphs:
        flags.reverse()
    return f"lower {' and '.join(flags)}, or raise MEMORY_FRACTION"


def count_tokens(settings: BackendSettings, kv_bytes: int, room: Room) -> int:
    """Tokens of KV to make room for, when each takes `kv_bytes` in all layers: PAGE_TOKEN_BUDGET
    where given, else as many as there is room for.

    Raises StartFailed when that is more than there is, or too little to serve.
    """
    cache = settings.cache
    if cache.budget_tokens:
        budget = max(cache.budget_tokens, cache.page_tokens)
        if budget * kv_bytes > room.whole:
            fits = max(0, room.whole) // kv_bytes // cache.page_tokens * cache.page_tokens
            remedy = f"lower it to {fits} or less" if fits else room.advice
            raise StartFailed(
                f"PAGE_TOKEN_BUDGET={cache.budget_tokens} takes {mib(budget * kv_bytes)}, "
                f"{mib(room.whole)} are available: {remedy}"
            )
        return budget
    tokens = min(room.measured // kv_bytes, room.most)
    if tokens < room.least:
        what = f"page of {cache.page_tokens}"
        if room.least > cache.page_tokens:
            what = f"sequence of {room.least:,}"
        raise StartFailed(
            f"{mib(room.measured)} of memory hold no {what} tokens, {mib(room.least * kv_bytes)} "
            f"({room.account}): {room.advice}"
        )
    return tokens


def mib(size: int) -> str:
    """A size for a reader."""
    return f"{max(0, size) / MIB:,.0f} MiB"


@dataclass(frozen=True, slots=True)
class Formats:
    """Names of dtypes, as `ITEM_BYTES` has them."""

    weights: str
    compute: str  # of activations and KV
    table: str  # of the embedding table, which is kept as the checkpoint has it
    packed: bool  # products copy their weights (on a CPU), a tied head's too


def product_elements(shape: DecoderShape) -> int:
    """Elements of the weights that every token is multiplied by, the head's included."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = shape.hidden * (2 * queries + 2 * keys + 3 * shape.intermediate)
    return shape.layers * layer + shape.vocabulary * shape.hidden


def parameters(shape: DecoderShape) -> int:
    """Elements of all matrices; a tied head counts once."""
    return product_elements(shape) + (not shape.tied) * shape.vocabulary * shape.hidden


def _vector_elements(shape: DecoderShape) -> int:
    """Elements of norms and biases."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = (
        2 * shape.hidden
        + shape.qk_norm * (queries + keys)
        + shape.qkv_bias * (queries + 2 * keys)
        + shape.output_bias * shape.hidden
        + shape.mlp_bias * (2 * shape.intermediate + shape.hidden)
    )
    return shape.layers * layer + shape.hidden


def weight_memory(shape: DecoderShape, formats: Formats) -> dict[str, int]:
    """What the weights take once they are loaded, by dtype."""
    table = shape.vocabulary * shape.hidden
    kept = "float32" if formats.weights == "float32" else formats.table
    shared = shape.tied and kept == formats.compute and not formats.packed
    parts = (
        (formats.weights, product_elements(shape) - shared * table),
        (formats.compute, _vector_elements(shape)),
        (kept, table),
    )
    taken: dict[str, int] = {}
    for dtype, elements in parts:
        taken[dtype] = taken.get(dtype, 0) + elements * ITEM_BYTES[dtype]
    return taken


def rotation_table(shape: DecoderShape, context: int) -> int:
    """Of all positions, float32: made on a CUDA device when the weights are."""
    return 4 * context * shape.head_dim


def kv_token_bytes(shape: DecoderShape, dtype: str) -> int:
    """Keys and values of one token in all layers."""
    return shape.layers * shape.kv_heads * 2 * shape.head_dim * ITEM_BYTES[dtype]


def expect_peak(
    shape: DecoderShape, settings: BackendSettings, limits: BatchSettings, context: int, dtype: str
) -> Peak:
    """The peak on a CUDA device whose attention reads pages in place, as all but sdpa do."""
    rows = limits.max_running
    tokens = min(limits.max_step_tokens, rows * context)
    slots = rows + 1
    pages = -(-context // settings.cache.page_tokens)
    seen = min(context, tokens, shape.vocabulary)  # ids that penalties have met in one slot
    held = slots * (8 * pages + 4 * shape.vocabulary + 16 * seen)
    logits = 4 * shape.vocabulary  # of a row, float32
    # beside them an edited copy, and what `PenaltyTables.apply` makes of each id
    demanding = 2 * logits + 29 * seen
    drawing = min(rows, tokens)
    scored = min(SCORED_ROWS, tokens) * 2 * logits  # of one slice while the next is made
    prefill = max(
        _layer_peak(shape, tokens, dtype),
        _between_peak(shape, tokens, dtype) + max(drawing * demanding, scored),
    )
    layer, between = _layer_peak(shape, rows, dtype), _between_peak(shape, rows, dtype)
    decode = max(layer, between + rows * demanding)
    plain = max(layer, between + rows * logits)
    graphs = 0
    if settings.device.cuda_graph and settings.device.attention not in GRAPHLESS:
        graphs = graph_reserve(shape, limits.max_step_tokens, dtype, plain)
    return Peak(held, prefill, decode, graphs)


def graph_reserve(shape: DecoderShape, step_tokens: int, dtype: str, plain: int) -> int:
    """What the CUDA graphs of an executor come to take, when a decode of all rows that asks for
    nothing but tokens takes `plain`: its tensors once more, those of the prompt graphs, `GRAPHS`.

    Sizes are captured in any order, and at worst in ascending order: then none finds room for its
    gates in what smaller ones let go of, where all else finds it, also the two hidden states that
    each size keeps.
    """
    largest = min(step_tokens, PROMPT_SIZES[-1])
    sizes = [*(size for size in PROMPT_SIZES if size < largest), largest]
    width = 2 * max(shape.intermediate, shape.hidden)
    inputs = 3 * 8  # ids, positions, places
    item = ITEM_BYTES[dtype]
    prompts = sizes[-1] * (inputs + item * _room_width(shape)) + sum(sizes) * item * width
    return plain + prompts + GRAPHS


def _between_peak(shape: DecoderShape, tokens: int, dtype: str) -> int:
    """What lives between layers, and while a step draws."""
    indices = 6 * 8  # ids, owners, positions, places in the pool, and what they were made of
    return tokens * (indices + ITEM_BYTES[dtype] * shape.hidden)


def _layer_peak(shape: DecoderShape, tokens: int, dtype: str) -> int:
    # beside the residual and the room, in the largest piece: the gates with their normed input,
    # then with their product
    feed_forward = 2 * shape.intermediate + max(shape.hidden, shape.intermediate)
    width = _room_width(shape) + feed_forward
    return _between_peak(shape, tokens, dtype) + tokens * width * ITEM_BYTES[dtype]


def _room_width(shape: DecoderShape) -> int:
    """Elements a token of the decoder's `Room`."""
    return 2 * (shape.heads + shape.kv_heads) * shape.head_dim
