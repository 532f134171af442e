"""SGLang itself behind our backend, on a CUDA device: the conformance cases over one engine with a
tiny model, then a server with the small real one.

A start takes a minute, so there are two, and what wants an engine of its own is skipped. Run by
itself: `python -m pytest tests/end_to_end/test_sglang_gpu.py -s`. Beside other tests, which take
memory while SGLang measures it, everything here is skipped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest

from backend.interface import (
    Backend,
    DeviceLost,
    SamplingParams,
    StartFailed,
    Submission,
    Wants,
)
from bench.server_process import own_server
from config import (
    BackendSettings,
    BatchSettings,
    CacheSettings,
    DeviceSettings,
    ModelSettings,
)
from engine.opening import open_backend
from tests.conformance.cases import PROMPTS, SHAPE, Alone, Opener, ask
from tests.conformance.driver import Answer, Driver
from tests.conformance.test_backends import (  # noqa: F401
    test_a_burst_is_answered_in_the_order_it_came,
    test_a_cancel_at_any_moment_ends_one_answer_and_leaves_the_others,
    test_a_greedy_answer_is_that_of_one_token_at_a_time,
    test_a_resumed_answer_goes_on_as_if_nothing_had_happened,
    test_a_seed_decides_the_answer_and_another_seed_another,
    test_a_seed_does_not_matter_to_a_greedy_answer,
    test_an_idle_backend_has_nothing_to_say_and_does_not_block,
    test_answers_of_a_group_compute_their_prompt_once,
    test_cancelling_the_unknown_and_the_ended_changes_nothing,
    test_flushing_gives_up_what_was_cached,
    test_namespaces_share_no_prefix,
    test_no_answer_depends_on_a_cache_hit,
    test_no_answer_depends_on_its_company,
    test_warming_up_leaves_no_trace,
)
from tests.conformance.test_fields import (  # noqa: F401
    test_a_seed_that_would_not_matter_is_refused,
    test_each_field_has_the_effect_that_it_documents_or_is_refused,
)
from tests.end_to_end.gpu_processes import alive, eventually, runtimes, say, used_mib

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("sglang") is None, reason="SGLang is not installed"),
    pytest.mark.skipif(
        "PYTEST_XDIST_WORKER" in os.environ, reason="SGLang measures memory: run this file alone"
    ),
]

# As SGLang's kernels want it: heads of 64, everything a multiple of 16.
TINY: dict[str, Any] = {
    **SHAPE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
SHARED: dict[str, Any] = {
    "pages": 64, "page_tokens": 4, "max_running": 8, "max_step_tokens": 64, "prefix": True,
}  # fmt: skip
ANSWER_S = 60.0  # that an answer may take
CLEAR_GAP = 0.1  # between the two best logits: below it a rounding may decide
LEFT_MIB = 300  # of the device's memory, that others may have taken meanwhile


@pytest.fixture(scope="module")
def before() -> int:
    """MiB in use before anything here was started."""
    return used_mib()


# The conformance cases over one engine


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint, in float16: in bfloat16 logits tie."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**TINY))
    model.to(torch.float16).save_pretrained(folder)
    return folder


def tiny_settings(folder: Path, **flags: Any) -> BackendSettings:
    pages, size = SHARED["pages"], SHARED["page_tokens"]
    return BackendSettings(
        impl="sglang",
        model=ModelSettings(local_dir=str(folder), dtype="float16"),
        device=DeviceSettings(deterministic=True, memory_fraction=0.5, **flags),
        cache=CacheSettings(page_tokens=size, budget_tokens=pages * size),
        batch=BatchSettings(
            max_running=SHARED["max_running"], max_step_tokens=SHARED["max_step_tokens"]
        ),
    )


@pytest.fixture(scope="module")
def ends() -> list[Backend]:
    """What is open, and to be closed by whoever takes it out."""
    return []


@pytest.fixture(scope="module")
def engine(tiny: Path, before: int, ends: list[Backend]) -> Iterator[Backend]:
    begun = time.monotonic()
    backend = open_backend(tiny_settings(tiny))
    say(f"SGLang started in {time.monotonic() - begun:.0f} s: {backend.spec}")
    ends.append(backend)
    yield backend
    for each in ends:
        each.close()


class Uncached(Driver):
    """Every submission has a namespace of its own, so that nothing is answered by the cache."""

    numbers = count()

    def submit(self, submission: Submission) -> None:
        super().submit(replace(submission, namespace=f"{next(self.numbers)}"))


@pytest.fixture
def opened(engine: Backend) -> Iterator[Opener]:
    """Drivers of the one engine, whose limits stand for lower ones; other pages are skipped."""
    drivers: list[Driver] = []

    def open_one(**knobs: Any) -> Driver:
        others = {name for name, value in knobs.items() if SHARED[name] != value}
        if others & {"pages", "page_tokens"}:
            pytest.skip(f"{knobs} wants an engine of its own, and a start takes a minute")
        drivers.append((Uncached if "prefix" in others else Driver)(engine))
        return drivers[-1]

    yield open_one
    for driver in drivers:
        driver.drain()
        assert all(len(answer.finishes) == 1 for answer in driver.answers.values())
    engine.flush()
    load = engine.load()
    assert load.pages_free == load.pages_total


@pytest.fixture
def driver(opened: Opener) -> Driver:
    return opened()


@pytest.fixture(scope="module")
def known() -> dict[Submission, Answer]:
    return {}


@pytest.fixture
def alone(opened: Opener, known: dict[Submission, Answer]) -> Alone:
    """What a submission is answered by an engine that does nothing else and caches nothing."""

    def answer(submission: Submission) -> Answer:
        if submission not in known:
            (known[submission],) = opened(prefix=False).run(submission)
        return known[submission]

    return answer


def test_an_answer_is_cached_for_the_turn_behind_it(alone: Alone, driver: Driver) -> None:
    """As far as SGLang has computed it, which may be the last token, too: it runs ahead."""
    (first,) = driver.run(ask("first", PROMPTS[1]))
    turn = (*PROMPTS[1], *first.tokens, 9, 9)
    (second,) = driver.run(ask("second", turn))
    assert second.cached[0] in (12, 16)
    assert second.tokens == alone(ask("a", turn)).tokens


def test_log_probabilities_are_those_of_the_raw_logits_under_any_bias(driver: Driver) -> None:
    """In its own words: how far two ways to the same number are apart, by SGLang's kernels."""
    worst = 0.0
    biased = SamplingParams(max_new_tokens=12, ignore_eos=True, logit_bias=((8, 3.0),))
    for sampling in (replace(biased, logit_bias=()), replace(biased, temperature=0.7), biased):
        wants = Wants(logprobs=True, top=2)
        (told,) = driver.run(ask(f"{sampling}", PROMPTS[4], sampling, wants=wants))
        whole = (*PROMPTS[4], *told.tokens)
        wants = Wants(prompt_logprobs_from=len(PROMPTS[4]) - 1)
        (scored,) = driver.run(ask("scored", whole, wants=wants))
        for one, other in zip(told.logprobs, scored.prompt_logprobs, strict=True):
            worst = max(worst, abs(one.logprob - other.logprob))
    say(f"log-probabilities of a decode and of a prompt differ by {worst:.2e} at most")
    assert worst < 0.02


