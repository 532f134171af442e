"""Sampling on the device: what each slot asked for, and the draw of the next token.

Owned by the executor. `SlotStates` keeps the state of every slot, `Sampler` turns logits into
tokens, `score` gives log-probabilities.
"""

from backend.hf.sampling.logprobs import Scores, score, token_logprobs
from backend.hf.sampling.sampler import Sampler
from backend.hf.sampling.slots import SlotStates

__all__ = ["Sampler", "Scores", "SlotStates", "score", "token_logprobs"]
