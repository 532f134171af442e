"""Each field of SamplingParams and Wants has the effect that it documents, on every backend."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest

from backend.interface import (
    Finish,
    Grammar,
    RequestRefused,
    SamplingParams,
    Wants,
    settled_seed,
)
from backend.tokenizer import open_tokenizer
from tests.conformance.cases import PLAIN, PROMPTS, SAMPLINGS, ask, honoured, varied
from tests.conformance.driver import Driver


def answers(driver: Driver, sampling: SamplingParams) -> list[list[int]]:
    """What `sampling` makes of all prompts. The ids are free again once they have ended."""
    asked = [ask(str(index), prompt, sampling) for index, prompt in enumerate(PROMPTS)]
    return [answer.tokens for answer in driver.run(*asked)]


HOT = replace(PLAIN, temperature=1.0)


def temperature(driver: Driver) -> None:
    greedy = answers(driver, PLAIN)
    assert answers(driver, HOT) != greedy
    assert answers(driver, replace(HOT, temperature=3.0)) != answers(driver, HOT)
    assert answers(driver, replace(HOT, temperature=1e-3)) == greedy


def top_p(driver: Driver) -> None:
    greedy, wild = answers(driver, PLAIN), replace(PLAIN, temperature=3.0)
    assert answers(driver, wild) != greedy
    assert answers(driver, replace(wild, top_p=1e-6)) == greedy
    assert answers(driver, replace(wild, top_p=0.5)) != answers(driver, wild)


def top_k(driver: Driver) -> None:
    greedy, wild = answers(driver, PLAIN), replace(PLAIN, temperature=3.0)
    assert answers(driver, replace(wild, top_k=1)) == greedy
    assert answers(driver, replace(wild, top_k=2)) != answers(driver, wild)
    assert answers(driver, replace(wild, top_k=10**9)) == answers(driver, wild)


def min_p(driver: Driver) -> None:
    greedy, wild = answers(driver, PLAIN), replace(PLAIN, temperature=3.0)
    assert answers(driver, replace(wild, min_p=1.0)) == greedy
    assert answers(driver, replace(wild, min_p=0.6)) != answers(driver, wild)


def frequency_penalty(driver: Driver) -> None:
    assert answers(driver, replace(PLAIN, frequency_penalty=2.0)) != answers(driver, PLAIN)
    assert repeats(driver, frequency_penalty=2.0) < repeats(driver, frequency_penalty=-2.0)


def presence_penalty(driver: Driver) -> None:
    assert answers(driver, replace(PLAIN, presence_penalty=2.0)) != answers(driver, PLAIN)
    assert repeats(driver, presence_penalty=2.0) < repeats(driver, presence_penalty=-2.0)


def repetition_penalty(driver: Driver) -> None:
    assert answers(driver, replace(PLAIN, repetition_penalty=5.0)) != answers(driver, PLAIN)
    assert repeats(driver, repetition_penalty=5.0) < repeats(driver, repetition_penalty=0.2)


def repeats(driver: Driver, **sampling: float) -> int:
    """Tokens that had been drawn before in the same answer."""
    all_tokens = answers(driver, replace(PLAIN, **sampling))  # type: ignore[arg-type]
    return sum(len(tokens) - len(set(tokens)) for tokens in all_tokens)


def logit_bias(driver: Driver) -> None:
    assert answers(driver, replace(PLAIN, logit_bias=((8, 100.0),))) == [[8] * 12] * len(PROMPTS)
    barred = tuple((tokens[0], -100.0) for tokens in answers(driver, PLAIN))
    for tokens in answers(driver, replace(PLAIN, logit_bias=barred)):
        assert not {token for token, _ in barred} & set(tokens)


def max_new_tokens(driver: Driver) -> None:
    for count in (0, 1, 5):
        (answer,) = driver.run(ask(str(count), sampling=replace(PLAIN, max_new_tokens=count)))
        assert len(answer.tokens) == count
        assert answer.finishes == [Finish("length")]
        assert len(answer.cached) == 1


def min_new_tokens(driver: Driver) -> None:
    for least in (0, 1, 7, 12):
        lifted = replace(PLAIN, logit_bias=((8, 100.0),), stop_token_ids=(8,), min_new_tokens=least)
        (answer,) = driver.run(ask(str(least), sampling=lifted))
        assert 8 not in answer.tokens[:least]
        assert len(answer.tokens) == min(least + 1, 12)
        assert answer.finishes == [Finish("length") if least == 12 else Finish("stop", matched=8)]


def stop_token_ids(driver: Driver) -> None:
    (free,) = driver.run(ask("free"))
    for stop in sorted(set(free.tokens)):
        (answer,) = driver.run(ask("stops", sampling=replace(PLAIN, stop_token_ids=(95, stop))))
        assert answer.tokens == free.tokens[: free.tokens.index(stop) + 1]
        assert answer.finishes == [Finish("stop", matched=stop)]


def ignore_eos(driver: Driver) -> None:
    end = driver.spec.stop_ids[0]
    drawn = replace(PLAIN, logit_bias=((end, 100.0),))
    kept, ended = driver.run(
        ask("kept", sampling=drawn), ask("ended", sampling=replace(drawn, ignore_eos=False))
    )
    assert kept.tokens == [end] * 12
    assert (ended.tokens, ended.finishes) == ([end], [Finish("stop", matched=end)])


def grammar(driver: Driver) -> None:
    """It binds any sampling, and nobody else in the batch."""
    pattern, end = "(ab|ba){3}[cd]{2}", driver.spec.stop_ids[0]
    bytes_of = open_tokenizer(driver.spec.folder, driver.spec.vocabulary).bytes_of
    others = varied(driver.spec)
    alone = [answer.tokens for answer in driver.run(*others)]
    bound = [
        ask(f"bound {id}", prompt, replace(sampling, grammar=Grammar("regex", pattern)), seed=id)
        for id, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True))
    ]
    mixed = [each for pair in zip(others, bound, strict=True) for each in pair]
    found = driver.run(*mixed)
    assert [answer.tokens for answer in found[::2]] == alone
    for answer in found[1::2]:
        assert re.fullmatch(pattern, b"".join(map(bytes_of, answer.tokens)).decode())
        assert answer.finishes == [Finish("stop")]
    # the same ones alone
    for one, other in zip(bound, found[1::2], strict=True):
        assert driver.run(one)[0].tokens == other.tokens
    (cut,) = driver.run(replace(bound[0], sampling=replace(bound[0].sampling, max_new_tokens=3)))
    assert (len(cut.tokens), cut.finishes) == (3, [Finish("length")])
    # an end token is drawn where the grammar may end, not before the least length, and it ends
    for least, text in ((0, b"aa"), (5, b"aaaaa")):
        sampling = replace(
            PLAIN, grammar=Grammar("regex", "a{2,}"), logit_bias=((end, 100.0),),
            min_new_tokens=least,
        )  # fmt: skip
        (answer,) = driver.run(ask("ends", sampling=sampling))
        assert b"".join(map(bytes_of, answer.tokens[:-1])) == text
        assert answer.finishes == [Finish("stop", matched=end)]


def logprobs(driver: Driver) -> None:
    """Those of generated tokens are those of the same ids as a prompt, under any sampling."""
    bound = replace(HOT, grammar=Grammar("regex", "[a-z]{12}"))
    for index, asked in enumerate((*SAMPLINGS, bound)):
        sampling = honoured(asked, driver.spec)
        wanted, plain = driver.run(
            ask(f"{index}", sampling=sampling, wants=Wants(logprobs=True)),
            ask(f"{index} plain", sampling=sampling),
        )
        assert wanted.tokens == plain.tokens
        assert not plain.logprobs
        assert [each.token for each in wanted.logprobs] == wanted.tokens
        whole = (*PROMPTS[2], *wanted.tokens)
        wants = Wants(prompt_logprobs_from=len(PROMPTS[2]) - 1)
        (scored,) = driver.run(ask("scored", whole, wants=wants))
        for one, other in zip(wanted.logprobs, scored.prompt_logprobs, strict=True):
            assert one.token == other.token
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def prompt_logprobs_from(driver: Driver) -> None:
    prompt = PROMPTS[4]
    (everything,) = driver.run(ask("all", prompt, wants=Wants(prompt_logprobs_from=0)))
    assert [each.token for each in everything.prompt_logprobs] == list(prompt[1:])
    assert all(each.logprob < 0 for each in everything.prompt_logprobs)
    for start in (0, 7, 8, 22):
        wants = Wants(prompt_logprobs_from=start)
        (answer,) = driver.run(ask(f"from {start}", prompt, wants=wants))
        assert answer.tokens == everything.tokens
        assert answer.cached[0] <= start
        rest = everything.prompt_logprobs[start:]
        for one, other in zip(answer.prompt_logprobs, rest, strict=True):
            assert one.token == other.token
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def top(driver: Driver) -> None:
    wants = Wants(logprobs=True, prompt_logprobs_from=0, top=20)
    (answer,) = driver.run(ask("a", wants=wants))
    for each in (*answer.logprobs, *answer.prompt_logprobs):
        best = [logprob for _, logprob in each.top]
        assert len({token for token, _ in each.top}) == 20
        assert best == sorted(best, reverse=True)
        assert sum(map(math.exp, best)) <= 1 + 1e-5
        assert dict(each.top).get(each.token, each.logprob) == pytest.approx(each.logprob, abs=1e-5)
    for each in answer.logprobs:  # the first one, or as good
        assert each.logprob == pytest.approx(each.top[0][1], abs=1e-5)
    (few,) = driver.run(ask("b", wants=replace(wants, top=2)))
    assert [each.token for each in few.logprobs] == answer.tokens
    assert {len(each.top) for each in (*few.logprobs, *few.prompt_logprobs)} == {2}
    with pytest.raises(RequestRefused, match="no log-probabilities are asked for"):
        Wants(top=2)


def pooling(driver: Driver) -> None:
    """A vector of the prompt, whatever is cached of it."""
    none, prompt = replace(PLAIN, max_new_tokens=0), PROMPTS[4]
    asked = [ask(kind, prompt, none, wants=Wants(pooling=kind)) for kind in ("mean", "last")]
    mean, last = driver.run(*asked)
    for answer, again in zip((mean, last), driver.run(*asked), strict=True):
        assert answer.tokens == []
        assert answer.pooled == pytest.approx(again.pooled, abs=1e-4)
    assert mean.pooled != pytest.approx(last.pooled, abs=1e-4)
    one = [ask(kind, prompt[:1], none, wants=Wants(pooling=kind)) for kind in ("mean", "last")]
    mean, last = driver.run(*one)
    assert mean.pooled == pytest.approx(last.pooled, abs=1e-4)


def progress(driver: Driver) -> None:
    """News of a prompt that takes several steps; nothing else changes."""
    prompt = tuple(range(8, 90)) + PROMPTS[4]
    told, plain = driver.run(
        ask("told", prompt, wants=Wants(progress=True)), ask("plain", prompt[::-1])
    )
    assert told.prefilled == sorted(set(told.prefilled))
    assert 0 < told.prefilled[0] <= told.prefilled[-1] < len(prompt)
    assert plain.prefilled == []
    assert told.tokens == driver.run(ask("again", prompt))[0].tokens


FIELDS: dict[str, Callable[[Driver], None]] = {
    case.__name__: case
    for case in (
        temperature,
        top_p,
        top_k,
        min_p,
        frequency_penalty,
        presence_penalty,
        repetition_penalty,
        logit_bias,
        max_new_tokens,
        min_new_tokens,
        stop_token_ids,
        ignore_eos,
        grammar,
        logprobs,
        prompt_logprobs_from,
        top,
        pooling,
        progress,
    )
}


def refused(driver: Driver, name: str) -> None:
    """A field that the backend lacks is refused by name, as long as it asks for anything."""
    sampling = [field.name for field in fields(SamplingParams)]
    asked = {name: UNUSUAL[name]}
    submission = (
        ask("a", sampling=replace(PLAIN, **asked)) if name in sampling
        else ask("a", sampling=replace(PLAIN, max_new_tokens=0), wants=Wants(**asked))
    )  # fmt: skip
    with pytest.raises(RequestRefused, match=name) as refusal:
        driver.submit(submission)
    assert refusal.value.param == name


UNUSUAL: dict[str, Any] = {  # a value that asks for something, of what some backend lacks
    "min_p": 0.1,
    "frequency_penalty": 1.0,
    "presence_penalty": 1.0,
    "repetition_penalty": 1.5,
    "min_new_tokens": 1,
    "grammar": Grammar("regex", "a"),
    "pooling": "mean",
    "progress": True,
}


@pytest.mark.parametrize(
    "name", [field.name for kind in (SamplingParams, Wants) for field in fields(kind)]
)
def test_each_field_has_the_effect_that_it_documents_or_is_refused(
    driver: Driver, name: str
) -> None:
    assert name in FIELDS, f"{name} is a new field: say in a case here what it does"
    if name in driver.spec.lacks:
        refused(driver, name)
    else:
        FIELDS[name](driver)


def test_a_seed_that_would_not_matter_is_refused(driver: Driver) -> None:
    assert 0 <= settled_seed(None, driver.spec) < 1 << 62
    if "seed" in driver.spec.lacks:
        with pytest.raises(RequestRefused, match="seed"):
            settled_seed(7, driver.spec)
    else:
        assert settled_seed(7, driver.spec) == 7
