"""`POST /v1/score`: how probable texts are, in our form or in SGLang's. Nothing is generated.

    {"prompt", "continuations": [...]}
    -> {"scores": [{"index", "logprob", "mean_logprob", "greedy", "token_ids", "token_logprobs"}]}
    {"query", "items": [...], "label_token_ids"}  ->  {"scores": [[probability of each label]]}

Each continuation, or label behind an item, is a prompt whose last tokens are scored. Those of one
prompt are a group: the first computes it, the others find it cached.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from api.answers import Ask, Whole
from api.bodies import (
    MAX_PROMPTS,
    Form,
    Salt,
    Texts,
    TokenIds,
    decode,
    described,
    in_words_of_the_client,
    parse_value,
    read_body,
    refuse_unsupported,
    unknown_fields,
    unknown_in,
)
from api.errors import refused
from api.replies import json_reply, warnings_entry
from api.sampling_fields import NO_TOKENS, check_answers
from api.service import Service, is_strict, new_id, open_answers, service_of
from api.streaming import fold
from backend.interface import Wants

# Known to clients and not served: pairs of texts are for models that score pairs.
UNSERVED = (
    "text_1",
    "text_2",
    "data_1",
    "data_2",
    "queries",
    "documents",
    "truncate_prompt_tokens",
    "activation",
    "use_activation",
)
MAX_TEXT = 16 << 20  # characters to tokenize: each continuation with its prompt

IdLists: TypeAlias = Annotated[
    list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
]

router = APIRouter()


class ScoreFields(Form):
    """The fields of both forms."""

    model: str | None = Field(None, description="one of the names that the model is served under")
    cache_salt: Salt | None = Field(None, description="prefixes are shared within one salt only")
    user: str | None = Field(None, description="changes nothing")


class ContinuationsBody(ScoreFields):
    """Our form: what may follow a prompt."""

    prompt: str | TokenIds
    continuations: Texts | IdLists


class LabelsBody(ScoreFields):
    """SGLang's form: which token follows a query and an item."""

    query: str | TokenIds
    items: str | Texts | IdLists
    label_token_ids: Annotated[TokenIds, Field(min_length=1, max_length=MAX_PROMPTS)]
    apply_softmax: bool | None = Field(None, description="over the labels; default: false")
    item_first: bool | None = Field(None, description="the item stands ahead; default: false")


FORMS: tuple[type[ContinuationsBody | LabelsBody], ...] = (ContinuationsBody, LabelsBody)
OWN = [set(form.model_fields) - set(ScoreFields.model_fields) for form in FORMS]


@dataclass(frozen=True, slots=True)
class Scored:
    """Ids of which those from `start` on are scored; `group`: which prompt they share."""

    ids: Sequence[int]
    start: int
    group: int


@router.post("/v1/score", openapi_extra=described(*FORMS))
async def score(request: Request) -> Response:
    """Log-probabilities of continuations, or probabilities of labels."""
    service = service_of(request)
    body = _parse(decode(await read_body(request)))
    warnings = unknown_fields(unknown_in(body, {}), is_strict(request))
    service.check_model(body.model)
    id = new_id("score")
    if isinstance(body, ContinuationsBody):
        scored = await _continuations(service, body)
        field = "continuations"
    else:
        scored = await _labels(service, body)
        field = "items"
    check_answers(len(scored), field)
    with in_words_of_the_client({"prompt": field}):
        asks = [_ask(each, id, body.cache_salt or "") for each in scored]
        answers = open_answers(request, id, asks, warnings)
    wholes = await fold(request, answers)
    content = await asyncio.to_thread(_spell, body, wholes)
    more = {"model": service.model.names[0], "usage": _usage(wholes)}
    return json_reply({"id": id, **content, **more, **warnings_entry(answers.warnings)})


def _parse(value: dict[str, Any]) -> ContinuationsBody | LabelsBody:
    """The form is told by the fields that only one of them has. Raises ApiError."""
    refuse_unsupported({name: (value.get(name), None) for name in UNSERVED})
    present = {name for name in value if value[name] is not None}
    given = [sorted(own & present) for own in OWN]
    if all(given):
        raise refused(f"{given[0][0]} and {given[1][0]} are of two forms: use one", given[1][0])
    return parse_value(value, FORMS[bool(given[1])])


def _ask(scored: Scored, id: str, namespace: str) -> Ask:
    return Ask(
        scored.ids,
        NO_TOKENS,
        wants=Wants(prompt_logprobs_from=scored.start - 1, top=1),
        group=f"{id}-{scored.group}",
        namespace=namespace,
    )


# What is scored


