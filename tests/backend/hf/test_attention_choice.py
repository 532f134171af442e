"""Which attention `ATTN_IMPL` stands for, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import get_args

import pytest
import torch

from backend.hf.attention import KvGeometry, choice
from backend.hf.attention.choice import (
    ATTENTION,
    choose_attention,
    installed,
    lack,
    load_package,
    package_of,
)
from backend.interface import Unsupported
from config import DeviceSettings

GEOMETRY = KvGeometry(layers=2, kv_heads=4, key_width=128, value_width=128)
EXTRAS = {package.module for name in ATTENTION for package in ATTENTION[name].packages} - {"triton"}

Machine = Callable[[Iterable[str], tuple[int, int]], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A CUDA device of that capability beside packages of these names, as far as one can see."""

    def build(modules: Iterable[str], capability: tuple[int, int]) -> None:
        there = set(modules)
        monkeypatch.setattr(choice, "installed", lambda module: module in there)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return build


def chosen(
    name: str = "auto",
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    width: int = 128,
    flash: bool = True,
    deterministic: bool = False,
) -> str:
    settings = DeviceSettings.model_validate(
        {"attention": name, "flash": flash, "deterministic": deterministic}
    )
    return choose_attention(settings, device, dtype, KvGeometry(2, 4, width, width))


def refusal(name: str, **what: object) -> str:
    with pytest.raises(Unsupported, match=r"^[^\n]*$") as caught:
        chosen(name, **what)  # type: ignore[arg-type]
    return str(caught.value)


