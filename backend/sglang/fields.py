"""Our fields in SGLang's words, and those that it means otherwise or cannot do. Pure.

Read from SGLang 0.5.17: `sampling_params.py`, `sampling_batch_info.py`, `sampler.py`,
`penaltylib/`, `schedule_batch.py` (when a request ends) and `tokenizer_manager.py`. What a field
means is said by `backend/sampling_params.py`; where SGLang's meaning is another, the field lacks,
and a request that asks for it is refused by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from backend.interface import Finish, SamplingParams, Submission, TokenLogprob

Fields = dict[str, Any]

# field -> why it lacks
LACKING = {
    # its scheduler plans a step before it has the last token, so penalties are one token late, and
    # the last token of the prompt counts as generated; a request that had to yield counts anew
    "frequency_penalty": "applied one token late, from the last token of the prompt on",
    "presence_penalty": "applied one token late, from the last token of the prompt on",
    "repetition_penalty": "of generated tokens alone, one token late, and at most 2",
    "min_new_tokens": "needs SGLang's own tokenizer",
    "grammar": "needs SGLang's own tokenizer",
    "pooling": "needs a start as an embedding model",
    "progress": "there is no news of a prompt that goes on",
}
# By DETERMINISTIC. Seeds are read with it alone, and then min_p ends its scheduler.
LACKING_BY_MODE = {False: ("seed",), True: ("min_p",)}

LACKS = (*LACKING, *LACKING_BY_MODE[False])  # by default

GREEDY_TEMPERATURE = 0.0  # SGLang takes anything below 1e-6 for greedy
EVERY_TOKEN = -1  # top_k
# A seeded draw is made among ids sorted by probability where anybody in the batch filters, else
# among ids as they are: one seed gives two answers. So with DETERMINISTIC everybody who draws
# filters, if only by as many ids as there are.
# With both top_k and top_p SGLang counts top_p over all tokens, not over what top_k left, unless
# somebody in the batch asks for min_p: then one filter follows the other, as ours do. So who wants
# both asks for the least min_p there is, which filters nothing that has a probability.
LEAST_MIN_P = 1.2e-38


def lacks(deterministic: bool) -> tuple[str, ...]:
    """What is refused by name."""
    return (*LACKING, *LACKING_BY_MODE[deterministic])


def _biases(sampling: SamplingParams) -> dict[str, float] | None:
    """Biases of a token add up. SGLang's keys are texts."""
    sums: defaultdict[str, float] = defaultdict(float)
    for token, bias in sampling.logit_bias:
        sums[str(token)] += bias
    return dict(sums) or None


# SGLang's field -> its value, of a vocabulary and what DETERMINISTIC says
SAMPLING: dict[str, Callable[[SamplingParams, int, bool], Any]] = {
    "temperature": lambda sampling, *_: sampling.temperature,
    "top_p": lambda sampling, *_: sampling.top_p,
    "top_k": lambda sampling, vocabulary, deterministic: (
        # a number beyond 32 bits would end its scheduler
        sampling.top_k
        if 0 < sampling.top_k < vocabulary
        else vocabulary
        if deterministic and sampling.temperature
        else EVERY_TOKEN
    ),
    "min_p": lambda sampling, _, deterministic: (
        LEAST_MIN_P
        if not (deterministic or sampling.min_p) and sampling.top_k and sampling.top_p < 1
        else sampling.min_p
    ),
    "logit_bias": lambda sampling, *_: _biases(sampling),
}


def stop_ids(sampling: SamplingParams, own: Sequence[int]) -> frozenset[int]:
    """The ids that end an answer. `own` are the model's."""
    return frozenset((*(() if sampling.ignore_eos else own), *sampling.stop_token_ids))


def ending(ids: frozenset[int], foreign: frozenset[int]) -> Fields:
    """How SGLang is told of `ids` that end an answer.

    With `ignore_eos` it looks for none at all, and without it the ends that it knows of the model
    (`foreign`) end an answer too. So it is told of none where one of these must not; the answer is
    watched in any case (`backend/sglang/answers.py`), and then ended from here.
    """
    if foreign <= ids:
        return {"ignore_eos": not ids, "stop_token_ids": sorted(ids) or None}
    return {"ignore_eos": True, "stop_token_ids": None}


def edits_logits(sampling: SamplingParams) -> bool:
    """Whether SGLang's log-probabilities of generated tokens are not those of the raw logits."""
    return bool(sampling.logit_bias)


class Requests:
    """Makes SGLang's requests of our submissions."""

    def __init__(self, vocabulary: int, foreign: frozenset[int], deterministic: bool) -> None:
        """`foreign`: the end tokens of the model, as SGLang knows them."""
        self._vocabulary = vocabulary
        self._foreign = foreign
        self._deterministic = deterministic

    def generate(self, rid: str, submission: Submission, ends: frozenset[int]) -> Fields:
        """Of an answer, or of what is left of it, that ends at any of `ends`."""
        sampling, wants = submission.sampling, submission.wants
        asked: Fields = {
            name: value(sampling, self._vocabulary, self._deterministic)
            for name, value in SAMPLING.items()
        }
        asked |= ending(ends, self._foreign)
        asked["max_new_tokens"] = submission.max_new_tokens - len(submission.received)
        if self._deterministic:
            asked["sampling_seed"] = submission.seed
        # scores of the prompt came with the first token, if there was one
        start = None if submission.received else wants.prompt_logprobs_from
        told = wants.logprobs and not edits_logits(sampling)
        return {
            **self._about(rid, (*submission.prompt, *submission.received), submission),
            "sampling_params": asked,
            "return_logprob": told or start is not None,
            "logprob_start_len": -1 if start is None else start,
        }

    def score(self, rid: str, submission: Submission, ids: Sequence[int], start: int) -> Fields:
        """Of the log-probabilities of `ids` from position `start` on, by the raw logits."""
        return {
            **self._about(rid, ids, submission),
            "sampling_params": {
                "temperature": GREEDY_TEMPERATURE,
                "max_new_tokens": 0,
                "ignore_eos": True,
            },
            "return_logprob": True,
            "logprob_start_len": start - 1,
        }

    def _about(self, rid: str, ids: Sequence[int], submission: Submission) -> Fields:
        return {
            "rid": rid,
            "input_ids": list(ids),
            "stream": True,
            "top_logprobs_num": submission.wants.top,
            "extra_key": submission.namespace or None,
        }


def logprobs_of(
    tokens: Sequence[int], told: Sequence[Any], top: Sequence[Any]
) -> list[TokenLogprob]:
    """The log-probabilities of `tokens` as SGLang tells them: (natural logarithm, id, text) each,
    and a list of these where the most probable were asked for.
    """
    return [
        TokenLogprob(
            token, value[0], tuple((id, logprob) for logprob, id, _ in top[index] if top[index])
        )
        if top
        else TokenLogprob(token, value[0])
        for index, (token, value) in enumerate(zip(tokens, told, strict=False))
    ]


def finish_of(reason: Fields) -> Finish:
    """Our word for how SGLang says that an answer ended.

    An abort with a status is a request that it could not serve, one without was ended from outside.
    """
    kind, message = reason["type"], str(reason.get("message", "")).strip()
    if kind == "length":
        return Finish("length")
    if kind == "stop" and isinstance(reason.get("matched"), int):
        return Finish("stop", matched=reason["matched"])
    if kind == "abort" and reason.get("status_code") is None:
        return Finish("abort", message=message or None)
    said = message or reason.get("matched") or reason
    return Finish("error", message=" ".join(f"SGLang: {said}".split()))
