"""A stand-in for `sglang.Engine` 0.5.17, exactly as far as `backend/sglang` uses it.

It takes the same arguments and refuses others, has child processes of its own that must live, and
says what SGLang says, in its words and in its order: bursts that are put together when nobody
listens, the echo of an abort with tokens that nobody wants, refusals as exceptions or as an abort
with a status, a start that fails in a child. `Script` says what goes wrong, and when.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from backend.fake_model import FakeModel
from backend.sglang.runtime import Sglang
from tests.backend.sglang.scheduler_double import Req, Sampling, Scheduler

OPENING = "engine.opening.find_spec"
LOADING = "backend.sglang.bridge.load_sglang"
MEASURED_TOKENS = 4096  # of the pool, where nothing is asked for

# Of ServerArgs, those that the adapter gives; any other is a TypeError as it is there.
ARGUMENTS = {
    "model_path", "skip_tokenizer_init", "incremental_streaming_output", "batch_notify_size",
    "load_format", "dtype", "trust_remote_code", "context_length", "tp_size", "attention_backend",
    "disable_cuda_graph", "enable_torch_compile", "enable_deterministic_inference",
    "mem_fraction_static", "max_total_tokens", "page_size", "disable_radix_cache",
    "max_running_requests", "chunked_prefill_size", "log_level",
}  # fmt: skip


@dataclass
class Script:
    """What happens."""

    start_words: str = ""  # a child says this and ends, and the start fails
    step_s: float = 0.0
    quiet_steps: int = 0  # after each step that was heard, so many are not: they come as one burst
    late_steps: int = 0  # so many more after the one that an abort meets
    refuse: Callable[[dict[str, Any]], Exception | None] = lambda fields: None
    fail_at_step: int = 0  # the scheduler raises
    engines: list[Engine] = field(default_factory=list)  # those that were started


@dataclass(frozen=True)
class Request:
    """Of GenerateReqInput, what the adapter gives."""

    rid: str
    input_ids: list[int]
    sampling_params: dict[str, Any]
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    extra_key: str | None = None


@dataclass(eq=False)
class State:
    """`ReqState`."""

    stream: bool
    out_list: list[dict[str, Any]] = field(default_factory=list)
    event: asyncio.Event = field(default_factory=asyncio.Event)
    finished: bool = False
    sent: int = 0  # tokens told


@dataclass(frozen=True)
class ModelConfig:
    context_len: int
    vocab_size: int
    hf_eos_token_id: set[int]
    dtype: str


@dataclass(frozen=True)
class Flushed:
    success: bool


class TokenizerManager:
    """Requests by their id, and the loop that hands out what the scheduler says."""

    def __init__(self, engine: Engine, model: ModelConfig, scheduler: Scheduler) -> None:
        self.model_config = model
        self._engine = engine
        self._scheduler = scheduler
        self._states: dict[str, State] = {}
        self._stirred = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._steps = 0
        self._late: dict[str, int] = {}

    def _start_loop(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._handle_loop())

    async def get_internal_state(self) -> list[dict[str, Any]]:
        self._start_loop()
        pool = self._scheduler.cache.pool.size * self._scheduler.cache.page_tokens
        given = self._engine.arguments
        return [
            {
                **given,
                "attention_backend": given["attention_backend"] or "fa3",
                "memory_usage": {"token_capacity": pool},
                "effective_max_running_requests_per_dp": self._scheduler.rows,
            }
        ]

    async def flush_cache(self, timeout_s: float | None = None) -> Flushed:
        for _ in range(int((timeout_s or 0.0) * 1000)):
            if self._scheduler.idle:
                break
            await asyncio.sleep(0.001)
        if self._scheduler.idle:
            self._scheduler.cache.flush()
        return Flushed(self._scheduler.idle)

    def abort_request(self, rid: str) -> None:
        if not rid or rid not in self._states:
            return
        self._late[rid] = self._engine.script.late_steps
        if not self._late[rid]:
            self._abort_now(rid)

    def _abort_now(self, rid: str) -> None:
        for req in self._scheduler.abort(rid):
            state = self._states.pop(req.rid)
            state.finished = True
            reason = {"type": "abort", "message": "Abort in waiting queue"}
            meta = {"id": req.rid, "finish_reason": reason, "completion_tokens": len(req.out)}
            state.out_list.append({"text": "", "output_ids": req.out[-1:], "meta_info": meta})
            state.event.set()

    async def generate_request(
        self, request: Request, http: None = None
    ) -> AsyncIterator[dict[str, Any]]:
        self._start_loop()
        if request.rid in self._states:
            raise ValueError(f"Duplicate request ID detected: {request.rid}")
        state = self._states[request.rid] = State(request.stream)
        try:
            self._scheduler.queue.append(self._tokenized(request))
        except BaseException:
            del self._states[request.rid]
            raise
        self._stirred.set()
        while True:
            await state.event.wait()
            chunks, state.out_list = state.out_list, []
            finished = state.finished
            state.event.clear()
            yield coalesced(chunks) if state.stream else chunks[-1]
            if finished:
                return

    def _tokenized(self, request: Request) -> Req:
        """Raises ValueError or TypeError, as its validation does."""
        refusal = self._engine.script.refuse(vars(request))
        if refusal is not None:
            raise refusal
        prompt, context = len(request.input_ids), self.model_config.context_len
        sampling = Sampling(**request.sampling_params)
        sampling.verify(self.model_config.vocab_size)
        if prompt >= context:
            raise ValueError(f"The input ({prompt} tokens) is longer than the context length")
        if prompt + sampling.max_new_tokens > context:
            raise ValueError("Requested token count exceeds the model's maximum context length")
        req = Req(
            request.rid,
            list(request.input_ids),
            sampling,
            request.extra_key or "",
            request.return_logprob,
            request.logprob_start_len,
            request.top_logprobs_num,
            self._scheduler.limit(prompt, sampling.max_new_tokens, context),
        )
        pool = self._scheduler.cache.pool.size * self._scheduler.cache.page_tokens
        if prompt >= min(context, pool) - 1 - 5:  # `max_req_input_len`
            req.prompt, req.logprob_start = [0], -1
            req.to_finish = {
                "type": "abort",
                "message": "Input length exceeds the maximum allowed length",
                "status_code": 400,
                "err_type": "BadRequestError",
            }
        return req

    async def _handle_loop(self) -> None:
        while True:
            if self._scheduler.idle or not self._engine.alive:
                self._stirred.clear()
                await self._stirred.wait()
                continue
            self._steps += 1
            try:
                if self._steps == self._engine.script.fail_at_step:
                    raise RuntimeError("CUDA error: an illegal memory access was encountered")
                news = self._scheduler.step()
            except Exception as error:
                self._engine.fail(error)
                continue
            self._output(news)
            for rid in [rid for rid, left in self._late.items() if not left]:
                del self._late[rid]
                self._abort_now(rid)
            self._late = {rid: left - 1 for rid, left in self._late.items()}
            await asyncio.sleep(self._engine.script.step_s)

    def _output(self, news: Iterable[Req]) -> None:
        """`_handle_batch_output`. Bursts: the events of some steps are not set."""
        loud = not self._steps % (self._engine.script.quiet_steps + 1)
        for req in news:
            state = self._states.get(req.rid)
            if state is None:
                continue
            state.finished = req.finish is not None
            if state.stream or state.finished:
                state.out_list.append(self._chunk(req, state))
                state.sent = len(req.out)
            if state.finished:
                del self._states[req.rid]
            if state.out_list and (loud or state.finished):
                state.event.set()

    def _chunk(self, req: Req, state: State) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": req.rid,
            "finish_reason": req.finish,
            "prompt_tokens": len(req.prompt),
            "num_retractions": req.retractions,
            "completion_tokens": len(req.out),
            "cached_tokens": req.cached,
        }
        if req.logprobs:
            new = req.out_scores[state.sent : max(len(req.out), 1)]
            meta["output_token_logprobs"] = [score for score, _ in new]
            meta["input_token_logprobs"] = [score for score, _ in req.prompt_scores or ()]
            if req.top:
                meta["output_top_logprobs"] = [top for _, top in new]
                meta["input_top_logprobs"] = [top for _, top in req.prompt_scores or ()]
        return {"output_ids": req.out[state.sent :], "meta_info": meta}


def coalesced(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """`_coalesce_streaming_chunks`."""
    meta = dict(chunks[-1]["meta_info"])
    for key in ("output_token_logprobs", "output_top_logprobs"):
        if any(key in chunk["meta_info"] for chunk in chunks):
            meta[key] = [each for chunk in chunks for each in chunk["meta_info"].get(key, ())]
    ids = [id for chunk in chunks for id in chunk["output_ids"]]
    return {**chunks[-1], "output_ids": ids, "meta_info": meta}


class Engine:
    """Two children: one that says what it is told to, one that only has to live."""

    def __init__(self, script: Script, **arguments: Any) -> None:
        for name in arguments:
            if name not in ARGUMENTS:
                raise TypeError(
                    f"ServerArgs.__init__() got an unexpected keyword argument {name!r}"
                )
        self.script = script
        self.arguments = arguments
        self.shut = False
        model, scheduler = self._load()
        os.environ["SGLANG_RUN_ID"] = "sglang-run"  # and more, for the whole process
        multiprocessing.set_start_method("spawn", force=True)
        logging.basicConfig(level=logging.ERROR, force=True)
        self._scheduler = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=2)
        self._detokenizer = subprocess.Popen(["sleep", "600"])
        script.engines.append(self)
        if script.start_words:
            self.say(script.start_words)
            code = self._end_scheduler()
            raise RuntimeError(
                f"Rank 0 scheduler died during initialization (exit code: {code}). If exit code is "
                "-9 (SIGKILL), a common cause is the OS OOM killer."
            )
        self.tokenizer_manager = TokenizerManager(self, model, scheduler)

    def _load(self) -> tuple[ModelConfig, Scheduler]:
        """Raises what ServerArgs and ModelConfig raise."""
        given, folder = self.arguments, Path(self.arguments["model_path"])
        config = json.loads((folder / "config.json").read_text())
        size, chunk = given["page_size"], given["chunked_prefill_size"]
        assert chunk % size == 0, "chunked_prefill_size must be divisible by page_size"
        own, asked = config["max_position_embeddings"], given["context_length"]
        if asked is not None and asked > own:
            raise ValueError(
                f"Warning: User-specified context_length ({asked}) is greater than the derived "
                f"context_length ({own}). This may lead to incorrect model outputs or CUDA errors."
            )
        generation = folder / "generation_config.json"
        ends = [config.get("eos_token_id")]
        if generation.is_file():
            ends.append(json.loads(generation.read_text()).get("eos_token_id"))
        eos = {
            id
            for end in ends
            if end is not None
            for id in (end if isinstance(end, list) else [end])
        }
        vocabulary = config["vocab_size"]
        model = FakeModel(vocabulary, min(eos, default=None), (range(vocabulary),) * 2)
        scheduler = Scheduler(
            model,
            frozenset(eos),
            (given["max_total_tokens"] or MEASURED_TOKENS) // size,
            size,
            given["max_running_requests"],
            chunk,
            not given["disable_radix_cache"],
            given["enable_deterministic_inference"],
            os.environ.get("SGLANG_RETURN_ORIGINAL_LOGPROB") == "1",
        )
        dtype = "bfloat16" if given["dtype"] == "auto" else given["dtype"]
        return ModelConfig(asked or own, vocabulary, eos, f"torch.{dtype}"), scheduler

    @property
    def alive(self) -> bool:
        return self._scheduler.poll() is None and self._detokenizer.poll() is None

    def say(self, words: str) -> None:
        """Let the scheduler write to its stderr."""
        assert self._scheduler.stdin is not None
        self._scheduler.stdin.write(words.encode())
        self._scheduler.stdin.flush()

    def _end_scheduler(self) -> int:
        assert self._scheduler.stdin is not None
        self._scheduler.stdin.close()
        return self._scheduler.wait()

    def fail(self, error: Exception) -> None:
        """An exception in the scheduler: it is logged, the parent gets a signal, and it ends."""
        trace = 'Traceback (most recent call last):\n  File "scheduler.py", line 1, in run\n'
        said = f"{trace}{type(error).__name__}: {error}\n\n"
        self.say(f"[2026-11-01 00:00:00] Scheduler hit an exception: {said}")
        os.kill(os.getpid(), signal.SIGQUIT)
        self._end_scheduler()

    def get_all_child_pids(self) -> list[int]:
        return [self._scheduler.pid, self._detokenizer.pid]

    async def async_generate(
        self, *, input_ids: list[int], sampling_params: dict[str, Any], stream: bool = False
    ) -> Any:
        """All at once, or as a generator."""
        rid = f"direct-{id(input_ids)}"
        made = self.tokenizer_manager.generate_request(
            Request(rid, input_ids, sampling_params, stream=stream)
        )
        return made if stream else await made.__anext__()

    def shutdown(self) -> None:
        self.shut = True
        assert self._scheduler.stdin is not None
        self._scheduler.stdin.close()


def stand_in(patch: pytest.MonkeyPatch, **happens: Any) -> Script:
    """Let BACKEND_IMPL=sglang start this in place of SGLang."""
    script = Script(**happens)
    patch.setattr(OPENING, lambda name: object())
    patch.setattr(LOADING, lambda: Sglang(partial(Engine, script), Request))
    return script
