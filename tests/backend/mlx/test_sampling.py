"""What is drawn from a row of logits. The oracle is numpy in float64, one token at a time."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from backend.interface import SamplingParams, Submission, Wants
from backend.mlx.sampling import RowDraws, Scores, bound, draw_key, filtered, penalised

VOCABULARY = 200
Floats = NDArray[np.float64]


def random_logits(seed: int, ties: bool = True) -> Floats:
    """Some of them equal, where there are to be `ties`."""
    values = np.random.default_rng(seed).normal(0, 3, VOCABULARY)
    return np.round(values, 1) if ties else values


def as_row(logits: Floats) -> mx.array:
    return mx.array(logits.astype(np.float32))[None]


def kept(logits: mx.array) -> set[int]:
    """Ids that may be drawn."""
    return {id for id, value in enumerate(logits[0].tolist()) if value > -math.inf}


def expected_filter(logits: Floats, sampling: SamplingParams) -> set[int]:
    """By walking down from the most probable token."""
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    falling = sorted(range(VOCABULARY), key=lambda id: -weights[id])
    if sampling.top_k:
        last = weights[falling[min(sampling.top_k, VOCABULARY) - 1]]
        falling = [id for id in falling if weights[id] >= last]
    whole, sum_, last = sum(weights[falling]), 0.0, 0.0
    for id in falling:
        sum_, last = sum_ + weights[id], weights[id]
        if sampling.top_p < 1 and sum_ >= sampling.top_p * whole:
            break
    falling = [id for id in falling if weights[id] >= last]
    return {id for id in falling if weights[id] >= sampling.min_p}


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": VOCABULARY},
        {"top_k": 10**9},
        {"top_p": 0.03},
        {"top_p": 0.7},
        {"top_p": 0.99},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 30, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_filters_keep_what_they_say_and_what_ties_with_it(
    asked: dict[str, Any], temperature: float
) -> None:
    sampling = SamplingParams(temperature=temperature, **asked)
    for seed in range(5):
        logits = random_logits(seed)
        assert kept(filtered(as_row(logits), sampling)) == expected_filter(logits, sampling)


def test_everything_is_kept_that_ties_with_the_last() -> None:
    logits = np.zeros(VOCABULARY)
    logits[:3] = 1.0
    for asked in ({"top_k": 2}, {"top_k": 3}, {"top_p": 0.01}):
        assert kept(filtered(as_row(logits), SamplingParams(temperature=1.0, **asked))) == {0, 1, 2}
    assert len(kept(filtered(as_row(logits), SamplingParams(temperature=1.0, top_k=4)))) == (
        VOCABULARY
    )


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_a_temperature_next_to_nothing_leaves_the_most_probable_token(temperature: float) -> None:
    logits = random_logits(1, ties=False)
    scaled = filtered(as_row(logits), SamplingParams(temperature=temperature))
    draws = {int(mx.random.categorical(scaled, key=mx.random.key(seed))) for seed in range(20)}
    assert draws == {int(logits.argmax())}


@pytest.mark.parametrize(
    "asked",
    [
        {"frequency_penalty": 1.5},
        {"presence_penalty": -0.7},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e300},
        {"frequency_penalty": 0.4, "presence_penalty": 1.1, "repetition_penalty": 0.8},
    ],
    ids=str,
)
def test_penalties_touch_the_tokens_seen_as_often_as_they_were(asked: dict[str, float]) -> None:
    sampling = SamplingParams(**asked)  # type: ignore[arg-type]
    logits, prompt, output = random_logits(3), [5, 5, 9], [9, 11, 11, 11]
    counts = Counter(output)
    expected = logits.copy()
    repetition = min(max(sampling.repetition_penalty, 1e-30), 1e30)
    for token in {*prompt, *output}:
        value = logits[token]
        value = value / repetition if value > 0 else value * repetition
        value -= counts[token] * sampling.frequency_penalty
        expected[token] = value - (counts[token] > 0) * sampling.presence_penalty
    found = penalised(as_row(logits), mx.array([*prompt, *output]), len(prompt), sampling)
    np.testing.assert_allclose(np.array(found)[0], expected, rtol=1e-5)


def test_a_mask_leaves_its_ids_alone() -> None:
    allowed = {0, 31, 32, 63, 64, VOCABULARY - 1}
    words = np.zeros(-(-VOCABULARY // 32), dtype=np.uint32)
    for id in allowed:
        words[id // 32] |= np.uint32(1 << id % 32)
    logits = random_logits(0)
    found = bound(as_row(logits), words.view(np.int32))
    assert kept(found) == allowed
    for id in allowed:
        assert found[0, id].item() == pytest.approx(logits[id])


def submission(sampling: SamplingParams, **more: Any) -> Submission:
    return Submission("a", (5, 5, 9), sampling, **{"seed": 1, **more})


def next_token(draws: RowDraws, ids: list[int], logits: Floats) -> int:
    """As mlx-lm has a row drawn."""
    row = draws.process(mx.array(ids), as_row(logits)) if draws.processes else as_row(logits)
    row = row - mx.logsumexp(row, axis=-1, keepdims=True)
    return int(draws.sample(row) if draws.samples else mx.argmax(row, axis=-1))


def test_a_row_that_asks_for_nothing_costs_nothing() -> None:
    plain = RowDraws(submission(SamplingParams(stop_token_ids=(3,))), [3])
    assert (plain.processes, plain.samples) == (False, False)
    edited = RowDraws(submission(SamplingParams(logit_bias=((3, 1.0),))), [])
    assert (edited.processes, edited.samples) == (True, False)
    hot = RowDraws(submission(SamplingParams(temperature=1.0)), [])
    assert (hot.processes, hot.samples) == (False, True)


def test_a_bias_is_added_and_one_that_is_there_twice_is_added_twice() -> None:
    logits = np.zeros(VOCABULARY)
    logits[4] = 2.5
    for biases, token in (
        (((7, 2.0),), 4),
        (((7, 2.0), (7, 2.0)), 7),
        (((7, 9.0), (7, -9.0)), 4),
    ):
        draws = RowDraws(submission(SamplingParams(logit_bias=biases)), [])
        assert next_token(draws, [5, 5, 9], logits) == token


def test_a_stop_id_is_drawn_only_where_the_answer_is_long_enough() -> None:
    logits = np.zeros(VOCABULARY)
    logits[[4, 6]] = 9.0, 8.0
    sampling = SamplingParams(min_new_tokens=2, max_new_tokens=9)
    draws = RowDraws(submission(sampling), [4, 6])
    ids = [5, 5, 9]
    for _ in range(3):
        ids.append(next_token(draws, ids, logits))
    assert ids[3:] == [0, 0, 4]
    resumed = RowDraws(submission(sampling, received=(0, 0)), [4, 6])
    assert next_token(resumed, ids[:5], logits) == 4


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    count, temperature = 6000, 1.7
    logits = random_logits(5)[:12]
    probable = np.exp(logits / temperature)
    probable /= probable.sum()
    sampling = SamplingParams(temperature=temperature)
    draws = RowDraws(submission(sampling, seed=77), [])
    drawn = Counter(next_token(draws, [1], logits) for _ in range(count))
    for id, share in enumerate(probable):
        deviation = math.sqrt(count * share * (1 - share))
        assert abs(drawn[id] - count * share) < 4.5 * deviation + 1


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = random_logits(6)
    sampling = SamplingParams(temperature=3.0)
    whole = RowDraws(submission(sampling, seed=9), [])
    tokens = [next_token(whole, [1], logits) for _ in range(10)]
    assert len(set(tokens)) > 3
    for count in range(10):
        rest = RowDraws(submission(sampling, seed=9, received=tuple(tokens[:count])), [])
        assert next_token(rest, [1], logits) == tokens[count]


def test_no_two_of_many_seeds_and_positions_have_the_same_key() -> None:
    seeds = [0, 1, 2, 1 << 32, (1 << 63) - 1]
    keys = [tuple(draw_key(seed, at).tolist()) for seed in seeds for at in range(200)]
    assert len(set(keys)) == len(keys)


def test_log_probabilities_are_of_raw_logits_and_the_best_come_first() -> None:
    logits = random_logits(7)
    expected = logits - np.log(np.exp(logits).sum())
    heavy = SamplingParams(temperature=2.0, logit_bias=((8, 100.0),), repetition_penalty=2.0)
    wants = Wants(logprobs=True, top=5)
    draws = RowDraws(submission(heavy, wants=wants), [])
    tokens = [next_token(draws, [5, 5, 9], logits) for _ in range(2)]
    for token in tokens:  # handed out after more have been drawn
        (score,) = draws.score(token)
        assert (score.token, token) == (8, 8)
        assert score.logprob == pytest.approx(expected[8], abs=1e-5)
        best = sorted(range(VOCABULARY), key=lambda id: (-logits[id], id))
        assert [value for _, value in score.top] == pytest.approx(expected[best[:5]], abs=1e-5)
        assert list(score.top) == sorted(score.top, key=lambda each: (-each[1], each[0]))
    plain = RowDraws(submission(replace(heavy, temperature=0.0)), [])
    next_token(plain, [5, 5, 9], logits)
    assert plain.score(8) == ()


@pytest.mark.parametrize("top", [0, 1, VOCABULARY, 2 * VOCABULARY])
def test_there_are_no_more_best_tokens_than_tokens(top: int) -> None:
    rows = mx.concatenate([as_row(random_logits(1)), as_row(random_logits(2))])
    scores = Scores.start(rows, mx.array([4, 5]), top).read([4, 5])
    assert [score.token for score in scores] == [4, 5]
    assert [len(score.top) for score in scores] == [min(top, VOCABULARY)] * 2