def test_a_start_that_fails_in_a_process_of_its_own_is_told_in_one_line(
    tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    config = json.loads((tiny / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    weights = (tiny / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(StartFailed) as failure:
        open_backend(tiny_settings(folder))
    say(f"a broken checkpoint: {failure.value}")
    assert str(failure.value).startswith("SGLang does not start: ")
    assert "\n" not in str(failure.value)
    assert "scheduler died" not in str(failure.value), "the root cause, not its consequence"


def test_a_process_that_is_killed_is_noticed_and_nothing_of_it_is_left(
    engine: Backend, ends: list[Backend], before: int
) -> None:
    """The last of the shared engine."""
    driver = Driver(engine)
    driver.submit(ask("a", sampling=SamplingParams(max_new_tokens=80, ignore_eos=True)))
    driver.advance()
    ours = {process.pid for process in runtimes()}
    victim = next(each for each in runtimes() if "scheduler" in " ".join(each.cmdline()))
    begun = time.monotonic()
    victim.kill()
    with closing(ends.pop()), pytest.raises(DeviceLost) as lost:
        driver.drain()
    say(f"noticed, and all closed, in {time.monotonic() - begun:.2f} s: {lost.value}")
    assert time.monotonic() - begun < 10
    assert not [pid for pid in ours if alive(pid)]
    # our own process may have made a context of its own
    import torch

    own = 0 if not torch.cuda.is_initialized() else 700
    eventually(lambda: used_mib() < before + LEFT_MIB + own, f"{used_mib()} MiB are in use")


# A server with the small real model


@pytest.fixture(scope="module")
def server(small_model: Path, before: int) -> Iterator[str]:
    """Its address."""
    begun = time.monotonic()
    flags = {
        "BACKEND_IMPL": "sglang",
        "MODEL_LOCAL_DIR": str(small_model),
        "DTYPE": "float16",  # a step between two logits of bfloat16 is larger than CLEAR_GAP
        "PAGE_TOKEN_BUDGET": str(1 << 15),
        "MEMORY_FRACTION": "0.4",
        "MAX_RUNNING": "16",
        "REPLICAS": "1",
    }
    with own_server(**flags) as url:
        say(f"a server over SGLang started in {time.monotonic() - begun:.0f} s")
        yield url


def post(url: str, body: dict[str, Any]) -> Any:
    """The response to `/generate`, to be read line by line. Raises HTTPError."""
    request = Request(f"{url}/generate", json.dumps(body).encode())
    return urlopen(request, timeout=ANSWER_S)


def ask_whole(url: str, body: dict[str, Any]) -> dict[str, Any]:
    with post(url, body) as response:
        found: dict[str, Any] = json.load(response)
    return found


def test_a_stream_of_the_real_server_is_the_whole_answer_in_pieces(server: str) -> None:
    body = {"prompt": "The capital of France is", "max_new_tokens": 16}
    with post(server, body) as stream:
        lines = [json.loads(line) for line in stream]
    whole = ask_whole(server, {**body, "stream": False})
    assert "".join(line.get("text_delta", "") for line in lines) == whole["text"]
    assert " Paris" in whole["text"]
    assert lines[-1]["event"] == "done"
    assert len(lines) > 8, "it came in pieces"


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 1), ("frequency_penalty", 0.5), ("regex", "a+")]
)
def test_a_field_that_sglang_cannot_honour_is_a_400_that_says_so(
    server: str, name: str, value: object
) -> None:
    with pytest.raises(HTTPError, match="400") as refusal:
        post(server, {"prompt": "a", "max_new_tokens": 1, name: value})
    say(json.load(refusal.value)["error"]["message"])


PROMPTS_OF_WORDS = (
    "The capital of France is",
    "Once upon a time there was a small dragon who",
    "The first ten prime numbers are 2, 3, 5,",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "Dear Sir or Madam,\n\nI am writing to",
)


def tokenized(url: str, words: str) -> list[int]:
    request = Request(f"{url}/tokenize", json.dumps({"prompt": words}).encode())
    with urlopen(request, timeout=ANSWER_S) as response:
        found: list[int] = json.load(response)["tokens"]
    return found


def best_two(url: str, ids: list[int], found: list[int]) -> list[list[tuple[float, int]]]:
    """(log-probability, token) of the two best at each position of `found` behind `ids`."""
    body = {
        "input_ids": [*ids, *found],
        "sampling_params": {"temperature": 0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": len(ids) - 1,
        "top_logprobs_num": 2,
    }
    tops = ask_whole(url, body)["meta_info"]["input_top_logprobs"]
    return [[(logprob, token) for logprob, token, *_ in each] for each in tops[-len(found) :]]


def test_greedy_answers_are_the_native_ones_wherever_the_choice_is_clear(
    server: str, small_model: Path
) -> None:
    """Each token that SGLang chose is the best one of our own model code after the same tokens."""
    sampling = {"temperature": 0, "max_new_tokens": 48, "ignore_eos": True}
    clear = unclear = 0
    flags = {
        "BACKEND_IMPL": "hf",
        "MODEL_LOCAL_DIR": str(small_model),
        "DTYPE": "float32",
        "PAGE_TOKEN_BUDGET": str(1 << 13),
        "REPLICAS": "1",
    }
    with own_server(**flags) as native:
        for words in PROMPTS_OF_WORDS:
            ids = tokenized(native, words)
            found = ask_whole(server, {"input_ids": ids, "sampling_params": sampling})["output_ids"]
            assert len(found) == 48
            for token, top in zip(found, best_two(native, ids, found), strict=True):
                (first, best), (second, _) = top
                if first - second <= CLEAR_GAP:
                    unclear += 1
                    continue
                clear += 1
                assert token == best, f"{words!r}: {token} for {best}, {first - second:.3f} ahead"
    say(f"greedy: {clear} clear choices agree, {unclear} were too close to tell")
    assert clear > 5 * unclear


def is_worker(process: psutil.Process) -> bool:
    try:
        return "engine.worker" in " ".join(process.cmdline())
    except psutil.ZombieProcess:
        return False


def test_nothing_of_it_outlives_an_engine_that_is_killed(server: str, before: int) -> None:
    """The last of the server: it and its engine are killed while it answers."""
    body = {"prompt": "Once upon a time", "max_new_tokens": 2000, "ignore_eos": True}
    with post(server, body) as stream:
        next(iter(stream))
        below = psutil.Process().children(recursive=True)
        (worker,) = [each for each in below if is_worker(each)]
        front, ours = worker.parent(), worker.children(recursive=True)  # SGLang's, and their keeper
        assert front is not None
        assert len(ours) >= 3
        begun = time.monotonic()
        worker.kill()
        front.kill()
    gone = [each.pid for each in (*ours, worker)]
    eventually(lambda: not any(map(alive, gone)), f"{gone} are not gone")
    say(f"all {len(gone)} processes gone after {time.monotonic() - begun:.1f} s")
    eventually(lambda: used_mib() < before + LEFT_MIB, f"{used_mib()} MiB are in use")
