"""Which attention runs: the table of implementations, what each of them needs, and who is taken.

Asked before anything is opened: packages are looked for, never imported.
"""

from __future__ import annotations

import logging
from collections.abc import Container
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any

import torch

from backend.hf.attention import AttentionSetup, KvGeometry, PagedAttention
from backend.interface import Unsupported
from config import DeviceSettings

logger = logging.getLogger(__name__)

HALVES = (torch.bfloat16, torch.float16)
EXTRA = 'pip install "mini-sglang[cuda]"'


@dataclass(frozen=True, slots=True)
class Package:
    """Kernels of others, and what they run on."""

    module: str  # what is imported
    least: tuple[int, int] = (8, 0)  # compute capability
    below: tuple[int, int] | None = None  # likewise; None: no end
    dtypes: tuple[torch.dtype, ...] = HALVES
    widths: Container[int] | None = None  # of heads, keys and values alike; None: any

    def lack(self, dtype: torch.dtype, geometry: KvGeometry) -> str | None:
        """Why they cannot run on this CUDA device, in one clause. None: they can."""
        if not installed(self.module):
            return f"{self.module} is not installed"
        capability = torch.cuda.get_device_capability()
        if capability < self.least or (self.below is not None and capability >= self.below):
            wanted = f"{_dotted(self.least)} or later"
            wanted += f", below {_dotted(self.below)}" if self.below is not None else ""
            have = _dotted(capability)
            return f"{self.module} needs compute capability {wanted}, this device has {have}"
        if dtype not in self.dtypes:
            taken = " and ".join(_short(each) for each in self.dtypes)
            return f"{self.module} takes {taken}, not {_short(dtype)}"
        key, value = geometry.key_width, geometry.value_width
        if self.widths is not None and (key != value or key not in self.widths):
            return f"{self.module} has no kernel for keys of {key} and values of {value} a head"
        return None


@dataclass(frozen=True, slots=True)
class Choice:
    """An implementation."""

    entry: str  # module:class, imported when chosen; takes an `AttentionSetup`
    packages: tuple[Package, ...] = ()  # any one of them does, the first is preferred
    beside: str | None = None  # the choice that it leaves a part of the work to
    source: str = ""  # where its packages come from
    capturable: bool = False  # a CUDA graph may hold its decodes, and serve every length


ATTENTION: dict[str, Choice] = {
    "sdpa": Choice("backend.hf.attention.sdpa:SdpaAttention"),
    "triton": Choice(
        "backend.hf.attention.triton:TritonAttention",
        (Package("triton", dtypes=(*HALVES, torch.float32)),),
        source="it comes with torch's CUDA builds",
        capturable=True,
    ),
    "flash": Choice(
        "backend.hf.attention.flash:FlashAttention",
        (
            # FlashAttention-3, a build of its forward pass alone and the full one
            Package("fa3_fwd_interface", (9, 0), (10, 0), HALVES[:1], range(8, 257, 8)),
            Package("flash_attn_interface", (9, 0), (10, 0), widths=range(8, 257, 8)),
            Package("flash_attn.cute", (9, 0), widths=range(8, 129, 8)),  # FlashAttention-4
            Package("flash_attn.flash_attn_interface", widths=range(8, 257, 8)),  # 2
        ),
        beside="triton",
        source=EXTRA,
        capturable=True,  # its decodes are those of triton
    ),
    "flashinfer": Choice(
        "backend.hf.attention.flashinfer:FlashInferAttention",
        (Package("flashinfer", widths=(64, 128, 256)),),
        source=EXTRA,
    ),
    "sgl_kernel": Choice(
        "backend.hf.attention.sgl_kernel:SglKernelAttention",
        (Package("sgl_kernel.flash_attn", (9, 0), (10, 0), widths=range(8, 257, 8)),),
        source="pip install sglang-kernel",
        capturable=True,
    ),
}
FLASH = ("flash", "sgl_kernel")  # what ENABLE_FLASH_ATTENTION=0 refuses


def choose_attention(
    settings: DeviceSettings, device: str, dtype: torch.dtype, geometry: KvGeometry
) -> str:
    """The name of what runs. Raises Unsupported where that is impossible, or not what was asked
    for.

    `auto` measures nothing. By docs/benchmarks.md our Triton kernels decode as fast as any other,
    and FlashAttention prefills faster.
    """
    name: str = settings.attention
    if name == "auto" and not settings.deterministic:
        name, why = _best(settings, device, dtype, geometry)
        logger.info("ATTN_IMPL=auto: %s, as %s", name, why)
        return name
    asked, instead = f"ATTN_IMPL={name}", "ATTN_IMPL=sdpa"
    if settings.deterministic:
        if name not in ("auto", "triton"):
            raise Unsupported(
                f"DETERMINISTIC=1 and {asked} exclude each other: only triton computes a row "
                "without regard to the others"
            )
        name, asked, instead = "triton", "DETERMINISTIC=1", "DETERMINISTIC=0"
    if name in FLASH and not settings.flash:
        raise Unsupported(f"{asked} and ENABLE_FLASH_ATTENTION=0 exclude each other")
    missing = lack(name, device, dtype, geometry)
    if missing is not None:
        raise Unsupported(f"{asked} cannot run here, as {missing}: use {instead}")
    return name


def lack(name: str, device: str, dtype: torch.dtype, geometry: KvGeometry) -> str | None:
    """Why a choice cannot run here, in one clause. None: it can."""
    choice = ATTENTION[name]
    if not choice.packages:
        return None
    if device != "cuda":
        return f"DEVICE is {device}"
    if choice.beside is not None:
        missing = lack(choice.beside, device, dtype, geometry)
        if missing is not None:
            return missing
    there = [each for each in choice.packages if installed(each.module)]
    if not there:
        names = " or ".join(each.module for each in choice.packages)
        return f"{names} is not installed ({choice.source})"
    reasons = [each.lack(dtype, geometry) for each in there]
    return None if None in reasons else reasons[0]


def package_of(name: str, dtype: torch.dtype, geometry: KvGeometry) -> str:
    """The module whose kernels are run by a choice that lacks nothing."""
    packages = ATTENTION[name].packages
    return next(each.module for each in packages if each.lack(dtype, geometry) is None)


def open_attention(name: str, setup: AttentionSetup) -> PagedAttention:
    """The implementation of that name, with its pools."""
    module, kind = ATTENTION[name].entry.split(":")
    opened: PagedAttention = getattr(import_module(module), kind)(setup)
    return opened


def load_package(module: str) -> Any:
    """Import what `installed` found. Raises Unsupported where it does not fit this machine."""
    try:
        return import_module(module)
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise Unsupported(
            f"{module} is installed and does not load ({reason}): use ATTN_IMPL=triton"
        ) from error


def installed(module: str) -> bool:
    """Whether it could be imported. Imports nothing, not even the packages that it lies in."""
    top, *inner = module.split(".")
    spec = find_spec(top)
    for name in inner:
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec is not None


def _best(
    settings: DeviceSettings, device: str, dtype: torch.dtype, geometry: KvGeometry
) -> tuple[str, str]:
    """The fastest that runs, and why."""
    missing = lack("triton", device, dtype, geometry)
    if missing is not None:
        return "sdpa", missing
    missing = "ENABLE_FLASH_ATTENTION is 0"
    if settings.flash:
        missing = lack("flash", device, dtype, geometry)
    if missing is None:
        package = package_of("flash", dtype, geometry)
        return "flash", f"{package} prefills faster than our kernels, which decode"
    return "triton", f"this device runs our kernels and, for prefill, {missing}"


def _dotted(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
