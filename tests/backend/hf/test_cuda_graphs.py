"""Which sizes are captured, and when. That graphs give what eager steps give is tested on a GPU, in
`tests/end_to_end/test_cuda_models.py`.
"""

from __future__ import annotations

import pytest
import torch

from backend.hf import decode_graphs, prompt_graphs
from backend.hf.cuda_graphs import EAGER_STEPS, Sizes, ladder


@pytest.mark.parametrize("steps", [decode_graphs.STEPS, prompt_graphs.STEPS])
@pytest.mark.parametrize("largest", [1, 3, 5, 64, 100, 256, 257, 1000, 4096])
def test_the_last_size_holds_the_largest_batch_and_padding_is_bounded(
    largest: int, steps: tuple[tuple[int, int], ...]
) -> None:
    sizes = ladder(largest, steps)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] >= largest > (sizes[-2] if len(sizes) > 1 else 0)
    for count in range(steps[0][1], largest + 1):
        size = next(each for each in sizes if each >= count)
        assert size < 2 * count or size == count


def test_small_batches_have_sizes_of_their_own() -> None:
    assert ladder(48, decode_graphs.STEPS) == [1, 2, 4, 8, 12, 16, 24, 32, 48]


def test_a_size_is_captured_when_it_has_been_met_often() -> None:
    made: list[int] = []
    sizes = Sizes([2, 4], lambda size: made.append(size))
    for _ in range(EAGER_STEPS):
        assert sizes.find(3) is None
    assert sizes.find(2) is None
    assert made == []
    found = sizes.find(4)
    assert found is not None
    assert found[0] == 4
    assert made == [4]
    assert sizes.find(5) is None, "it is larger than any"


def test_the_most_wanted_size_is_prepared_first_then_large_ones() -> None:
    made: list[int] = []
    sizes = Sizes([1, 2, 4, 8], lambda size: made.append(size))
    sizes.find(3)
    while sizes.prepare():
        continue
    assert made == [4, 8, 2, 1]


def test_a_size_that_cannot_be_captured_stays_eager_and_the_others_do_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def capture(size: int) -> int:
        if size == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return size

    sizes = Sizes([2, 4], capture)
    while sizes.prepare():
        continue
    assert sizes.find(3) is None
    assert sizes.find(2) == (2, 2)
    (message,) = caplog.messages
    assert message == "size 4 runs without a CUDA graph: CUDA out of memory."
