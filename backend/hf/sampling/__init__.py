"""Sampling on the device: what each slot asked for, and the draw of the next token.

Owned by the executor. `SlotStates` keeps the state of every slot, `Sampler` turns logits into
tokens, `Scorer` gives log-probabilities.
"""

from backend.hf.sampling.logprobs import PendingScores, Scorer
from backend.hf.sampling.sampler import NO_MASKS, Draw, Sampler, open_sampler
from backend.hf.sampling.slots import SlotStates

__all__ = [
    "NO_MASKS",
    "Draw",
    "PendingScores",
    "Sampler",
    "Scorer",
    "SlotStates",
    "open_sampler",
]
