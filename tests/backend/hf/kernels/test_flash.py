"""FlashAttention, in each release that is installed, and FlashInfer against `sdpa` in float32.

Every position that no sequence holds is NaN in the pools. Options a release does not know must
still be honoured.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backend.hf.attention import AttentionSetup
from backend.hf.attention.choice import ATTENTION, lack, open_attention
from tests.backend.hf.kernels.paged_sequences import Case, Part, Sequences

pytestmark = pytest.mark.gpu

MOST_ERROR = 2e-2  # bfloat16, of values in +-5

CASES = {
    "two queries a head": Case(),
    "eight queries a head": Case(group=8, page=64),
    "narrow heads": Case(key_width=64, value_width=64, page=1),
    "window": Case(window=100),
    "softcap": Case(softcap=2.0),
    "sinks": Case(sinks=True),
}
PLAIN = ("two queries a head", "eight queries a head", "narrow heads")

LENGTHS = [1, 2, 17, 255, 3000, 600, 70, 33, 1, 400]
DECODES = [Part(s, LENGTHS[s] - 1, LENGTHS[s]) for s in (0, 1, 2, 3, 4)]
# prompts from their start, two of them, then a chunk in the middle of one, then prompts again
CHUNKS = [Part(5, 0, 600), Part(6, 0, 69), Part(4, 2500, 2990), Part(7, 0, 33), Part(8, 0, 1)]


def opened(name: str, case: Case, sequences: Sequences, dtype: torch.dtype) -> Any:
    setup = AttentionSetup(case.geometry, sequences.pages, case.page, dtype, "cuda")
    return open_attention(name, setup)


def error(attention: Any, sequences: Sequences, decodes: list[Part], chunks: list[Part]) -> float:
    """The largest difference from the reference in one step."""
    reference = opened("sdpa", sequences.case, sequences, torch.float32)
    sequences.fill(attention.pools[0], torch.nan)
    sequences.fill(reference.pools[0], 0.0)
    got = sequences.attend(attention, decodes, chunks)
    right = sequences.attend(reference, decodes, chunks)
    assert got.dtype == sequences.case.dtype
    assert got.shape == right.shape
    assert not got.isnan().any()
    return (got.float() - right).abs().max().item()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("module", [each.module for each in ATTENTION["flash"].packages])
def test_flash_attends_as_sdpa_does_and_takes_what_begins(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    (package,) = (each for each in ATTENTION["flash"].packages if each.module == module)
    missing = package.lack(case.dtype, case.geometry)
    if missing is not None:
        pytest.skip(missing)
    from backend.hf.attention import flash

    monkeypatch.setattr(flash, "package_of", lambda *_: module)
    sequences = Sequences(case, LENGTHS)
    attention = opened("flash", case, sequences, case.dtype)
    calls: list[int] = []
    kernel = attention._kernel

    def counted(query: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append(len(query))
        return kernel(query, *arguments, **options)

    attention._kernel = counted
    steps = [(DECODES, CHUNKS), ([], CHUNKS[:2]), ([], CHUNKS[2:3]), (DECODES, [])]
    assert max(error(attention, sequences, *step) for step in steps) < MOST_ERROR
    assert calls == ([669, 34, 669] if name in PLAIN else [])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.sinks])
def test_flashinfer_attends_as_sdpa_does(name: str) -> None:
    case = CASES[name]
    missing = lack("flashinfer", "cuda", case.dtype, case.geometry)
    if missing is not None:
        pytest.skip(missing)
    sequences = Sequences(case, LENGTHS)
    attention = opened("flashinfer", case, sequences, case.dtype)
    steps = [(DECODES, CHUNKS), ([], CHUNKS), (DECODES, []), (DECODES[:1], CHUNKS[4:])]
    assert max(error(attention, sequences, *step) for step in steps) < MOST_ERROR
