"""What is used of SGLang: the only place that imports it. Versions 0.5.17 to 0.5.22.

Its import sets a policy for all event loops of the process, so it is for engine processes alone.
"""

from __future__ import annotations

import atexit
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from backend.interface import Unsupported
from config import get_device


class ModelConfig(Protocol):
    """What SGLang has read from the model's folder."""

    @property
    def context_len(self) -> int:
        """Positions."""

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""

    @property
    def hf_eos_token_id(self) -> set[int] | None:
        """Those of config.json and of generation_config.json, together."""

    @property
    def dtype(self) -> Any:
        """A torch.dtype."""


class FlushResult(Protocol):
    """Of an attempt to empty the cache."""

    @property
    def success(self) -> bool:
        """Whether it is empty."""


class TokenizerManager(Protocol):
    """Takes requests and hands out what its scheduler sends. All of it on one event loop."""

    @property
    def model_config(self) -> ModelConfig:
        """Of the model that it serves."""

    def generate_request(self, request: Any, http: None = None) -> AsyncIterator[dict[str, Any]]:
        """What comes of a request: `output_ids` new since the last time, and `meta_info`."""

    def abort_request(self, rid: str) -> None:
        """End a request, and each whose id begins with `rid`. An unknown one is ignored."""

    async def flush_cache(self, timeout_s: float | None = None) -> FlushResult:
        """Empty the cache as soon as nothing runs, but no later than that."""

    async def get_internal_state(self) -> list[dict[str, Any]]:
        """The resolved arguments and what the scheduler has; one for each data-parallel rank."""


class Engine(Protocol):
    """`sglang.Engine`: the tokenizer manager in this process, the others in processes of theirs."""

    @property
    def tokenizer_manager(self) -> TokenizerManager:
        """Its part in this process."""

    def get_all_child_pids(self) -> list[int]:
        """The processes that must live for it to work."""

    async def async_generate(
        self, *, input_ids: list[int], sampling_params: dict[str, Any], stream: bool = False
    ) -> Any:
        """A whole answer, or an async iterator of what comes of it. For benchmarks."""

    def shutdown(self) -> None:
        """Let go of what it holds in this process."""


@dataclass(frozen=True, slots=True)
class Sglang:
    """The parts of the package that are called by name."""

    engine: Callable[..., Engine]  # starts one; the arguments are those of ServerArgs
    request: Callable[..., Any]  # makes what `generate_request` takes


def load_sglang() -> Sglang:
    """Import SGLang. Raises Unsupported where there is no CUDA device."""
    device = get_device()
    if device != "cuda":
        raise Unsupported(
            f"BACKEND_IMPL=sglang needs a CUDA device, and torch sees {device} alone: "
            "use BACKEND_IMPL=hf"
        )
    # not from `sglang` itself, which has a stand-in there that loads it late
    from sglang.srt.entrypoints.engine import Engine as SglangEngine
    from sglang.srt.managers.io_struct import GenerateReqInput

    class OwnedEngine(SglangEngine):  # type: ignore[misc]  # sglang is not typed
        """SGLang's engine, but for its end."""

        def shutdown(self) -> None:
            """As it comes this kills every child of the process, also those that are none of its
            own. Ours are ended by their keeper (`backend/sglang/keeper.py`).
            """
            atexit.unregister(self.shutdown)
            manager = self.tokenizer_manager
            if manager is not None and manager._subprocess_watchdog is not None:
                manager._subprocess_watchdog.stop()
            sender = getattr(self, "send_to_rpc", None)  # not there when the start failed
            if sender is not None:
                sender.close(linger=0)

    return Sglang(OwnedEngine, GenerateReqInput)