def test_every_name_of_the_flag_is_in_the_table_and_every_entry_is_there(root: Path) -> None:
    annotation = DeviceSettings.model_fields["attention"].annotation
    assert set(get_args(annotation)) == {"auto", *ATTENTION}
    for each in ATTENTION.values():
        module, kind = each.entry.split(":")
        assert f"\nclass {kind}:" in (root / f"{module.replace('.', '/')}.py").read_text()


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_auto_is_sdpa_without_a_cuda_device_and_says_why(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert chosen(device=device) == "sdpa"
    assert caplog.messages == [f"ATTN_IMPL=auto: sdpa, as DEVICE is {device}"]


@pytest.mark.parametrize(
    ("modules", "capability", "flash", "dtype", "name", "reason"),
    [
        ((), (9, 0), True, torch.bfloat16, "sdpa", "triton is not installed"),
        (("triton",), (7, 5), True, torch.float16, "sdpa", "8.0 or later, this device has 7.5"),
        (("triton",), (9, 0), True, torch.float64, "sdpa", "not float64"),
        (("triton",), (9, 0), True, torch.bfloat16, "triton", "fa3_fwd_interface or "),
        (("triton", *EXTRAS), (9, 0), True, torch.float32, "triton", "not float32"),
        (("triton", *EXTRAS), (9, 0), False, torch.bfloat16, "triton", "FLASH_ATTENTION is 0"),
        (("triton", *EXTRAS), (9, 0), True, torch.bfloat16, "flash", "fa3_fwd_interface pre"),
        (("triton", *EXTRAS), (9, 0), True, torch.float16, "flash", "flash_attn_interface pre"),
        (("triton", *EXTRAS), (10, 0), True, torch.bfloat16, "flash", "flash_attn.cute pre"),
        (("triton", *EXTRAS), (8, 6), True, torch.bfloat16, "flash", ".flash_attn_interface pre"),
        (EXTRAS, (9, 0), True, torch.bfloat16, "sdpa", "triton is not installed"),
    ],
)
def test_auto_takes_the_fastest_that_runs_and_says_why(
    modules: Iterable[str],
    capability: tuple[int, int],
    flash: bool,
    dtype: torch.dtype,
    name: str,
    reason: str,
    machine: Machine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    machine(modules, capability)
    assert chosen(flash=flash, dtype=dtype) == name
    (line,) = caplog.messages
    assert line.startswith(f"ATTN_IMPL=auto: {name}, as ")
    assert reason in line


def test_a_name_is_what_it_says(machine: Machine) -> None:
    machine(("triton", *EXTRAS), (9, 0))
    for name in ATTENTION:
        assert chosen(name) == name


def test_a_name_is_refused_with_what_it_lacks_and_what_to_do(machine: Machine) -> None:
    for name in ("triton", "flash", "flashinfer", "sgl_kernel"):
        line = refusal(name, device="cpu")
        assert line == f"ATTN_IMPL={name} cannot run here, as DEVICE is cpu: use ATTN_IMPL=sdpa"
    machine((), (9, 0))
    assert "triton is not installed (it comes with torch's CUDA builds)" in refusal("triton")
    assert 'pip install "mini-sglang[cuda]"' in refusal("flashinfer")
    machine(("triton",), (9, 0))
    line = refusal("flash")
    assert 'pip install "mini-sglang[cuda]"' in line
    assert all(package.module in line for package in ATTENTION["flash"].packages)
    machine(("triton", *EXTRAS), (7, 5))
    assert "compute capability 8.0 or later, this device has 7.5" in refusal("flashinfer")
    machine(("triton", "fa3_fwd_interface", "flashinfer"), (8, 0))
    assert "9.0 or later, below 10.0, this device has 8.0" in refusal("flash")
    assert "no kernel for keys of 80 and values of 80 a head" in refusal("flashinfer", width=80)
    machine(("triton", *EXTRAS), (9, 0))
    assert "fa3_fwd_interface takes bfloat16, not float32" in refusal("flash", dtype=torch.float32)
    assert "ENABLE_FLASH_ATTENTION=0" in refusal("flash", flash=False)


def test_sglangs_kernels_are_refused_with_what_they_lack(machine: Machine) -> None:
    machine(("triton",), (9, 0))
    assert refusal("sgl_kernel") == (
        "ATTN_IMPL=sgl_kernel cannot run here, as sgl_kernel.flash_attn is not installed "
        "(pip install sglang-kernel): use ATTN_IMPL=sdpa"
    )
    machine(EXTRAS, (9, 0))
    assert chosen("sgl_kernel") == chosen("sgl_kernel", dtype=torch.float16) == "sgl_kernel"
    assert "takes bfloat16 and float16, not float32" in refusal("sgl_kernel", dtype=torch.float32)
    assert "no kernel for keys of 20 and values of 20 a head" in refusal("sgl_kernel", width=20)
    line = refusal("sgl_kernel", flash=False)
    assert line == "ATTN_IMPL=sgl_kernel and ENABLE_FLASH_ATTENTION=0 exclude each other"
    for capability in ((8, 9), (10, 0)):
        machine(EXTRAS, capability)
        assert "9.0 or later, below 10.0, this device has" in refusal("sgl_kernel")


def test_auto_does_not_take_sglangs_kernels(machine: Machine) -> None:
    machine(("triton", "sgl_kernel.flash_attn"), (9, 0))
    assert chosen() == "triton"


def test_only_triton_is_deterministic(machine: Machine) -> None:
    machine(("triton", *EXTRAS), (9, 0))
    for name in ("auto", "triton"):
        assert chosen(name, deterministic=True) == "triton"
    for name in ("sdpa", "flash", "flashinfer", "sgl_kernel"):
        assert f"DETERMINISTIC=1 and ATTN_IMPL={name}" in refusal(name, deterministic=True)
    line = refusal("auto", device="cpu", deterministic=True)
    assert line == "DETERMINISTIC=1 cannot run here, as DEVICE is cpu: use DETERMINISTIC=0"


def test_keys_unlike_values_are_no_flash_attentions(machine: Machine) -> None:
    machine(("triton", *EXTRAS), (9, 0))
    latent = KvGeometry(2, 4, key_width=192, value_width=128)
    assert lack("triton", "cuda", torch.bfloat16, latent) is None
    assert "keys of 192 and values of 128" in str(lack("flash", "cuda", torch.bfloat16, latent))
    assert package_of("flash", torch.bfloat16, GEOMETRY) == "fa3_fwd_interface"


def test_packages_are_found_before_they_are_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("loud/__init__.py", "loud/part.py", "spread/inner/__init__.py", "alone.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken.py").write_text("raise ImportError('libcudart.so.99:\\nno such file')")
    for module in ("loud", "loud.part", "spread.inner", "alone", "broken"):
        assert installed(module), module
    with pytest.raises(Unsupported, match=r"^broken [^\n]*\(libcudart.so.99: no such file\)"):
        load_package("broken")
    for module in ("loud.other", "spread.other", "alone.part", "nobody", "nobody.part"):
        assert not installed(module), module
