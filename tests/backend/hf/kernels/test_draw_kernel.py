"""The Triton draw against float64: its distribution, its noise, what its filters keep.

The oracle makes the same noise in Python's integers and takes the maximum over all that the plain
definition of the filters keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backend.hf.sampling import Sampler, Scorer, SlotStates, open_sampler
from backend.interface import SamplingParams, SlotSetup

pytestmark = pytest.mark.gpu

ODD, LARGE = 333, 151_936  # rows that start anywhere, and those of whole vectors
DRAWS = 100_000

FIELDS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.7),
    "hot": SamplingParams(temperature=100.0),
    "cold": SamplingParams(temperature=1e-3),
    "usual": SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
    "top_k": SamplingParams(temperature=1.5, top_k=7),
    "top_k 1": SamplingParams(temperature=1.0, top_k=1),
    "top_k of many": SamplingParams(temperature=2.0, top_k=300),
    "top_k of more than are collected": SamplingParams(temperature=3.0, top_k=2000, top_p=0.8),
    "top_p": SamplingParams(temperature=0.8, top_p=0.6),
    "top_p of a flat row": SamplingParams(temperature=5.0, top_p=0.95),
    "top_p near 0": SamplingParams(temperature=1.0, top_p=1e-12),
    "min_p": SamplingParams(temperature=1.0, min_p=0.1),
    "min_p 1": SamplingParams(temperature=1.0, min_p=1.0),
    "filters": SamplingParams(temperature=0.9, top_k=20, top_p=0.7, min_p=0.05),
    "flat filters": SamplingParams(temperature=3.0, top_k=90, top_p=0.9, min_p=0.01),
}


# The oracle.


def words(seed: int, position: int) -> tuple[int, int]:
    """Output number `position` of SplitMix64 as published, in halves."""
    mixed = (seed + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    mixed ^= mixed >> 31
    return mixed % 2**32, mixed >> 32


def noise(seed: int, position: int, vocabulary: int) -> Tensor:
    """What is added to each scaled logit, [vocabulary] float64."""
    low, high = words(seed, position)

    def times(word: Tensor, factor: int) -> Tensor:  # in halves: int64 would overflow
        upper = ((word >> 16) * factor) & 0xFFFF
        return ((upper << 16) + (word & 0xFFFF) * factor) & 0xFFFFFFFF

    word = torch.arange(vocabulary, device="cuda") ^ low
    word = (times(word ^ (word >> 17), 0xED5AD4BB) + high) & 0xFFFFFFFF
    word = times(word ^ (word >> 11), 0xAC4C1B51)
    word = times(word ^ (word >> 15), 0x31848BAB)
    word = word ^ (word >> 14)
    return -(-torch.log1p(-(word.double() + 0.5) / 2**32)).log()


def chances(row: Tensor, sampling: SamplingParams, margin: float = 0.0) -> Tensor:
    """Probabilities [vocabulary] float64 after temperature and filters, 0 where a token is not
    kept. top_p grows by `margin`.
    """
    values = row.double().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if not sampling.temperature:
        return torch.nn.functional.one_hot(values.argmax(), len(row)).double()
    weights = ((values - values.max()) / sampling.temperature).exp()
    kept = weights >= sampling.min_p
    if 0 < sampling.top_k < len(row):
        last = values.topk(sampling.top_k).values[-1]
        weights = weights.where(values >= last, 0.0)
    if sampling.top_p < 1:
        order, place = values.unique(return_inverse=True)  # ascending; ties are one
        mass = torch.zeros_like(order).index_add_(0, place, weights)
        above = mass.flip(0).cumsum(0).flip(0) - mass
        need = sampling.top_p * (1 + margin) * mass.sum()
        weights = weights.where((above[place] < need) | (values == order[-1]), 0.0)
    weights = weights.where(kept, 0.0)
    return weights / weights.sum()


def assert_drawn_right(token: int, row: Tensor, setup: SlotSetup, position: int) -> None:
    sampling = setup.sampling
    if not sampling.temperature:
        assert token == chances(row, sampling).argmax()
        return
    scores = row.double().nan_to_num(nan=-math.inf, neginf=-math.inf) / sampling.temperature
    rounding = 2e-6 * scores[token].abs() + 2e-5
    scores = scores + noise(setup.seed, position, len(row))
    assert chances(row, sampling, 1e-5)[token] > 0, "a filtered token was drawn"
    surely_kept = chances(row, sampling, -1e-5) > 0
    assert scores[token] >= scores[surely_kept].max() - rounding


# Material.


def opened(samplings: Sequence[SamplingParams], vocabulary: int) -> tuple[SlotStates, Sampler]:
    states, sampler = open_sampler(len(samplings), vocabulary, "cuda", kernels=True)
    states.take([setup_of(slot, sampling) for slot, sampling in enumerate(samplings)])
    return states, sampler


def setup_of(slot: int, sampling: SamplingParams) -> SlotSetup:
    return SlotSetup(slot, sampling, 2**62 + 1000 * slot, (), 0)


def random_rows(rows: int, vocabulary: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=generator, device="cuda") * spread


def with_ties(rows: int, vocabulary: int) -> Tensor:
    logits = random_rows(rows, vocabulary).round()
    return torch.where(random_rows(rows, vocabulary, 1) < 0, -logits, logits)  # some 0 are -0


def with_gaps(rows: int, vocabulary: int) -> Tensor:
    logits = random_rows(rows, vocabulary)
    logits = logits.masked_fill(logits < 0.5, -math.inf)
    logits[:, 3] = math.nan
    return logits


def with_huge_values(rows: int, vocabulary: int) -> Tensor:
    logits = random_rows(rows, vocabulary)
    return torch.where(logits < -2, -3e38, torch.where(logits > 5, 1e6, logits))


def on_device(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cuda")


def draws(row: Tensor, sampling: SamplingParams, count: int) -> Tensor:
    """Tokens [count] of one row at the positions 0 .. count - 1."""
    _, sampler = opened([sampling], len(row))
    batch = 1000
    slots = torch.zeros(batch, dtype=torch.int64, device="cuda")
    logits = row.expand(batch, -1)
    positions = torch.arange(count, device="cuda").split(batch)
    return torch.cat([sampler.draw(logits, slots, at, [0] * batch) for at in positions])


# One draw.


@pytest.mark.parametrize("vocabulary", [ODD, 20_011])
@pytest.mark.parametrize("rows_of", [random_rows, with_ties, with_gaps, with_huge_values])
def test_every_field_draws_the_highest_score_of_those_kept(rows_of: type, vocabulary: int) -> None:
    _, sampler = opened(list(FIELDS.values()) * 3, vocabulary)
    slots = torch.randperm(len(FIELDS) * 3, generator=torch.Generator().manual_seed(5)).tolist()
    logits: Tensor = rows_of(len(slots), vocabulary)
    before = logits.clone()
    positions = [slot * 37 for slot in slots]
    tokens = sampler.draw(logits, on_device(slots), on_device(positions), slots)
    assert torch.equal(logits.view(torch.int32), before.view(torch.int32))
    for token, row, slot in zip(tokens.tolist(), logits, slots, strict=True):
        sampling = list(FIELDS.values())[slot % len(FIELDS)]
        assert_drawn_right(token, row, setup_of(slot, sampling), slot * 37)


def test_greedy_rows_take_the_lowest_id_of_a_tie() -> None:
    for vocabulary in (ODD, LARGE):
        logits = random_rows(6, vocabulary).clamp(max=4.0)
        logits[:, 0] = -1.0
        logits[0] = 0.0
        logits[0, 0] = -0.0
        _, sampler = opened([SamplingParams()] * 6, vocabulary)
        tokens = sampler.draw(logits, torch.arange(6, device="cuda"), on_device([9] * 6), range(6))
        first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
        assert torch.equal(tokens, first)
        assert (first[1:] < vocabulary - 1).all()


@pytest.mark.parametrize("top_p", [1.0, 0.999])
def test_a_row_of_ties_keeps_them_all(top_p: float) -> None:
    row = torch.full((2500,), 3.5, device="cuda")  # more than are collected
    tokens = draws(row, SamplingParams(temperature=1.0, top_k=2, top_p=top_p), 20_000)
    assert len(tokens.unique()) > 2400


@pytest.mark.parametrize("vocabulary", [ODD, 20_011])
def test_a_broken_row_yields_an_id_and_leaves_its_neighbours_alone(vocabulary: int) -> None:
    count = len(FIELDS)
    _, sampler = opened(list(FIELDS.values()), vocabulary)
    positions, slots = on_device([4] * 2 * count), [*range(count)] * 2
    logits = random_rows(2 * count, vocabulary)
    whole = sampler.draw(logits, on_device(slots), positions, slots)
    for broken, expected in ((math.nan, 0), (-math.inf, 0), (math.inf, 0), (None, 31)):
        if broken is None:
            logits[:count] = 1.0
            logits[:count, [31, 200]] = math.inf
        else:
            logits[:count] = broken
        tokens = sampler.draw(logits, on_device(slots), positions, slots)
        assert tokens[:count].tolist() == [expected] * count
        assert torch.equal(tokens[count:], whole[count:])


# The distribution.


def assert_distributed(tokens: Tensor, expected: Tensor) -> None:
    """That `tokens` are fair draws of chances `expected`: refused once in 10 million fair tries."""
    observed = tokens.bincount(minlength=len(expected)).double()
    assert observed[expected == 0].sum() == 0, "a filtered token was drawn"
    order = expected.argsort(descending=True)[: int((expected > 0).sum())]
    observed, expected = observed[order], expected[order] * len(tokens)
    # ids with too few draws for the test are counted together, 20 expected a bin or more
    bins = (expected.cumsum(0) / 20).long().clamp_(max=len(tokens) // 20 - 1)
    bins = bins.unique(return_inverse=True)[1]
    observed = torch.zeros_like(expected).index_add_(0, bins, observed)[: bins.max() + 1]
    expected = torch.zeros_like(expected).index_add_(0, bins, expected)[: bins.max() + 1]
    free = len(expected) - 1
    if not free:
        return
    square = float(((observed - expected) ** 2 / expected).sum())
    spread = 2 / (9 * free)  # Wilson and Hilferty 1931: the cube root is normal
    assert ((square / free) ** (1 / 3) - (1 - spread)) / spread**0.5 < 5.2


@pytest.mark.parametrize("vocabulary", [ODD, LARGE])
@pytest.mark.parametrize(
    "field",
    ["temperature", "usual", "top_k of many", "top_p", "top_p of a flat row", "min_p", "filters"],
)
def test_draws_have_the_distribution(field: str, vocabulary: int) -> None:
    sampling = FIELDS[field]
    row = random_rows(1, vocabulary, seed=7)[0]
    if field != "temperature" or vocabulary == ODD:
        row = (row * 4).round() / 4  # ties
    count = DRAWS if sampling.top_k != 300 or vocabulary == ODD else DRAWS // 5
    assert_distributed(draws(row, sampling, count), chances(row, sampling))


def test_draws_have_no_memory_of_the_position_before() -> None:
    row = torch.tensor([0.02, 0.3, 0.0, 0.08, 0.25, 0.05, 0.1, 0.2], device="cuda").log()
    tokens = draws(row, SamplingParams(temperature=1.0), 4 * DRAWS)
    single = chances(row, SamplingParams(temperature=1.0))
    assert_distributed(tokens, single)
    for step in (1, 2):
        pairs = tokens[:-step] * 8 + tokens[step:]
        assert_distributed(pairs, (single[:, None] * single[None, :]).flatten())


# A batch.


@pytest.mark.parametrize("vocabulary", [ODD, LARGE])
def test_a_draw_is_the_same_in_any_company(vocabulary: int) -> None:
    samplings = list(FIELDS.values())
    _, sampler = opened(samplings, vocabulary)
    kinds = len(samplings)
    rows = random_rows(kinds, vocabulary, seed=3)
    alone = torch.cat(
        [
            sampler.draw(rows[slot : slot + 1], on_device([slot]), on_device([9]), [slot])
            for slot in range(kinds)
        ]
    )
    for count in (3, 17, 256):
        slots = torch.arange(count, device="cuda") % kinds
        slots = slots[torch.randperm(count, device="cuda")]
        tokens = sampler.draw(rows[slots], slots, on_device([9] * count), slots.tolist())
        assert torch.equal(tokens, alone[slots])


def test_a_graph_draws_by_the_settings_and_positions_of_its_replay() -> None:
    count, vocabulary = 5, 20_011
    states, sampler = opened([FIELDS["top_p"]] * count, vocabulary)
    logits = torch.full((count + 1, vocabulary), math.nan, device="cuda")
    slots = on_device([count] * (count + 1))  # the spare slot
    positions = torch.zeros_like(slots)
    sampler.draw(logits, slots, positions, [])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sampler.draw(logits, slots, positions, [])
    graph.replay()
    assert tokens.tolist() == [0] * (count + 1)
    for step, field in enumerate(FIELDS):
        states.take([setup_of(slot, FIELDS[field]) for slot in range(count)])
        order = torch.randperm(count + 1).tolist()  # with one padding row
        logits.copy_(random_rows(count + 1, vocabulary, seed=step))
        slots.copy_(on_device(order))
        positions.fill_(step)
        graph.replay()
        drawn = tokens.clone()
        assert torch.equal(states.last_token[slots], drawn)
        for token, row, slot in zip(drawn.tolist(), logits, order, strict=True):
            sampling = FIELDS[field] if slot < count else SamplingParams()
            assert_drawn_right(token, row, setup_of(slot, sampling), step)


def edited_setups(step: int) -> list[SlotSetup]:
    penalised = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.25)
    bias = SamplingParams(logit_bias=((4, 6.0), (8, -100.0), (4, 1.0)))
    samplings = [SamplingParams(), penalised, bias, replace(penalised, logit_bias=((9, 3.0),))]
    return [
        SlotSetup(slot, sampling, 5, (3, 5), 15 * (slot % 2), (1, 2 + step, 2), (9, 9, 30 + step))
        for slot, sampling in enumerate(samplings)
    ]


def test_rows_that_edit_their_logits_draw_what_they_draw_on_a_cpu() -> None:
    opened_on = {
        device: open_sampler(4, ODD, device, kernels=device == "cuda") for device in ("cuda", "cpu")
    }
    slots = [3, 0, 2, 1]
    for step in range(40):
        logits = random_rows(4, ODD, seed=step, spread=1.0).cpu()
        drawn = {}
        for device, (states, sampler) in opened_on.items():
            if step in (0, 20):
                states.take(edited_setups(step))
            rows, at = logits.to(device), torch.full((4,), step, device=device)
            tokens = sampler.draw(rows, torch.tensor(slots, device=device), at, slots)
            sampler.redraw(rows, tokens, slots, [step] * 4)
            drawn[device] = tokens.tolist(), states.last_token[:4].tolist()
        assert drawn["cuda"] == drawn["cpu"]


def test_nothing_waits_for_the_device() -> None:
    states, sampler = open_sampler(4, ODD, "cuda", kernels=True)
    scorer = Scorer(kernels=True)
    logits = random_rows(4, ODD)
    slots, positions = torch.arange(4, device="cuda"), on_device([7] * 4)
    try:
        for step in range(3):  # compiles and fills the pinned pool in the first
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            states.take(edited_setups(step))
            tokens = sampler.draw(logits, slots, positions, range(4))
            sampler.redraw(logits, tokens, range(4), [7] * 4)
            pending = scorer.start(logits, tokens, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    entries = pending.read([5, 0, 1, 2])
    expected = logits.log_softmax(-1)
    for entry, row, token, top in zip(entries, expected, tokens, [5, 0, 1, 2], strict=True):
        assert entry.token == token
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [index for index, _ in entry.top] == row.topk(top).indices.tolist()
