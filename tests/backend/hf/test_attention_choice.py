"""Which attention `ATTN_IMPL` stands for, and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch

from backend.hf import opening
from backend.interface import Unsupported


@pytest.fixture
def triton_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the package and a Hopper, as far as `opening` can see."""
    monkeypatch.setattr(opening, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_auto_is_sdpa_without_a_cuda_device_and_says_why(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert opening._choose_attention("auto", device) == "sdpa"
    assert caplog.messages == [f"ATTN_IMPL=auto: sdpa, as DEVICE is {device}"]


@pytest.mark.usefixtures("triton_there")
def test_auto_is_triton_on_a_cuda_device(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert opening._choose_attention("auto", "cuda") == "triton"
    (line,) = caplog.messages
    assert line.startswith("ATTN_IMPL=auto: triton, ")


@pytest.mark.usefixtures("triton_there")
def test_a_name_is_what_it_says() -> None:
    for name in ("sdpa", "triton"):
        assert opening._choose_attention(name, "cuda") == name


@pytest.mark.usefixtures("triton_there")
def test_triton_by_name_is_refused_with_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(device: str) -> str:
        with pytest.raises(Unsupported, match=r"^ATTN_IMPL=triton needs [^\n]*$") as caught:
            opening._choose_attention("triton", device)
        return str(caught.value)

    assert "DEVICE is cpu" in refusal("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "capability 7.5" in refusal("cuda")
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    assert "triton is not installed" in refusal("cuda")