async def _continuations(service: Service, body: ContinuationsBody) -> list[Scored]:
    """Two texts are tokenized together, as they would be read; else each for itself."""
    prompt, texts = body.prompt, [each for each in body.continuations if isinstance(each, str)]
    if not prompt:
        raise refused("prompt is empty: nothing would stand before a continuation", "prompt")
    for index, each in enumerate(body.continuations):
        if not each:
            raise refused(f"continuations.{index} is empty", f"continuations.{index}")
    if isinstance(prompt, str) and texts:
        return await _jointly(service, prompt, texts)
    head = prompt if isinstance(prompt, list) else (await service.encode([prompt], "prompt"))[0]
    tails = [each for each in body.continuations if isinstance(each, list)]
    if texts:
        with in_words_of_the_client({"prompt": "continuations"}):
            tails = await asyncio.to_thread(service.model.tokenizer.encode_batch, texts, False)
    return [Scored([*head, *tail], len(head), 0) for tail in tails]


async def _jointly(service: Service, prompt: str, texts: Sequence[str]) -> list[Scored]:
    size = len(prompt) * len(texts) + sum(map(len, texts))
    if size > MAX_TEXT:
        raise refused(
            f"continuations with their prompt have {size:,} characters, {MAX_TEXT:,} are allowed",
            "continuations",
        )
    wholes = [prompt, *(prompt + text for text in texts)]
    head, *ids = await service.encode(wholes, "continuations")
    return await asyncio.to_thread(_all_behind, head, ids)


def _all_behind(head: Sequence[int], wholes: Sequence[Sequence[int]]) -> list[Scored]:
    return [_behind(head, whole, index) for index, whole in enumerate(wholes)]


def _behind(head: Sequence[int], whole: Sequence[int], index: int) -> Scored:
    """The tokens of `whole` that the prompt alone, `head`, would not have. Raises ApiError."""
    same = (here for here, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b)
    start = next(same, min(len(head), len(whole)))
    name = f"continuations.{index}"
    if not 0 < start < len(whole):
        raise refused(f"{name} and the prompt become one token: give both as token ids", name)
    return Scored(whole, start, 0)


async def _labels(service: Service, body: LabelsBody) -> list[Scored]:
    """Each label behind each item, item by item. Raises ApiError."""
    vocabulary = service.model.spec.vocabulary
    for label in body.label_token_ids:
        if not 0 <= label < vocabulary:
            message = f"label_token_ids holds {label}, outside the vocabulary of {vocabulary}"
            raise refused(message, "label_token_ids")
    prompts = await _items(service, body)
    check_answers(len(prompts) * len(body.label_token_ids), "items")
    return [
        Scored([*prompt, label], len(prompt), group)
        for group, prompt in enumerate(prompts)
        for label in body.label_token_ids
    ]


async def _items(service: Service, body: LabelsBody) -> list[list[int]]:
    """The ids of query and item, in their order."""
    items = [body.items] if isinstance(body.items, str) else body.items
    texts = [each for each in items if isinstance(each, str)]
    lists = [each for each in items if isinstance(each, list)]
    query = body.query
    if isinstance(query, str) and texts:
        joined = [text + query if body.item_first else query + text for text in texts]
        found = await service.encode(joined, "items")
    elif isinstance(query, list) and lists:
        found = [each + query if body.item_first else query + each for each in lists]
    else:
        raise refused("items must be texts where query is one, and token ids where it is", "items")
    if not all(found):
        raise refused("items must not be empty beside an empty query", "items")
    return found


# What is said of it


def _spell(body: ContinuationsBody | LabelsBody, wholes: Sequence[Whole]) -> dict[str, Any]:
    """Heavy with many long continuations: for a thread."""
    if isinstance(body, ContinuationsBody):
        scores = [_continuation(index, whole) for index, whole in enumerate(wholes)]
        return {"object": "score", "scores": scores}
    logprobs = [whole.prompt_logprobs[0].logprob for whole in wholes]
    spread = _softmax if body.apply_softmax else _probabilities
    rows = [spread(row) for row in _rows(logprobs, len(body.label_token_ids))]
    return {"object": "scoring", "scores": rows}


def _continuation(index: int, whole: Whole) -> dict[str, Any]:
    found = whole.prompt_logprobs
    total = math.fsum(each.logprob for each in found)
    return {
        "index": index,
        "logprob": total,
        "mean_logprob": total / len(found),
        "greedy": all(each.logprob >= each.top[0][1] for each in found),
        "token_ids": [each.token for each in found],
        "token_logprobs": [each.logprob for each in found],
    }


def _rows(values: Sequence[float], width: int) -> Iterator[Sequence[float]]:
    return (values[start : start + width] for start in range(0, len(values), width))


def _probabilities(logprobs: Sequence[float]) -> list[float]:
    return [math.exp(each) for each in logprobs]


def _softmax(logprobs: Sequence[float]) -> list[float]:
    best = max(logprobs)
    weights = [math.exp(each - best) for each in logprobs]
    return [weight / sum(weights) for weight in weights]


def _usage(wholes: Sequence[Whole]) -> dict[str, Any]:
    tokens = sum(whole.answer.prompt_tokens for whole in wholes)
    cached = sum(whole.answer.cached_tokens for whole in wholes)
    details = {"cached_tokens": cached}
    return {"prompt_tokens": tokens, "total_tokens": tokens, "prompt_tokens_details": details}
