"""`python -m engine.plan`: what a model would take of a device, before anything is loaded.

Reads the config.json and the headers of the weight files, with the flags of a start, and says how
many pages would be made and how many sequences they hold. The exit code is 1 when nothing fits.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import psutil

from backend.hf.forecast import (
    DRIVER,
    LIBRARIES,
    CudaMemory,
    Formats,
    Peak,
    Room,
    count_tokens,
    cpu_room,
    cuda_room,
    expect_peak,
    kv_token_bytes,
    mib,
    parameters,
    rotation_table,
    weight_memory,
)
from backend.hf.loading.outline import outline
from backend.hf.loading.resolve import context_length
from backend.hf.models.registry import architecture, decoder_shape
from backend.hf.precision import Precision, choose_precision
from backend.interface import EngineError, StartFailed, Unsupported
from config import (
    BackendSettings,
    BatchSettings,
    ConfigError,
    get_device,
    read_settings,
    resolve_limits,
)

LENGTHS = (1024, 4096)  # of sequences that are counted, besides the context
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{unit}i": 1 << 10 * power for power, unit in enumerate(UNITS) if unit}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a start would find. Sizes are bytes."""

    model: str
    architecture: str
    device: str
    memory: int  # of the device; on a CPU what is free
    used: int  # of it, before the weights
    dtype: str
    parameters: int
    stored: Mapping[str, int]  # the weight files by dtype; empty: unseen
    weights: Mapping[str, int]  # the same on the device
    kv_bytes_per_token: int
    context: int
    limits: BatchSettings
    peak: Peak | None  # what steps take; None: not on a CUDA device, and not counted
    page_tokens: int
    pages: int  # 0: the start would be refused
    sequences: Mapping[int, int]  # how many fit, by their length
    refusal: str | None  # why nothing fits, and what to change


