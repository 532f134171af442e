"""transformers' continuous batching, run on an order from stdin: `python -m
bench.transformers_peer`.

`generate_batch` has one length for all its requests, so this goes through what it wraps, the
manager, and gives each request its own. The cache is sized for the order instead of a share of all
memory, in pages that were a little faster than the default on a CPU; the rest is what transformers
chooses by itself for sdpa.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, fields
from typing import Any

import torch
import transformers

from bench.comparison import Order, Outcome

PAGE_TOKENS = 32
NO_END = -1  # an end id that is never drawn
WARM_PROMPT, WARM_NEW = 32, 4  # tokens

library: Any = transformers  # most of what is used here has no types


def best_dtype(device: str) -> torch.dtype:
    """bfloat16, but float32 on a processor that has to emulate it."""
    emulated = device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if emulated else torch.bfloat16


def load(order: Order, dtype: torch.dtype) -> Any:
    """The model of the folder, on the device."""
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    auto = library.AutoModelForCausalLM
    if order.made_up:
        model = auto.from_config(library.AutoConfig.from_pretrained(order.folder), **options)
    else:
        model = auto.from_pretrained(order.folder, **options)
    return model.eval().to(order.device)


def manager_of(model: Any, order: Order) -> Any:
    """A running manager with room for all requests at once, as a context."""
    blocks = sum(-(-(len(prompt) + new) // PAGE_TOKENS) for prompt, new in order.jobs)
    kind = library.ContinuousBatchingConfig
    known = {field.name for field in fields(kind)}
    return model.continuous_batching_context_manager(
        generation_config=library.GenerationConfig(
            do_sample=order.temperature > 0,
            temperature=order.temperature or None,
            eos_token_id=NO_END,
        ),
        continuous_batching_config=kind(
            PAGE_TOKENS,  # by place: its name differs between releases
            num_blocks=blocks,
            max_requests_per_batch=len(order.jobs),
            **{name: False for name in ("auto_switch_to_flash",) if name in known},
        ),
    )


def run(manager: Any, jobs: list[tuple[list[int], int]]) -> float:
    """Seconds from the first submission to the last end. Every answer has its full length.

    Raises RuntimeError when a request fails or the manager ends early.
    """
    start = time.perf_counter()
    for prompt, new in jobs:
        manager.add_request(prompt, max_new_tokens=new, eos_token_id=NO_END)
    missing = sum(new for _, new in jobs)
    for _ in jobs:
        missing -= len(next_result(manager).generated_tokens)
    if missing:
        raise RuntimeError(f"{missing} tokens are missing")
    return time.perf_counter() - start


def next_result(manager: Any) -> Any:
    """The next finished request. Raises RuntimeError when it failed or none will come."""
    while (result := manager.get_result(timeout=1)) is None:
        if not manager.is_running():
            raise RuntimeError("the generation thread has ended")
    if result.error is not None:
        raise RuntimeError(result.error)
    return result


def main() -> None:
    """Read the order, warm up, measure, write the outcome."""
    order = Order(**json.load(sys.stdin))
    dtype = best_dtype(order.device)
    model = load(order, dtype)
    durations = []
    for _ in range(order.repeat):
        with manager_of(model, order) as manager:  # a new one, so that no prefix is cached
            run(manager, [(prompt[:WARM_PROMPT], WARM_NEW) for prompt, _ in order.jobs])
            durations.append(run(manager, order.jobs))
    outcome = Outcome(
        name=f"transformers {transformers.__version__} continuous batching, "
        f"{str(dtype).removeprefix('torch.')}, sdpa",
        output_tokens=sum(new for _, new in order.jobs),
        durations_s=durations,
    )
    sys.stdout.write(json.dumps(asdict(outcome)) + "\n")


if __name__ == "__main__":
    main()
