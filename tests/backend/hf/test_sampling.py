"""The sampler against a plain float64 one that knows nothing of tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backend.hf.sampling import Sampler, Scorer, open_sampler
from backend.hf.sampling.draw import LARGEST, uniform
from backend.hf.sampling.penalties import PenalisedRows, PenaltyTables
from backend.interface import SamplingParams, SlotSetup

CPU = torch.device("cpu")
SMALL, LARGE = 40, 300  # below and above what the short way looks at


# The oracle.


def edited(row: Sequence[float], setup: SlotSetup, position: int) -> list[float]:
    """Logits after penalties, bias and the minimum length."""
    sampling, logits = setup.sampling, list(row)
    for token in range(len(logits)):
        count = setup.output.count(token)
        if count or token in setup.prompt:
            rate = sampling.repetition_penalty
            logits[token] = logits[token] / rate if logits[token] > 0 else logits[token] * rate
        logits[token] -= count * sampling.frequency_penalty
        logits[token] -= (count > 0) * sampling.presence_penalty
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    if position < setup.min_position:
        for token in setup.stop_ids:
            logits[token] = -math.inf
    return logits


def probabilities(logits: Sequence[float], sampling: SamplingParams) -> list[float]:
    """What is left of each token after temperature and filters; sums to 1."""
    peak = max(logits)
    weights = [math.exp((value - peak) / sampling.temperature) for value in logits]
    kept = set(range(len(logits)))
    if 0 < sampling.top_k < len(logits):
        last = sorted(logits, reverse=True)[sampling.top_k - 1]
        kept = {token for token in kept if logits[token] >= last}
    if sampling.top_p < 1:
        need = sampling.top_p * sum(weights[token] for token in kept)
        for last in sorted((logits[token] for token in kept), reverse=True):
            reached = {token for token in kept if logits[token] >= last}
            if sum(weights[token] for token in reached) >= need:
                break
        kept = reached
    kept = {token for token in kept if weights[token] >= sampling.min_p}
    total = sum(weights[token] for token in kept)
    return [weights[token] / total * (token in kept) for token in range(len(logits))]


def assert_drawn_right(token: int, row: Sequence[float], setup: SlotSetup, position: int) -> None:
    logits = edited(row, setup, position)
    if not setup.sampling.temperature:
        assert token == logits.index(max(logits))
        return
    chances = probabilities(logits, setup.sampling)
    point = uniform(torch.tensor(setup.seed), torch.tensor(position)).item() / 2**31
    assert chances[token] > 0, "a filtered token was drawn"
    assert sum(chances[:token]) - 1e-6 <= point <= sum(chances[: token + 1]) + 1e-6


# Material.


def random_rows(rows: int, vocabulary: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=generator) * spread


def with_ties(rows: int, vocabulary: int) -> Tensor:
    return random_rows(rows, vocabulary).round()


def with_gaps(rows: int, vocabulary: int) -> Tensor:
    logits = random_rows(rows, vocabulary)
    return logits.masked_fill(logits < 0.5, -math.inf)


def with_huge_values(rows: int, vocabulary: int) -> Tensor:
    logits = random_rows(rows, vocabulary)
    return torch.where(logits < -2, -3e38, torch.where(logits > 5, 1e6, logits))


def setup_for(slot: int, sampling: SamplingParams, **changes: object) -> SlotSetup:
    setup = SlotSetup(slot, sampling, seed=1000 + slot, stop_ids=(3, 5), min_position=0)
    if sampling.penalised:
        setup = replace(setup, prompt=(1, 2, 2, 9, 30), output=(9, 9, 9, 11, 17))
    return replace(setup, **changes)  # type: ignore[arg-type]


def sampler_of(setups: Sequence[SlotSetup], vocabulary: int) -> Sampler:
    states, sampler = open_sampler(max(setup.slot for setup in setups) + 1, vocabulary, CPU)
    states.take(setups)
    return sampler


def sample(
    sampler: Sampler, logits: Tensor, slots: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """Tokens of a step. Logits stay as they are, to the last bit."""
    before = logits.clone()
    tokens = sampler.draw(logits, torch.tensor(slots), torch.tensor(positions), slots)
    sampler.redraw(logits, tokens, slots, positions)
    assert torch.equal(logits.view(torch.int32), before.view(torch.int32))
    return tokens


FIELDS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.7),
    "hot": SamplingParams(temperature=100.0),
    "cold": SamplingParams(temperature=1e-3),
    "top_k": SamplingParams(temperature=1.0, top_k=7),
    "top_k 1": SamplingParams(temperature=1.0, top_k=1),
    "top_k beyond the candidates": SamplingParams(temperature=2.0, top_k=100),
    "top_k beyond the vocabulary": SamplingParams(temperature=1.0, top_k=10**9),
    "top_p": SamplingParams(temperature=0.8, top_p=0.6),
    "top_p of a flat row": SamplingParams(temperature=5.0, top_p=0.95),
    "top_p near 0": SamplingParams(temperature=1.0, top_p=1e-12),
    "min_p": SamplingParams(temperature=1.0, min_p=0.1),
    "min_p 1": SamplingParams(temperature=1.0, min_p=1.0),
    "frequency": SamplingParams(temperature=1.0, frequency_penalty=1.5),
    "presence, greedy": SamplingParams(presence_penalty=-2.0),
    "repetition": SamplingParams(temperature=1.0, repetition_penalty=1.7),
    "repetition below 1, greedy": SamplingParams(repetition_penalty=0.25),
    "bias": SamplingParams(temperature=1.0, logit_bias=((4, 6.0), (8, -100.0), (4, 1.0))),
    "bias, greedy": SamplingParams(logit_bias=((4, 100.0),)),
    "filters": SamplingParams(temperature=0.9, top_k=20, top_p=0.7, min_p=0.05),
    "flat filters": SamplingParams(temperature=3.0, top_k=90, top_p=0.9, min_p=0.01),
    "all": SamplingParams(
        temperature=1.3,
        top_k=30,
        top_p=0.9,
        min_p=0.02,
        frequency_penalty=0.4,
        presence_penalty=0.3,
        repetition_penalty=1.2,
        logit_bias=((0, 2.5), (3, 4.0), (9, 5.0)),
    ),
}


@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
@pytest.mark.parametrize("rows_of", [random_rows, with_ties, with_gaps, with_huge_values])
@pytest.mark.parametrize("field", FIELDS)
def test_every_field_draws_what_the_plain_sampler_allows(
    field: str, rows_of: type, vocabulary: int
) -> None:
    logits: Tensor = rows_of(12, vocabulary)
    floors = [0, 500] * 6
    setups = [
        setup_for(slot, FIELDS[field], min_position=floor) for slot, floor in enumerate(floors)
    ]
    positions = [100 + slot for slot in range(12)]
    tokens = sample(sampler_of(setups, vocabulary), logits, range(12), positions)
    for token, row, setup, position in zip(
        tokens.tolist(), logits.tolist(), setups, positions, strict=True
    ):
        assert_drawn_right(token, row, setup, position)


def test_a_mixed_batch_draws_for_each_row_what_it_draws_alone() -> None:
    setups = [setup_for(slot, sampling) for slot, sampling in enumerate(FIELDS.values())]
    logits = random_rows(len(setups), LARGE)
    order = random.Random(1).sample(range(len(setups)), len(setups))
    together = sample(sampler_of(setups, LARGE), logits[order], order, order)
    for slot, token in zip(order, together.tolist(), strict=True):
        alone = sampler_of([setups[slot]], LARGE)
        assert sample(alone, logits[slot : slot + 1], [slot], [slot]).item() == token


@pytest.mark.parametrize("names", [list(FIELDS), ["greedy", "temperature"], ["bias", "all"]])
def test_a_step_outside_a_graph_draws_each_row_once_and_the_same(names: list[str]) -> None:
    setups = [setup_for(slot, FIELDS[name]) for slot, name in enumerate(names)]
    logits, slots = random_rows(len(setups), LARGE), list(range(len(setups)))
    before = logits.clone()
    in_two, at_once = sampler_of(setups, LARGE), sampler_of(setups, LARGE)
    for position in (8, 9):  # the second with the counts of the first
        positions = [position] * len(slots)
        tokens = at_once.sample(logits, slots, positions)
        assert tokens.tolist() == sample(in_two, logits, slots, positions).tolist()
    assert torch.equal(logits, before)


# The draw.


def test_a_tie_at_the_border_of_the_candidates_is_kept() -> None:
    logits = torch.zeros(1500, LARGEST + 30)  # all tie: top_k 2 keeps all
    setups = [setup_for(row, SamplingParams(temperature=1.0, top_k=2)) for row in range(1500)]
    tokens = sample(sampler_of(setups, LARGEST + 30), logits, range(1500), [0] * 1500)
    assert set(tokens.tolist()) == set(range(LARGEST + 30))


@pytest.mark.parametrize("top_k", range(1, 7))
def test_logits_one_bit_apart_are_told_apart(top_k: int) -> None:
    bits = torch.tensor([0x3F800003, 0x3F800001, 0x3F800000, 0x3F800400, 0x3F800002, 0, 0x3F900000])
    logits = -bits.int().view(torch.float32).repeat(500, 1)
    setups = [setup_for(row, SamplingParams(temperature=1.0, top_k=top_k)) for row in range(500)]
    tokens = sample(sampler_of(setups, 7), logits, range(500), [0] * 500)
    assert set(tokens.tolist()) == set([5, 2, 1, 4, 0, 3][:top_k])


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_p of a flat row", "filters"])
def test_a_draw_is_the_same_in_any_company(field: str) -> None:
    vocabulary = 20_011
    row = random_rows(1, vocabulary, seed=3)
    setups = [setup_for(slot, FIELDS[field]) for slot in range(17)]
    expected = sample(sampler_of(setups, vocabulary), row, [4], [9]).item()
    for rows in (2, 5, 17):
        company = random_rows(rows, vocabulary, seed=rows)
        slots = [slot for slot in range(17) if slot != 4][: rows - 1]
        for place in (0, rows // 2, rows - 1):
            batch = torch.cat([company[:place], row, company[place : rows - 1]])
            order = [*slots[:place], 4, *slots[place:]]
            tokens = sample(sampler_of(setups, vocabulary), batch, order, [9] * rows)
            assert tokens[place].item() == expected


# Slots.


def test_plain_greedy_rows_cost_an_argmax_and_nothing_else() -> None:
    logits = with_ties(4, LARGE)
    sampler = sampler_of([setup_for(slot, SamplingParams()) for slot in range(4)], LARGE)
    slots, positions = torch.arange(4), torch.ones(4, dtype=torch.int64)
    sampler.draw(logits, slots, positions, range(4))
    with torch.autograd.profiler.profile() as profile:
        tokens = sampler.draw(logits, slots, positions, range(4))
        sampler.redraw(logits, tokens, range(4), [1] * 4)
    operators = [event.name for event in profile.function_events if not event.cpu_parent]
    assert operators == ["aten::argmax", "aten::index_copy_"]
    assert tokens.tolist() == [row.index(max(row)) for row in logits.tolist()]


@pytest.mark.parametrize("bias", [(), ((7, 100.0),)])
def test_a_drawn_token_is_the_last_of_its_slot_and_of_no_other(
    bias: tuple[tuple[int, float], ...],
) -> None:
    states, sampler = open_sampler(4, SMALL, CPU)
    states.take(
        [setup_for(slot, SamplingParams(temperature=1.0 * (slot % 2))) for slot in range(3)]
    )
    states.take([setup_for(3, SamplingParams(temperature=1.0, logit_bias=bias))])
    tokens = sample(sampler, random_rows(2, SMALL), [3, 0], [8, 9]).tolist()
    assert states.last_token[:4].tolist() == [tokens[1], 0, 0, tokens[0]]
    assert not bias or tokens[0] == 7


def test_padding_rows_are_greedy_and_touch_no_slot() -> None:
    states, sampler = open_sampler(3, LARGE, CPU)
    states.take([setup_for(1, FIELDS["all"]), setup_for(2, FIELDS["top_p"])])
    logits = random_rows(5, LARGE)
    slots, positions = [2, 1, 3, 3, 3], [30, 40, 0, 0, 0]
    tokens = sample(sampler, logits, slots, positions)
    alone = sample(sampler_of(list(states.setups.values()), LARGE), logits[:2], [2, 1], [30, 40])
    assert tokens.tolist() == [*alone.tolist(), *logits[2:].argmax(-1).tolist()]
    assert states.last_token[:3].tolist() == [0, tokens[1], tokens[0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_advanced_by_draws_equal_those_rebuilt_from_ids(temperature: float) -> None:
    sampling = replace(FIELDS["all"], temperature=temperature, logit_bias=())
    setups = [
        setup_for(slot, sampling, prompt=tuple(range(5, 6 + 9 * slot)), output=())
        for slot in range(3)
    ]
    advanced = sampler_of(setups, SMALL)
    for step in range(150):
        logits = random_rows(3, SMALL, seed=step)
        slots = [slot for slot in range(3) if step % 7 != slot]  # not every slot in every step
        positions = [len(setups[slot].prompt) + len(setups[slot].output) for slot in slots]
        rebuilt = sample(sampler_of(setups, SMALL), logits[slots], slots, positions)
        tokens = sample(advanced, logits[slots], slots, positions)
        assert tokens.tolist() == rebuilt.tolist()
        for slot, token, position in zip(slots, tokens.tolist(), positions, strict=True):
            assert_drawn_right(token, logits[slot].tolist(), setups[slot], position)
            setups[slot] = replace(setups[slot], output=(*setups[slot].output, token))


def test_a_slot_taken_anew_keeps_nothing_of_the_one_before() -> None:
    chooser = random.Random(2)
    states, used = open_sampler(2, LARGE, CPU)
    for step in range(120):
        sampling = chooser.choice(list(FIELDS.values()))
        setup = setup_for(chooser.randrange(2), sampling, min_position=chooser.choice([0, 50]))
        if sampling.penalised:
            seen = tuple(chooser.choices(range(LARGE), k=chooser.choice([3, 100])))
            setup = replace(setup, prompt=seen, output=seen[:2])
        states.take([setup])
        fresh = sampler_of([setup], LARGE)
        logits = random_rows(1, LARGE, seed=step)
        for position in (40, 60):
            expected = sample(fresh, logits, [setup.slot], [position])
            assert sample(used, logits, [setup.slot], [position]) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stop_id_can_be_drawn_from_the_minimum_position_on(temperature: float) -> None:
    logits = torch.zeros(1, SMALL)
    logits[0, 3] = 50.0
    setup = setup_for(0, SamplingParams(temperature=temperature), min_position=7)
    sampler = sampler_of([setup], SMALL)
    drawn = [sample(sampler, logits, [0], [position]).item() for position in range(4, 10)]
    assert [token == 3 for token in drawn] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
def test_a_broken_row_yields_an_id_and_leaves_its_neighbours_alone(broken: float) -> None:
    for field in ("greedy", "temperature", "top_p", "all"):
        setups = [setup_for(slot, FIELDS[field]) for slot in range(3)]
        logits = random_rows(3, LARGE)
        whole = sample(sampler_of(setups, LARGE), logits, range(3), [1] * 3)
        logits[1] = broken
        tokens = sample(sampler_of(setups, LARGE), logits, range(3), [1] * 3)
        assert 0 <= tokens[1] < LARGE
        assert tokens[[0, 2]].tolist() == whole[[0, 2]].tolist()


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_an_extreme_repetition_penalty_never_makes_a_logit_that_is_no_number(
    penalty: float,
) -> None:
    logits = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    sampling = SamplingParams(temperature=1.0, repetition_penalty=penalty)
    tables = PenaltyTables(1, 4, CPU)
    tables.fill([setup_for(0, sampling, prompt=(0, 1, 2), output=())])
    first = torch.tensor([0])
    tables.apply(logits, PenalisedRows(first, first, (0,)))
    assert not logits.isnan().any()


@pytest.mark.parametrize("temperature", [1e-30, 1e-60])
def test_a_temperature_too_small_for_float32_draws_the_most_probable(temperature: float) -> None:
    logits = random_rows(1, SMALL)
    setup = setup_for(0, SamplingParams(temperature=temperature))
    assert sample(sampler_of([setup], SMALL), logits, [0], [0]) == logits.argmax()


# Log-probabilities.


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    logits = random_rows(5, LARGE)
    tokens, tops = [0, 7, 299, 11, 50], [0, 3, 20, 1, 0]
    entries = Scorer().start(logits, torch.tensor(tokens), max(tops)).read(tops)
    for entry, row, token, top in zip(entries, logits.tolist(), tokens, tops, strict=True):
        norm = math.log(sum(math.exp(value) for value in row))
        best = sorted(range(LARGE), key=lambda index: -row[index])[:top]
        assert entry.token == token
        assert entry.logprob == pytest.approx(row[token] - norm, abs=1e-5)
        assert [index for index, _ in entry.top] == best
        assert [value for _, value in entry.top] == pytest.approx(
            [row[index] - norm for index in best], abs=1e-5
        )


def test_more_alternatives_than_tokens_are_all_the_tokens() -> None:
    (entry,) = Scorer().start(torch.zeros(1, 4), torch.tensor([2]), 20).read([20])
    assert [index for index, _ in entry.top] == [0, 1, 2, 3]


def test_alternatives_that_tie_stand_in_the_order_of_their_ids() -> None:
    logits = with_ties(20, LARGE)
    for top in (2, 20, LARGE):
        for entry in Scorer().start(logits, torch.zeros(20).long(), top).read([top] * 20):
            assert entry.top == tuple(sorted(entry.top, key=lambda found: (-found[1], found[0])))


def test_no_rows_have_no_log_probabilities() -> None:
    assert Scorer().start(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 0).read([]) == []