def make_plan(settings: BackendSettings, device_memory: int | None = None) -> Plan:
    """The plan for a device of `device_memory` bytes, a GPU unless DEVICE says otherwise; None:
    for the device that is here. Raises StartFailed when there is nothing to plan.
    """
    model = outline(settings.model)
    shape = decoder_shape(model.config)
    if shape is None:
        raise Unsupported(
            f"{architecture(model.config)} runs through transformers' own code, whose memory is "
            "not known before it is loaded"
        )
    context = context_length(settings.model, model.config, model.place)
    device = _device(settings, device_memory)
    precision = choose_precision(settings.model.dtype, device)
    formats = _formats(precision, model.table, device)
    limits = resolve_limits(settings.batch, device)
    weights = weight_memory(shape, formats)
    kv_bytes = kv_token_bytes(shape, formats.compute)
    page = settings.cache.page_tokens
    total, used = _memory(device, device_memory)
    peak = None
    if device == "cuda":
        peak = expect_peak(shape, settings, limits, context, formats.compute)
        taken = used + sum(weights.values()) + rotation_table(shape, context) + LIBRARIES
        room = cuda_room(settings, limits, context, CudaMemory(total, taken, peak))
    else:
        room = cpu_room(settings, limits, context, total - used - sum(weights.values()))
    pages, refusal = _count_pages(settings, kv_bytes, room)
    lengths = sorted({length for length in LENGTHS if length < context} | {context})
    return Plan(
        model=settings.model.served_name,
        architecture=architecture(model.config),
        device=device,
        memory=total,
        used=used,
        dtype=formats.weights,
        parameters=parameters(shape),
        stored=model.stored,
        weights=weights,
        kv_bytes_per_token=kv_bytes,
        context=context,
        limits=limits,
        peak=peak,
        page_tokens=page,
        pages=pages,
        sequences={length: pages // -(-length // page) for length in lengths},
        refusal=refusal,
    )


def _device(settings: BackendSettings, device_memory: int | None) -> str:
    name: str = settings.device.device
    if name != "auto":
        return name
    return "cuda" if device_memory is not None else get_device()


def _memory(device: str, given: int | None) -> tuple[int, int]:
    """The device's memory and what is used of it now, by us too."""
    if device != "cuda":
        return given or int(psutil.virtual_memory().available), 0
    if given is not None:
        return given, DRIVER
    import torch

    if not torch.cuda.is_available():
        raise Unsupported("there is no CUDA device here: say --device-memory, such as 80GB")
    free, total = torch.cuda.mem_get_info()
    return total, total - free


def _formats(precision: Precision, table: str, device: str) -> Formats:
    weights, compute = (
        str(dtype).removeprefix("torch.") for dtype in (precision.weights, precision.compute)
    )
    return Formats(weights, compute, table, packed=device == "cpu")


def _count_pages(settings: BackendSettings, kv_bytes: int, room: Room) -> tuple[int, str | None]:
    """Pages, and why there are none."""
    try:
        return max(1, count_tokens(settings, kv_bytes, room) // settings.cache.page_tokens), None
    except StartFailed as refusal:
        return 0, str(refusal)


def size(text: str) -> int:
    """Bytes of a size such as 141GB, 80GiB or 24G. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?)B?", text.strip())
    number = float(found[1]) * UNITS[found[2]] if found and found[2] in UNITS else 0.0
    if number < 1:
        raise ValueError(text)
    return int(number)


size.__name__ = "size"  # argparse says: invalid size value


def as_json(plan: Plan) -> dict[str, object]:
    """One object, of plain values."""
    fields = {name: getattr(plan, name) for name in Plan.__slots__}
    peak = None if plan.peak is None else asdict(plan.peak)
    return fields | {"limits": plan.limits.model_dump(), "peak": peak}


def card(plan: Plan) -> Iterator[tuple[str, str]]:
    """Its lines for a reader: what, and how much."""
    yield "model", f"{plan.model} ({plan.architecture})"
    yield "parameters", f"{plan.parameters / 1e6:,.1f} M"
    yield "weight files", _sizes(plan.stored) if plan.stored else "not read"
    yield "device", f"{plan.device}, {mib(plan.memory)}, of them {mib(plan.used)} in use"
    yield "weights there", _sizes(plan.weights)
    yield "KV of a token", f"{plan.kv_bytes_per_token:,} bytes"
    yield (
        "step, at most",
        f"{plan.limits.max_step_tokens:,} tokens, {plan.limits.max_running:,} sequences",
    )
    if plan.peak is not None:
        yield "step of prompts", mib(plan.peak.prefill)
        yield "step of decodes", mib(plan.peak.decode)
        yield "kept between steps", mib(plan.peak.held)
        yield "CUDA graphs", mib(plan.peak.graphs)
    tokens = plan.pages * plan.page_tokens
    yield (
        "pages",
        f"{plan.pages:,} of {plan.page_tokens} tokens: {tokens:,} tokens, "
        f"{mib(tokens * plan.kv_bytes_per_token)}",
    )
    for length, count in plan.sequences.items():
        yield f"sequences of {length:,}", f"{count:,} fit"


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{mib(bytes_)} {dtype}" for dtype, bytes_ in sizes.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line, by default this process's. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m engine.plan", description=__doc__)
    parser.add_argument(
        "--device-memory", type=size, metavar="141GB", help="of a GPU that is not here"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    asked = parser.parse_args(arguments)
    try:
        plan = make_plan(read_settings().backend, asked.device_memory)
    except (EngineError, ConfigError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if asked.json:
        sys.stdout.write(json.dumps(as_json(plan)) + "\n")
        return int(plan.refusal is not None)
    for what, how_much in card(plan):
        sys.stdout.write(f"{what:<22}{how_much}\n")
    if plan.refusal is not None:
        sys.stderr.write(f"{plan.refusal}\n")
    return int(plan.refusal is not None)


if __name__ == "__main__":
    sys.exit(main())
