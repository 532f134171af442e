"""Ctrl-C while the engine works: it takes effect, and costs nothing but the answers it ends."""

from __future__ import annotations

import os
import signal

import pytest

from backend.interface import SamplingParams, StepOutput
from config import BackendSettings, Settings
from engine.interrupts import interrupts_held
from engine.llm import LLM


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_it_is_raised_at_the_end_and_the_handler_is_back() -> None:
    done = []

    def work() -> None:
        with interrupts_held():
            press_ctrl_c()
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_own_is_left_alone() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        with interrupts_held():
            press_ctrl_c()
            assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_an_interrupted_batch_leaves_an_engine_that_answers_as_before(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    with LLM(Settings(backend=BackendSettings(impl="fake"))) as llm:
        (before,) = llm.generate("hello", sampling)
        step, steps = llm.engine.step, 0

        def interrupted(wait: float = 0.0) -> StepOutput:
            nonlocal steps
            steps += 1
            if steps == at:
                press_ctrl_c()
            return step(wait)

        monkeypatch.setattr(llm.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["hello", "there"], sampling, n=2)
        assert steps == at
        (after,) = llm.generate("hello", sampling)
        assert after.text == before.text
        load = llm.engine.load()
        assert (load.running, load.waiting, load.pages_leased) == (0, 0, 0)
