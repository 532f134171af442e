"""What a library user asks, and what comes back, over the fake device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from backend.interface import (
    BackendFailed,
    Delta,
    Finish,
    NeverFits,
    RequestRefused,
    SamplingParams,
    StepOutput,
    TokenLogprob,
    TooLong,
    Wants,
)
from backend.tokenizer import ByteTokenizer
from config import GenerationSettings, ModelSettings, QueueSettings, Settings
from engine.llm import LLM, Answer, Prompt
from tests.engine.engine_bench import LENGTH, Scripted, fake_settings, fold

CONTEXT = 200  # tokens
PAGES = 64
PAGE = 4  # tokens
PLAIN = SamplingParams(max_new_tokens=24, ignore_eos=True)
SHORT = replace(PLAIN, max_new_tokens=3)
HOT = replace(PLAIN, temperature=1.5)
PROMPTS = ["Once upon a time", "a", "The capital of France is", "日本語", "x" * 50]
SCORED = Wants(logprobs=True, prompt_logprobs_from=0, top=2)

Opener = Callable[..., LLM]


def settings(max_queued: int = 0, default: int = 512, **fake: int) -> Settings:
    model = ModelSettings(max_model_len=CONTEXT)
    return Settings(
        backend=fake_settings(**fake).model_copy(update={"model": model}),
        queue=QueueSettings(max_queued=max_queued),
        generation=GenerationSettings(max_new_tokens=default),
    )


def settle(llm: LLM) -> None:
    """Let the engine say its last words: soon nothing may be at work."""
    for _ in range(8):
        llm.engine.step()
    assert llm.engine.idle
    load = llm.engine.load()
    assert (load.running, load.waiting, load.pages_leased) == (0, 0, 0)


@pytest.fixture
def opened() -> Iterator[Opener]:
    """Opens an `LLM`; at the end of the test it must have nothing to do and hold nothing."""
    each: list[LLM] = []

    def open_one(**knobs: int) -> LLM:
        each.append(LLM(settings(**knobs)))
        return each[-1]

    yield open_one
    for llm in each:
        settle(llm)
        llm.engine.flush()
        assert llm.engine.load().pages_free == PAGES
        llm.close()


@pytest.fixture
def llm(opened: Opener) -> LLM:
    return opened()


def said(answer: Answer) -> tuple[str, list[int], Finish]:
    """What does not depend on the cache."""
    return answer.text, answer.token_ids, answer.finish


# Whole answers


def test_a_text_and_its_ids_are_the_same_prompt(llm: LLM) -> None:
    (by_text,) = llm.generate(PROMPTS[0], PLAIN)
    ids = llm.tokenizer.encode(PROMPTS[0])
    (by_ids,) = llm.generate(ids, PLAIN)
    assert said(by_text) == said(by_ids)
    assert by_text.prompt_tokens == len(ids)
    assert by_text.text == bytes(by_text.token_ids).decode()
    assert by_text.finish == LENGTH
    assert by_text.logprobs == by_text.prompt_logprobs == []


@pytest.mark.parametrize("progress", [False, True])
def test_many_answers_stand_in_the_order_of_their_prompts(llm: LLM, progress: bool) -> None:
    mixed: list[Prompt] = [*PROMPTS, llm.tokenizer.encode(PROMPTS[0])] * 3
    together = llm.generate(mixed, PLAIN, progress=progress)
    alone = [llm.generate(prompt, PLAIN)[0] for prompt in mixed]
    assert [said(answer) for answer in together] == [said(answer) for answer in alone]


def test_each_prompt_may_have_its_own_sampling(llm: LLM) -> None:
    each = [replace(PLAIN, max_new_tokens=at, temperature=at / 2) for at in range(len(PROMPTS))]
    answers = llm.generate(PROMPTS, each, seed=3)
    for prompt, sampling, answer in zip(PROMPTS, each, answers, strict=True):
        assert said(llm.generate(prompt, sampling, seed=3)[0]) == said(answer)
    assert [len(answer.token_ids) for answer in answers] == [0, 1, 2, 3, 4]


def test_more_prompts_than_sampling_parameters_are_a_mistake_that_names_both(llm: LLM) -> None:
    with pytest.raises(ValueError, match="3 prompts and 2 sampling parameters"):
        llm.generate(["a", "b", "c"], [PLAIN, HOT])


def test_n_answers_of_a_prompt_stand_side_by_side_and_draw_from_seeds_in_a_row(llm: LLM) -> None:
    answers = llm.generate(PROMPTS[:2], HOT, seed=40, n=3)
    expected = [
        said(llm.generate(prompt, HOT, seed=40 + index)[0])
        for prompt in PROMPTS[:2]
        for index in range(3)
    ]
    assert [said(answer) for answer in answers] == expected
    assert len({answer.text for answer in answers}) == 6
    assert answers[0].cached_tokens == 0 < answers[1].cached_tokens


def test_without_a_seed_answers_differ(llm: LLM) -> None:
    assert len({llm.generate("a", HOT)[0].text for _ in range(3)}) == 3


def test_a_default_length_is_clamped_and_one_asked_for_is_not(opened: Opener) -> None:
    long, short = opened(), opened(default=7)
    endless = SamplingParams(ignore_eos=True)
    assert len(long.generate([5] * 150, endless)[0].token_ids) == CONTEXT - 150
    assert len(short.generate([5] * 150, endless)[0].token_ids) == 7
    assert len(short.generate([5] * 150, PLAIN)[0].token_ids) == 24


def test_the_token_that_ends_an_answer_is_counted_and_not_shown(llm: LLM) -> None:
    (free,) = llm.generate(PROMPTS[0], PLAIN)
    stop = free.token_ids[9]
    first = free.token_ids.index(stop)
    (answer,) = llm.generate(PROMPTS[0], replace(PLAIN, stop_token_ids=(stop,)))
    assert answer.finish == Finish("stop", matched=stop)
    assert answer.token_ids == free.token_ids[: first + 1]
    assert answer.text == free.text[:first]
    end = llm.spec.stop_ids[0]
    ended = SamplingParams(logit_bias=((end, 100.0),), min_new_tokens=3)
    (answer,) = llm.generate(PROMPTS[0], ended)
    assert answer.token_ids[3:] == [end]
    assert answer.text == bytes(answer.token_ids[:3]).decode()


def test_the_second_turn_finds_the_first_one_cached(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    first = llm.chat(messages, PLAIN)
    assert ByteTokenizer.BOS not in llm.encode_chat(messages)  # the template says all
    assert said(first) == said(llm.generate(llm.encode_chat(messages), PLAIN)[0])
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And then?"},
    ]
    second = llm.chat(messages, PLAIN)
    before = first.prompt_tokens + len(first.token_ids) - 1  # the last was never an input
    assert second.cached_tokens == before // PAGE * PAGE


def test_the_environment_says_which_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKEND_IMPL", "fake")
    monkeypatch.setenv("MAX_NEW_TOKENS_DEFAULT", "5")
    with LLM() as llm:
        (answer,) = llm.generate("a", SamplingParams(ignore_eos=True))
    assert len(answer.token_ids) == 5


# Streams are the same answers


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("stop", [(), (2, 3), (7, 8), (5, 12), (23, 24)], ids=str)
def test_a_whole_answer_is_the_fold_of_its_stream(
    opened: Opener, stop: tuple[int, ...], depth: int
) -> None:
    free = opened().generate(PROMPTS[0], HOT, seed=5)[0].text
    string = free[slice(*stop)] if stop else ""
    strings = [string] if stop else []
    whole, streamed = opened(depth=depth), opened(depth=depth)
    (answer,) = whole.generate(PROMPTS[0], HOT, seed=5, stop=strings, wants=SCORED)
    pieces = list(streamed.stream(PROMPTS[0], HOT, seed=5, stop=strings, wants=SCORED))
    assert fold(pieces) == answer
    assert len(pieces) > 1 or len(answer.token_ids) == 1
    if stop:
        assert answer.text == free[: free.index(string)]
        assert answer.finish == Finish("stop", matched=string)
        assert len(answer.token_ids) == free.index(string) + len(string)  # a byte a token
    else:
        assert answer.text == free


def test_a_stop_string_ends_the_work_and_its_pages_come_home(llm: LLM) -> None:
    (free,) = llm.generate(PROMPTS[0], replace(PLAIN, max_new_tokens=100))
    before = llm.engine.load().steps
    stop = free.text[4:8]
    (answer,) = llm.generate(PROMPTS[0], replace(PLAIN, max_new_tokens=100), stop=["never", stop])
    assert answer.finish.matched == stop
    assert llm.engine.load().steps - before == len(answer.token_ids) < 10
    assert llm.engine.load().pages_leased == 0


def test_a_stop_string_ends_the_work_before_anybody_asks_for_the_text(llm: LLM) -> None:
    stop = llm.generate("a", PLAIN)[0].text[2:4]
    ends, goes_on = llm.stream("a", PLAIN, stop=stop), llm.stream("b", PLAIN)
    for _ in range(6):
        next(goes_on)
    assert llm.engine.load().running == 1
    goes_on.close()
    assert fold(list(ends)).finish.matched == stop


def test_streams_may_be_interleaved_with_each_other_and_with_whole_answers(llm: LLM) -> None:
    first = llm.stream(PROMPTS[0], PLAIN)
    second = llm.stream(PROMPTS[2], HOT, seed=1)
    pieces = [next(first)], [next(second)]
    (whole,) = llm.generate(PROMPTS[4], PLAIN)
    for _ in range(10):
        pieces[1].append(next(second))
    pieces[0].extend(first)
    pieces[1].extend(second)
    assert said(fold(pieces[0])) == said(llm.generate(PROMPTS[0], PLAIN)[0])
    assert said(fold(pieces[1])) == said(llm.generate(PROMPTS[2], HOT, seed=1)[0])
    assert said(whole) == said(llm.generate(PROMPTS[4], PLAIN)[0])


def test_streams_share_steps(llm: LLM) -> None:
    first, second = llm.stream("a", PLAIN), llm.stream("b", PLAIN)
    assert len([*first, *second]) == 48
    assert llm.engine.load().steps == 24


@pytest.mark.parametrize("taken", [0, 1, 5])
@pytest.mark.parametrize("how", ["close", "forget"])
def test_closing_a_stream_cancels_its_answer(llm: LLM, taken: int, how: str) -> None:
    stream = llm.stream("a", replace(PLAIN, max_new_tokens=100))
    for _ in range(taken):
        next(stream)
    if how == "close":
        stream.close()
    else:
        del stream
        gc.collect()
    settle(llm)
    assert llm.engine.load().steps <= taken + 1


def test_a_stream_is_refused_when_it_is_asked_for(llm: LLM) -> None:
    with pytest.raises(TooLong):
        llm.stream([5] * CONTEXT, PLAIN)


# Log-probabilities


def test_log_probabilities_are_parallel_to_the_tokens(llm: LLM) -> None:
    prompt = llm.tokenizer.encode(PROMPTS[0])
    free, stopped = (
        llm.generate(prompt, PLAIN, wants=SCORED, stop=stop)[0]
        for stop in ((), llm.generate(prompt, PLAIN)[0].text[5:9])
    )
    assert len(stopped.token_ids) < len(free.token_ids)
    for answer in (free, stopped):
        assert [each.token for each in answer.logprobs] == answer.token_ids
        assert [each.token for each in answer.prompt_logprobs] == prompt[1:]
        for each in (*answer.logprobs, *answer.prompt_logprobs):
            assert len(each.top) == 2
            assert each.logprob <= each.top[0][1] < 0


class Burst(Scripted):
    """A backend that brings a whole answer at once."""

    def advance(self, wait: float) -> StepOutput:
        output = super().advance(wait)
        tokens = list(b"one two three")
        scores = [TokenLogprob(token, -1.0) for token in tokens]
        output.deltas = [
            Delta(each.id, tokens, each.finish, cached=0, logprobs=scores) for each in output.deltas
        ]
        return output


def test_a_stop_string_within_a_burst_cuts_tokens_and_scores_alike(
    monkeypatch: pytest.MonkeyPatch, llm: LLM
) -> None:
    monkeypatch.setattr("engine.llm.open_backend", lambda _: Burst(llm.spec))
    burst = LLM(settings())
    (answer,) = burst.generate("a", PLAIN, stop="o t", wants=Wants(logprobs=True))
    assert answer.text == "one tw"
    assert answer.token_ids == [each.token for each in answer.logprobs] == list(b"one two t")
    assert answer.finish == Finish("stop", matched="o t")


# Refusals


@pytest.mark.parametrize(
    ("prompt", "asked", "param", "parts"),
    [
        ([], {}, "prompt", ["empty"]),
        ([5] * 300, {}, "prompt", ["300", "24", "200"]),
        ([5] * 190, {}, "max_new_tokens", ["190", "24", "200"]),
        (
            "a",
            {"sampling": replace(PLAIN, max_new_tokens=9999)},
            "max_new_tokens",
            ["9,999", "200"],
        ),
        ([5, 260], {}, "prompt", ["260", "vocabulary"]),
        ([-1], {}, "prompt", ["-1", "vocabulary"]),
        ("\ud800", {}, "prompt", ["surrogate"]),
        ("a", {"sampling": replace(PLAIN, stop_token_ids=(999,))}, "stop_token_ids", ["999"]),
        ("a", {"sampling": replace(PLAIN, logit_bias=((999, 1.0),))}, "logit_bias", ["999"]),
        ("a", {"wants": Wants(prompt_logprobs_from=9)}, "prompt_logprobs_from", ["9"]),
        ("a", {"stop": ""}, "stop", ["1 to"]),
        ("a", {"seed": -1}, "seed", ["-1"]),
        ("a", {"seed": 2**63 - 1, "n": 2}, "seed", [str(2**63)]),  # its second answer's
        ("a", {"n": 0}, "n", ["1 or more"]),
    ],
)
def test_a_refusal_names_its_field_and_what_was_there_and_disturbs_nobody(
    llm: LLM, prompt: Any, asked: dict[str, Any], param: str, parts: list[str]
) -> None:
    neighbour = llm.stream(PROMPTS[0], PLAIN)
    pieces = [next(neighbour), next(neighbour)]
    with pytest.raises(RequestRefused) as refused:
        llm.generate(["good", prompt, "good"], **{"sampling": PLAIN, **asked})
    assert refused.value.param == param
    assert all(part in str(refused.value) for part in parts)
    load = llm.engine.load()
    assert (load.running, load.waiting) == (1, 0)
    assert said(fold([*pieces, *neighbour])) == said(llm.generate(PROMPTS[0], PLAIN)[0])


def test_what_never_fits_into_the_pages_names_both_numbers() -> None:
    roomy = settings().backend.model_copy(update={"model": ModelSettings(max_model_len=1000)})
    with LLM(Settings(backend=roomy)) as llm, pytest.raises(NeverFits) as refused:
        llm.generate([5] * 250, PLAIN)
    assert "prompt 250 + max_new_tokens 24 need 69 pages" in str(refused.value)
    assert "has 64" in str(refused.value)


def test_a_batch_beyond_the_queue_is_answered_nonetheless(opened: Opener, llm: LLM) -> None:
    small = opened(max_queued=2)
    stream = small.stream("a", PLAIN)
    batch = PROMPTS * 4
    answers = small.generate(batch, PLAIN)
    assert [said(each) for each in answers] == [said(each) for each in llm.generate(batch, PLAIN)]
    assert len(small.generate("a", PLAIN, n=30)) == 30
    assert said(fold(list(stream))) == said(llm.generate("a", PLAIN)[0])
    with pytest.raises(TooLong):  # refused when some of the others have ended already
        small.generate([*batch, "x" * CONTEXT], PLAIN)


def test_no_prompts_no_answers(llm: LLM) -> None:
    assert llm.generate([], PLAIN) == []


# Failures


def test_a_lost_device_ends_answers_with_the_cause_and_refuses_the_next(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[:3], [SHORT, PLAIN, PLAIN])
    llm = LLM(settings(fail_at_step=10))
    stream = llm.stream(PROMPTS[2], PLAIN)
    answers = llm.generate(PROMPTS[:3], [SHORT, PLAIN, PLAIN])
    assert said(answers[0]) == said(whole[0])  # it had ended before
    for answer, complete in zip(answers[1:], whole[1:], strict=True):
        assert answer.finish.reason == "error"
        assert "DeviceLost" in (answer.finish.message or "")
        assert answer.token_ids == complete.token_ids[: len(answer.token_ids)]
    assert fold(list(stream)).finish == answers[1].finish
    with pytest.raises(BackendFailed, match="DeviceLost"):
        llm.generate("a", PLAIN)
    with pytest.raises(BackendFailed, match="DeviceLost"):
        llm.stream("a", PLAIN)


def test_leaving_the_block_closes_the_backend(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    backend = Scripted(llm.spec)
    monkeypatch.setattr("engine.llm.open_backend", lambda _: backend)
    with pytest.raises(KeyError), LLM(settings()):
        raise KeyError
    assert backend.calls == -1
