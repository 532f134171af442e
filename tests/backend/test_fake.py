"""The fake device: what it answers, how a wrong page shows, and what its script makes it do."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backend.fake import FakeExecutor, open_backend
from backend.fake_model import FakeModel, Row, draw, uniform, weigh
from backend.interface import (
    Chunk,
    DeviceLost,
    ModelBroken,
    ModelNotFound,
    SamplingParams,
    SlotSetup,
    StepExecutor,
    StepPlan,
    StepTokens,
)
from backend.tokenizer import ByteTokenizer
from config import BackendSettings, BatchSettings, CacheSettings, FakeSettings, ModelSettings
from engine.scheduler import Scheduler

FOUR = {10: 3.0, 11: 2.0, 12: 1.0, 13: 0.0}


def device(page_tokens: int = 4, **script: float) -> FakeExecutor:
    executors: list[FakeExecutor] = []

    def build(executor: StepExecutor) -> Scheduler:
        assert isinstance(executor, FakeExecutor)
        executors.append(executor)
        return Scheduler(executor)

    open_backend(
        BackendSettings(
            cache=CacheSettings(page_tokens=page_tokens, budget_tokens=64 * page_tokens),
            batch=BatchSettings(max_running=4),
            fake=FakeSettings.model_validate(script),
        ),
        build,
    )
    return executors[0]


def setup(slot: int = 0, **sampling: Any) -> SlotSetup:
    return SlotSetup(
        slot, replace(SamplingParams(), **sampling), seed=5, stop_ids=(), min_position=0
    )


def prompt_chunk(tokens: Sequence[int], pages: Sequence[int], slot: int = 0) -> Chunk:
    return Chunk(slot, 0, len(tokens), tokens, pages, first=True, samples=True)


def decode(start: int, pages: Sequence[int] = (), slot: int = 0) -> Chunk:
    return Chunk(slot, start, 1, None, pages, first=False, samples=True)


def run(executor: FakeExecutor, chunk: Chunk, taken: Sequence[SlotSetup] = ()) -> StepTokens:
    return executor.collect(executor.launch(StepPlan([chunk], taken)))


def answer(model: FakeModel, prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(model.after(ids)[0])
    return ids[len(prompt) :]


def test_its_vocabulary_and_end_token_are_those_of_the_built_in_tokenizer() -> None:
    spec, tokenizer = device().spec, ByteTokenizer()
    assert spec.vocabulary == tokenizer.vocabulary
    assert spec.stop_ids == tokenizer.stop_ids


def test_answers_are_printable_and_end_after_some_hundred_tokens() -> None:
    executor = device()
    model, (end,) = executor.model, executor.spec.stop_ids
    assert bytes(set(answer(model, b"hello", 200)) - {end}).decode().isprintable()
    ends = sum(
        model.after([first, second])[0] == end for first in range(90) for second in range(90)
    )
    assert 1 / 200 < ends / 90**2 < 1 / 80


@pytest.mark.parametrize("page_tokens", [1, 3, 16])
def test_reading_back_through_pages_gives_what_the_ids_alone_give(page_tokens: int) -> None:
    executor = device(page_tokens)
    prompt, pages = list(range(40, 51)), list(range(30, 9, -1))
    first = replace(prompt_chunk(prompt[:5], pages), samples=False)
    assert run(executor, first, [setup()]).tokens == [()]
    rest = Chunk(0, 5, 6, prompt[5:], (), first=False, samples=True)
    got = [*run(executor, rest).tokens[0]]
    got += [run(executor, decode(11 + step)).tokens[0][0] for step in range(9)]
    assert got == answer(executor.model, prompt, 10)


@pytest.mark.parametrize("wrong", [[1, 0], [0, 9], [0, 3], [2, 1]])
def test_a_page_swapped_unwritten_or_of_another_prefix_gives_a_wrong_token(
    wrong: list[int],
) -> None:
    executor = device(page_tokens=2)
    run(executor, prompt_chunk([1, 2, 7, 7], [0, 1]), [setup()])
    run(executor, prompt_chunk([2, 1, 7, 7], [2, 3], slot=1), [setup(1)])
    right = executor.model.after([1, 2, 7, 7, 5])[0]
    for pages, equal in (([0, 1], True), (wrong, False)):
        chunk = Chunk(2, 4, 1, [5], [*pages, 4], first=True, samples=True)
        assert (run(executor, chunk, [setup(2)]).tokens[0][0] == right) is equal


def test_a_position_beyond_the_page_table_is_an_error() -> None:
    executor = device(page_tokens=2)
    run(executor, prompt_chunk([1, 2], [0]), [setup()])
    with pytest.raises(IndexError):
        run(executor, decode(2))


def test_the_probabilities_of_all_tokens_sum_to_one() -> None:
    model = device().model
    candidates = model.after([1, 2, 3])
    everything = model.logprob(candidates[0], candidates, top=model.vocabulary)
    assert len({token for token, _ in everything.top}) == model.vocabulary
    assert math.fsum(math.exp(logprob) for _, logprob in everything.top) == pytest.approx(1)
    logprobs = [logprob for _, logprob in everything.top]
    assert logprobs == sorted(logprobs, reverse=True)
    assert everything.top[0] == (everything.token, everything.logprob)


def test_scores_and_log_probabilities_come_with_the_chunks_that_ask() -> None:
    executor = device()
    model, prompt = executor.model, [9, 8, 7, 6, 5]
    chunk = replace(
        prompt_chunk(prompt, [0, 1]), logprobs=True, top=2, score_start=1, targets=prompt[2:]
    )
    got = run(executor, chunk, [setup()])
    assert got.scores[0] == [
        model.logprob(prompt[at], model.after(prompt[:at]), top=2) for at in (2, 3, 4)
    ]
    after = model.after(prompt)
    assert got.logprobs[0] == [model.logprob(after[0], after, top=2)]
    assert not run(executor, decode(5)).logprobs


@pytest.mark.parametrize(
    ("sampling", "left"),
    [
        ({"temperature": 0.0}, [10]),
        ({"temperature": 1.0}, [10, 11, 12, 13]),
        ({"temperature": 1.0, "top_k": 2}, [10, 11]),
        ({"temperature": 1.0, "top_p": 0.6}, [10]),  # the best has 0.64
        ({"temperature": 1.0, "top_p": 0.7}, [10, 11]),
        ({"temperature": 100.0, "top_p": 0.7}, [10, 11, 12]),
        ({"temperature": 1.0, "min_p": 0.3}, [10, 11]),  # the second is 0.37 of the best
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.99, "min_p": 0.1}, [10, 11, 12]),
    ],
)
def test_filters_leave_the_most_probable(sampling: dict[str, Any], left: list[int]) -> None:
    assert [token for token, _ in weigh(FOUR, replace(SamplingParams(), **sampling))] == left


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.6}])
def test_a_tie_with_the_last_one_kept_is_kept(filters: dict[str, Any]) -> None:
    logits = {1: 2.0, 2: 1.0, 3: 1.0, 4: 0.0}
    kept = weigh(logits, SamplingParams(temperature=1.0, **filters))
    assert [token for token, _ in kept] == [1, 2, 3]


def test_draws_follow_the_weights() -> None:
    kept = weigh(FOUR, SamplingParams(temperature=1.0))
    counts = Counter(draw(kept, uniform(seed=3, position=at)) for at in range(4000))
    total = sum(weight for _, weight in kept)
    for token, weight in kept:
        assert counts[token] / 4000 == pytest.approx(weight / total, abs=0.03)


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    chances = [[uniform(seed, position) for position in range(50)] for seed in range(50)]
    assert chances[7][9] == uniform(7, 9)
    assert len({chance for row in chances for chance in row}) == 2500


def sampled(setup: SlotSetup, candidates: Sequence[int], position: int = 0) -> int:
    return Row(setup).sample(FakeModel(300, None, ((), ())), candidates, position)


def test_penalties_count_what_was_seen() -> None:
    candidates = (10, 11, 12, 13)
    for sampling, taken in (
        (SamplingParams(frequency_penalty=0.6), 11),  # 3 - 2 * 0.6 is below 2
        (SamplingParams(frequency_penalty=0.4), 10),
        (SamplingParams(presence_penalty=1.1), 11),
        (SamplingParams(presence_penalty=0.9), 10),
        (SamplingParams(repetition_penalty=1.6), 11),  # 3 / 1.6 is below 2
    ):
        state = replace(setup(), sampling=sampling, output=(10, 10))
        assert sampled(state, candidates) == taken
    prompt = replace(setup(), sampling=SamplingParams(repetition_penalty=1.6), prompt=(10,))
    assert sampled(prompt, candidates) == 11
    prompt = replace(setup(), sampling=SamplingParams(presence_penalty=2.0), prompt=(10,))
    assert sampled(prompt, candidates) == 10


def test_a_row_goes_on_counting_what_it_draws() -> None:
    row = Row(replace(setup(), sampling=SamplingParams(presence_penalty=1.1)))
    model = FakeModel(300, None, ((), ()))
    assert [row.sample(model, (10, 11, 12, 13), at) for at in range(3)] == [10, 11, 10]


def test_a_bias_lifts_a_token_that_is_no_candidate() -> None:
    assert sampled(setup(logit_bias=((99, 30.0),)), (10, 11, 12, 13)) == 99
    assert sampled(setup(logit_bias=((10, -2.0),)), (10, 11, 12, 13)) == 11


@pytest.mark.parametrize(("stops", "taken"), [((10,), 11), ((10, 11, 12, 13), 0), ((0, 10), 11)])
def test_no_stop_id_is_drawn_below_the_least_position(stops: tuple[int, ...], taken: int) -> None:
    state = replace(setup(), stop_ids=stops, min_position=7)
    assert sampled(state, (10, 11, 12, 13), position=6) == taken
    assert sampled(state, (10, 11, 12, 13), position=7) == 10


def test_steps_take_the_time_of_the_script_one_after_another() -> None:
    executor = device(step_ms=50, token_us=1000, depth=2)
    begun = time.monotonic()
    steps = [
        executor.launch(StepPlan([prompt_chunk([1, 2, 3, 4], [0, 1])], [setup()])),
        executor.launch(StepPlan([decode(4)])),
    ]
    launched = time.monotonic() - begun
    ended = []
    for step in steps:
        executor.collect(step)
        ended.append(time.monotonic() - begun)
    assert launched < 0.05
    assert ended[0] >= 0.054
    assert ended[1] >= 0.105


def test_more_steps_than_the_depth_and_steps_out_of_order_are_mistakes() -> None:
    executor = device(depth=2)
    plan = StepPlan([prompt_chunk([1], [0])], [setup()])
    first, second = executor.launch(plan), executor.launch(plan)
    with pytest.raises(RuntimeError, match="2 in flight"):
        executor.launch(plan)
    with pytest.raises(RuntimeError, match="out of order"):
        executor.collect(second)
    executor.collect(first)
    executor.collect(second)


def test_the_device_is_lost_at_the_step_that_the_script_names() -> None:
    executor = device(fail_at_step=2)
    assert run(executor, prompt_chunk([1, 2], [0]), [setup()]).tokens[0]
    for _ in range(2):
        with pytest.raises(DeviceLost, match="FAKE_FAIL_AT_STEP"):
            run(executor, decode(2))


def write_model(folder: Path, config: object, generation: object = None) -> BackendSettings:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return BackendSettings(model=ModelSettings(local_dir=str(folder), max_model_len=100))


def test_a_model_folder_lends_its_vocabulary_and_end_tokens(tmp_path: Path) -> None:
    settings = write_model(tmp_path, {"vocab_size": 5000, "eos_token_id": 2})
    spec = open_backend(settings, Scheduler).spec
    assert (spec.folder, spec.vocabulary, spec.stop_ids) == (str(tmp_path), 5000, (2,))
    assert spec.max_model_len == 100
    settings = write_model(tmp_path, {"vocab_size": 5000}, {"eos_token_id": [7, 8]})
    assert open_backend(settings, Scheduler).spec.stop_ids == (7, 8)


@pytest.mark.parametrize("size", [4, 50, 100_000])
def test_candidates_are_four_different_ids_of_the_vocabulary(size: int) -> None:
    model = FakeModel(size, 1, (range(size), range(size)))
    for context in range(300):
        candidates = model.after([context])
        assert len(set(candidates)) == 4
        assert 0 <= min(candidates) <= max(candidates) < size


def test_a_folder_without_a_model_stops_the_start(tmp_path: Path) -> None:
    settings = BackendSettings(model=ModelSettings(local_dir=str(tmp_path)))
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        open_backend(settings, Scheduler)
    with pytest.raises(ModelBroken, match="vocab_size"):
        open_backend(write_model(tmp_path, {}), Scheduler)
    with pytest.raises(ModelBroken, match="object"):
        open_backend(write_model(tmp_path, []), Scheduler)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelBroken, match="no JSON"):
        open_backend(settings, Scheduler)


def test_a_null_end_in_the_generation_config_leaves_the_models_own(tmp_path: Path) -> None:
    settings = write_model(
        tmp_path, {"vocab_size": 5000, "eos_token_id": 2}, {"eos_token_id": None}
    )
    assert open_backend(settings, Scheduler).spec.stop_ids == (2,)
