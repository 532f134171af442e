"""Whole models on a CUDA device: a CPU's tokens in float32, nearly its numbers in bfloat16, and the
same bits whatever the company where that is promised.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from backend.hf.attention.choice import ATTENTION
from backend.hf.opening import open_backend
from backend.interface import (
    SamplingParams,
    StepExecutor,
    StepOutput,
    Unsupported,
    Wants,
)
from bench.workloads import reference
from config import Settings, read_settings
from engine.llm import LLM, Answer
from tests.backend.hf.reference import Driver, Schedule, open_scheduler, random_prompts, tiny_sizes

pytestmark = pytest.mark.gpu

SIZES = tiny_sizes(1024)
VOCABULARY = SIZES["vocab_size"]
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=64),
}
SCHEDULES = 4  # of each model
LAYERS = 4  # of the real shape
MOST_ERROR = 0.05  # of a log-probability in bfloat16


def settings(**flags: object) -> Settings:
    """What these flags say, and nothing else does."""
    with pytest.MonkeyPatch.context() as patch:
        for flag, value in flags.items():
            patch.setenv(flag, str(value))
        return read_settings()


@contextmanager
def opened(folder: Path, **flags: object) -> Iterator[LLM]:
    """A model with all its graphs, if it has some. Skips where it cannot run."""
    common = {"DEVICE": "cuda", "MODEL_LOCAL_DIR": folder, "MAX_RUNNING": 16}
    room = {"PAGE_TOKEN_BUDGET": 1 << 15, "MAX_STEP_TOKENS": 4096}
    try:
        llm = LLM(settings(**{**common, **room, **flags}))
    except Unsupported as error:
        if flags.get("ATTN_IMPL") not in ("flash", "flashinfer", "sgl_kernel"):  # want a package
            raise
        pytest.skip(str(error))
    with llm:
        llm.prepare()
        yield llm


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random checkpoint of each architecture."""
    found = {}
    for name, config in MODELS.items():
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
        for parameter in model.parameters():  # biases and norms, too
            torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def shape(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layers of Qwen3-0.6B, to be filled at random."""
    config = json.loads((root / "tests" / "shapes" / "qwen3-0.6b" / "config.json").read_text())
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    return folder


class Impatient(Driver):
    """A scheduler whose clients leave: before each step those who do so then."""

    def __init__(self, executor: StepExecutor) -> None:
        super().__init__(executor)
        self.leaving: dict[int, list[str]] = {}
        self._step_number = 0

    def advance(self, wait: float) -> StepOutput:
        for id in self.leaving.get(self._step_number, ()):
            self.cancel(id)
        self._step_number += 1
        return super().advance(wait)


def open_impatient(folder: Path, schedule: Schedule, graphs: int) -> Impatient:
    flags = settings(
        MODEL_LOCAL_DIR=folder,
        DEVICE="cuda",
        DTYPE="float32",
        ENABLE_CUDA_GRAPH=graphs,
        PAGE_SIZE_TOKENS=schedule.page_tokens,
        PAGE_TOKEN_BUDGET=schedule.pages * schedule.page_tokens,
        MAX_RUNNING=schedule.max_running,
        MAX_STEP_TOKENS=schedule.step_tokens,
    )
    return cast(Impatient, open_backend(flags.backend, Impatient))


def poison(driver: Driver) -> None:
    """What no step has written is NaN: a padding row that reads it, or is read, is seen."""
    for pool in cast(Any, driver.executor)._attention.pools:
        pool.fill_(torch.nan)


@pytest.fixture(scope="module", params=MODELS)
def schedules(
    request: pytest.FixtureRequest, folders: dict[str, Path]
) -> tuple[Path, list[tuple[Schedule, list[tuple[int, ...]]]]]:
    """Of one model: schedules, each with what a CPU answers, one submission at a time."""
    name = request.param
    drawn = [
        Schedule.random(random.Random(f"{name} {seed}"), VOCABULARY) for seed in range(SCHEDULES)
    ]
    with closing(open_scheduler(folders[name])) as cpu:
        answers = [[cpu.answer(each) for each in schedule.submissions] for schedule in drawn]
    return folders[name], list(zip(drawn, answers, strict=True))


@pytest.mark.parametrize("graphs", [0, 1])
def test_any_schedule_with_yields_and_leaving_clients_gives_the_tokens_of_a_cpu(
    graphs: int, schedules: tuple[Path, list[tuple[Schedule, list[tuple[int, ...]]]]]
) -> None:
    folder, cases = schedules
    rng = random.Random(graphs)
    yields = 0
    for schedule, expected in cases:
        ids = [each.id for each in schedule.submissions]
        with closing(open_impatient(folder, schedule, graphs)) as driver:
            assert driver.spec.depth == 2
            poison(driver)
            while driver.prepare():
                pass
            assert driver.answers(schedule) == expected
            yields += driver.load().preemptions
            driver.flush()
            left = rng.sample(ids, 3)
            start = driver._step_number
            for id in left:
                driver.leaving.setdefault(start + rng.randint(5, 60), []).append(id)
            for id, found, whole in zip(ids, driver.answers(schedule), expected, strict=True):
                assert found == (whole[: len(found)] if id in left else whole)
    assert yields > 0


@dataclass(frozen=True, slots=True)
class Scored:
    """Tokens, and the log-probability of each but the first."""

    ids: list[int]
    logprobs: list[float]


def scored(prompt: Sequence[int], answer: Answer) -> Scored:
    scores = [*answer.prompt_logprobs, *answer.logprobs]
    ids = [*prompt, *answer.token_ids]
    assert [score.token for score in scores] == ids[1:]
    return Scored(ids, [score.logprob for score in scores])


@pytest.fixture(scope="module")
def in_float32(shape: Path) -> Iterator[Callable[[list[int]], list[float]]]:
    """Log-probabilities of all tokens but the first, by torch's own kernels."""
    plain = {"ATTN_IMPL": "sdpa", "ENABLE_CUDA_GRAPH": 0, "DTYPE": "float32"}
    wants = Wants(prompt_logprobs_from=0)
    with opened(shape, LOAD_FORMAT="dummy", **plain) as llm:

        def score(ids: list[int]) -> list[float]:
            (answer,) = llm.generate(ids, SamplingParams(max_new_tokens=1), wants=wants)
            return [score.logprob for score in answer.prompt_logprobs]

        yield score


@pytest.mark.parametrize(
    ("attention", "graphs"), [("auto", 0), ("auto", 1), *((name, 1) for name in ATTENTION)]
)
def test_bfloat16_is_near_float32_with_every_attention(
    attention: str, graphs: int, shape: Path, in_float32: Callable[[list[int]], list[float]]
) -> None:
    flags = {"ATTN_IMPL": attention, "ENABLE_CUDA_GRAPH": graphs, "LOAD_FORMAT": "dummy"}
    prompts = [job.prompt for job in reference(1 << 30).first(11).jobs]
    wants = Wants(logprobs=True, prompt_logprobs_from=0)
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True)
    with opened(shape, **flags) as llm:
        assert llm.spec.dtype == "bfloat16"
        answers = llm.generate(prompts, sampling, wants=wants)
    worst = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        found = scored(prompt, answer)
        right = in_float32(found.ids)
        differences = torch.tensor(found.logprobs) - torch.tensor(right)
        assert differences.isfinite().all()
        worst = max(worst, differences.abs().max().item())
    assert worst < MOST_ERROR


