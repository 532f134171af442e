"""`log_sum_exp` against float64, and bit for bit against itself in other batches."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from torch import Tensor

from backend.hf.sampling import Scorer

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
VOCABULARIES = (1, 40, 333, 8192, 20_011, 151_936)  # below, at and beyond what a lane takes at once


def log_sum_exp(logits: Tensor) -> Tensor:
    result: Tensor = import_module("backend.hf.kernels.log_sum").log_sum_exp(logits)
    assert result.shape == (len(logits), 1)
    assert result.dtype == torch.float32
    return result


def random_rows(rows: int, vocabulary: int, spread: float = 3.0) -> Tensor:
    """Logits between two rows of NaN."""
    torch.manual_seed(rows)
    whole = torch.randn(rows + 2, vocabulary, device=DEVICE) * spread
    whole[[0, -1]] = torch.nan
    return whole[1:-1]


def spoil(rows: int) -> None:
    """Leaves NaN in the memory that the next result of `rows` is made in."""
    torch.full((rows, 1), torch.nan, device=DEVICE)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("spread", [0.01, 3.0, 1000.0])
def test_sums_are_those_of_float64(vocabulary: int, spread: float) -> None:
    for rows in (1, 5, 64):
        logits = random_rows(rows, vocabulary, spread)
        expected = logits.double().logsumexp(-1, keepdim=True)
        spoil(rows)
        error = (log_sum_exp(logits).double() - expected).abs()
        assert (error <= 2e-6 + 2**-22 * expected.abs()).all()


def test_rows_far_apart_in_memory_are_read_where_they_are() -> None:
    logits = random_rows(7, 1000)
    part = logits[:, :777]
    torch.testing.assert_close(log_sum_exp(part), part.logsumexp(-1, keepdim=True))


@pytest.mark.parametrize("vocabulary", [333, 20_011, 151_936])
def test_a_row_has_the_same_bits_in_any_company_and_at_any_place(vocabulary: int) -> None:
    row = random_rows(1, vocabulary).clone()
    alone = log_sum_exp(row)
    for rows in (3, 64, 300):
        batch = random_rows(rows, vocabulary)
        for place in (0, rows // 2, rows - 1):
            batch[place] = row[0]
        found = log_sum_exp(batch)
        for place in (0, rows // 2, rows - 1):
            assert same_bits(found[place], alone[0])
            assert same_bits(log_sum_exp(batch[place : place + 1]), alone)


@pytest.mark.parametrize("vocabulary", [40, 20_011])
def test_what_is_infinite_or_no_number_stays_in_its_row(vocabulary: int) -> None:
    logits = random_rows(9, vocabulary).clone()
    clean = log_sum_exp(logits)
    logits[1] = -math.inf
    logits[3] = math.nan
    logits[4, vocabulary // 2] = math.nan
    logits[6, vocabulary - 1] = math.inf
    logits[7, : vocabulary - 1] = -math.inf
    found = log_sum_exp(logits)
    assert found[1] == -math.inf
    assert found[[3, 4]].isnan().all()
    assert found[6] == math.inf
    assert found[7] == logits[7, -1]
    for row in (0, 2, 5, 8):
        assert same_bits(found[row], clean[row])


def test_no_rows_have_no_sums() -> None:
    assert len(log_sum_exp(torch.zeros(0, 40, device=DEVICE))) == 0


def test_scores_of_a_row_have_the_same_bits_in_any_company() -> None:
    scorer, vocabulary, top = Scorer(kernels=True), 20_011, 20
    row = random_rows(1, vocabulary).clone()
    token = torch.tensor([7], device=DEVICE)
    alone = scorer.start(row, token, top)
    for rows in (3, 64, 300):
        batch = random_rows(rows, vocabulary).clone()
        batch[rows // 2] = row[0]
        found = scorer.start(batch, token.expand(rows), top)
        torch.cuda.synchronize()
        assert torch.equal(found.ids[rows // 2], alone.ids[0])
        assert same_bits(found.values[rows // 2], alone.values[0])
