"""Log-probabilities of chosen tokens and of the most probable ones: natural, of raw logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backend.hf.transfer import to_host
from backend.interface import TokenLogprob


@dataclass(frozen=True, eq=False, slots=True)
class PendingScores:
    """Log-probabilities of some rows on their way to the host: the chosen token of each first,
    then the most probable ones, best first.
    """

    ids: Tensor  # [rows, 1 + top] int64, on the host
    values: Tensor  # [rows, 1 + top] float32, on the host

    def read(self, tops: Sequence[int]) -> list[TokenLogprob]:
        """Row i with its `tops[i]` best. To be called when the device has got past
        `Scorer.start`.
        """
        rows = zip(self.ids.tolist(), self.values.tolist(), tops, strict=True)
        return [
            TokenLogprob(
                ids[0], values[0], tuple(zip(ids[1:][:top], values[1:][:top], strict=True))
            )
            for ids, values, top in rows
        ]


class Scorer:
    """Scores tokens. Where our kernels run, the bits of a row depend on nothing but that row."""

    def __init__(self, kernels: bool = False) -> None:
        """`kernels`: ours run on the device of the logits."""
        self._log_sum_exp = _log_sum_exp
        if kernels:
            from backend.hf.kernels.log_sum import log_sum_exp  # triton is there with CUDA only

            self._log_sum_exp = log_sum_exp

    def start(self, logits: Tensor, tokens: Tensor, top: int) -> PendingScores:
        """Scores of `tokens` [rows] int64 under raw `logits` [rows, vocabulary] float32, with the
        `top` most probable, the lowest id of a tie first; which of those that tie for the last
        place are there is torch's choice. Does not wait for the device.
        """
        norm = self._log_sum_exp(logits)
        best, ids = _ordered(*logits.topk(min(top, logits.shape[-1])))
        chosen = tokens[:, None]
        return PendingScores(
            to_host(torch.cat([chosen, ids], 1)),
            to_host(torch.cat([logits.gather(1, chosen), best], 1) - norm),
        )


def _log_sum_exp(logits: Tensor) -> Tensor:
    """Of each row: [rows, 1]."""
    return logits.logsumexp(-1, keepdim=True)


def _ordered(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Both [rows, top], by falling value and then rising id."""
    ids, order = ids.sort()
    values, best = values.gather(1, order).sort(stable=True, descending=True)
    return values, ids.gather(1, best)