def drawn(count: int) -> list[SamplingParams]:
    """Greedy ones, and those that draw in every way."""
    base = SamplingParams(max_new_tokens=30, ignore_eos=True)
    kinds = [
        base,
        replace(base, temperature=0.6),
        replace(base, temperature=1.2, top_k=20, top_p=0.9),
        replace(base, repetition_penalty=1.3, frequency_penalty=0.2),
    ]
    return [kinds[number % len(kinds)] for number in range(count)]


def test_graphs_answer_as_single_launches_do(folders: dict[str, Path]) -> None:
    prompts = random_prompts(random.Random(1), count=13, longest=200, vocabulary=VOCABULARY)
    wants = Wants(logprobs=True, top=2)
    answers = []
    for graphs in (0, 1):
        with opened(folders["qwen3"], DTYPE="float32", ENABLE_CUDA_GRAPH=graphs) as llm:
            answers.append(llm.generate(prompts, drawn(13), seed=5, wants=wants))
    for eager, graph in zip(*answers, strict=True):
        assert eager.token_ids == graph.token_ids
        for one, other in zip(eager.logprobs, graph.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


def bits(answer: Answer) -> list[tuple[int, float]]:
    return [(score.token, score.logprob) for score in answer.logprobs]


def test_deterministic_answers_are_the_same_bits_in_any_company(shape: Path) -> None:
    flags = {"LOAD_FORMAT": "dummy", "DETERMINISTIC": 1}
    prompts = [job.prompt for job in reference(1 << 30).first(13).jobs]
    wants = Wants(logprobs=True)
    sampling = drawn(13)
    with opened(shape, **flags) as llm:
        alone = []
        for prompt, each in zip(prompts, sampling, strict=True):
            llm.engine.flush()
            alone += [bits(llm.generate(prompt, each, seed=5, wants=wants)[0])]
        llm.engine.flush()
        together = llm.generate(prompts, sampling, seed=5, wants=wants)
        cached = llm.generate(prompts, sampling, seed=5, wants=wants)
    assert [bits(answer) for answer in together] == alone
    assert all(answer.cached_tokens for answer in cached)
    assert [bits(answer) for answer in cached] == alone
    with opened(shape, **flags, MAX_STEP_TOKENS=100, ENABLE_CUDA_GRAPH=0) as llm:
        chunked = llm.generate(prompts, sampling, seed=5, wants=wants)
    assert [bits(answer) for answer in chunked] == alone
