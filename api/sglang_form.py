"""SGLang's form of `POST /generate`: text or ids in, `{text, output_ids, meta_info}` out.

Streamed as server-sent events. A list of prompts, or `n` more than 1, is answered by a list, prompt
by prompt and n by n, and by events that say their `index`. A list in `rid` names the answers of
each prompt; one name for several answers gets their index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, TypeAlias, TypeVar

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from api.answers import Answers, Ask
from api.bodies import (
    MAX_PROMPTS,
    Form,
    Name,
    Priority,
    Salt,
    Texts,
    TokenIds,
    in_words_of_the_client,
    one_of,
    parse_value,
    unknown_fields,
    unknown_in,
)
from api.errors import refused
from api.generate_fields import GenerateFields
from api.replies import json_reply
from api.sampling_fields import check_answers
from api.service import Service, is_strict, new_id, open_answers, service_of
from api.sglang_answers import Record, SglangFrames, Telling
from api.streaming import AnswerStream, fold
from backend.interface import NOTHING_MORE, Wants

# SGLang knows these and nothing here does them: the value that asks for nothing, besides null.
UNSERVED: Mapping[str, Any] = {
    "input_embeds": None,
    "image_data": None,
    "video_data": None,
    "audio_data": None,
    "modalities": None,
    "mm_hashes": None,
    "mm_content_hashes": None,
    "use_audio_in_video": False,
    "video_config": None,
    "token_ids_logprob": None,
    "return_sampling_mask": False,
    "sampling_logprobs_mode": None,
    "return_flat_raw_top_logprobs": False,
    "return_flat_raw_output_top_logprobs": False,
    "return_flat_raw_top_logprobs_b64": False,
    "return_hidden_states": False,
    "return_routed_experts": False,
    "routed_experts_start_len": 0,
    "return_indexer_topk": False,
    "return_entropy": False,
    "return_bytes": False,
    "session_params": None,
    "lora_path": "",
    "lora_id": None,
    "custom_logit_processor": None,
    "multi_item_delimiter_indices": None,
    "token_indices_to_pool": None,
    "positional_embed_overrides": None,
    "bootstrap_host": None,
    "bootstrap_port": None,
    "bootstrap_room": None,
    "bootstrap_pair_key": None,
    "disagg_prefill_dp_rank": None,
    "decode_tp_size": None,
    "routed_dp_rank": None,
    "data_parallel_rank": None,
    "routing_key": None,
    "background": False,
    "require_reasoning": False,
    "max_thinking_tokens": None,
    "log_metrics": True,
    "custom_labels": None,
    "watermark": None,
}
SAMPLING_UNSERVED: Mapping[str, Any] = {"beam_width": 1, "custom_params": None, "watermark": None}
NONE_OF_THE_PROMPT = -1
MAX_INTERVAL = 1 << 20

Value = TypeVar("Value")
Each: TypeAlias = Annotated[list[Value], Field(fail_fast=True, max_length=MAX_PROMPTS)]


class SglangSampling(GenerateFields):
    """`sampling_params`. What it does not say is the model's generation_config."""

    sampling_seed: int | None = Field(None, description="answer i of n draws from it + i")
    stream_interval: int | None = Field(
        None, ge=1, le=MAX_INTERVAL, description="tokens from one event of a stream to the next"
    )
    spaces_between_special_tokens: bool | None = Field(
        None, description="changes nothing: tokens are joined as they are"
    )


class SglangBody(Form):
    """The body of a request. A list in a field of one prompt has a value for each of many."""

    model_config = one_of("text", "input_ids")

    text: str | Texts | None = None
    input_ids: (
        TokenIds | Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_PROMPTS)] | None
    ) = None
    sampling_params: SglangSampling | Each[SglangSampling] | None = None
    model: str | None = Field(None, description="one of the names that the model is served under")
    stream: bool | None = Field(None, description="default: false")
    rid: Name | Each[Name] | None = Field(None, description="names the request, for its abortion")
    return_logprob: bool | Each[bool] | None = None
    logprob_start_len: int | Each[int] | None = Field(
        None, description="first prompt token in input_token_logprobs; -1: none"
    )
    top_logprobs_num: int | Each[int] | None = None
    return_text_in_logprobs: bool | None = None
    return_prompt_token_ids: bool | None = None
    priority: Priority | None = Field(None, description="who waits goes by it, higher ones first")
    extra_key: Salt | Each[Salt] | None = Field(
        None, description="prefixes are shared within one key only"
    )
    cache_salt: Salt | Each[Salt] | None = Field(None, description="another name of extra_key")
    receipt: bool | None = Field(None, description="say what each answer took")
    no_logs: bool | None = Field(None, description="changes nothing: no prompt is ever logged")
    session_id: str | None = Field(None, description="changes nothing")

    @property
    def source(self) -> str:
        """The field that the prompts stand in. Raises ApiError unless it is exactly one."""
        given = [name for name in ("text", "input_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise refused("give either text or input_ids", given[-1] if given else "text")
        return given[0]

    @property
    def batch(self) -> int | None:
        """How many prompts a list of prompts has; None: one prompt that stands by itself."""
        prompts = getattr(self, self.source)
        several = str if self.source == "text" else list
        many = isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], several)
        return len(prompts) if many else None

    def each(self, name: str, default: Any) -> list[Any]:
        """A field's value for each prompt. Raises ApiError for a list that does not match them."""
        value = getattr(self, name)
        if not isinstance(value, list):
            return [default if value is None else value] * (self.batch or 1)
        if self.batch is None:
            raise refused(f"{name} must be one value, not a list: there is one prompt", name)
        if len(value) != self.batch:
            raise refused(f"{name} has {len(value)} values for {self.batch} prompts", name)
        return value

    def samplings(self) -> list[tuple[str, SglangSampling]]:
        """For each prompt the path to its sampling parameters, and these. Raises ApiError."""
        path = "sampling_params"
        each = self.each(path, SglangSampling())
        listed = isinstance(self.sampling_params, list)
        return [(f"{path}.{i}" if listed else path, sampling) for i, sampling in enumerate(each)]

    def namespaces(self) -> list[str]:
        """Where each prompt's prefixes are shared. Raises ApiError."""
        if self.extra_key is not None and self.cache_salt is not None:
            raise refused("give either extra_key or cache_salt: they mean the same", "cache_salt")
        return self.each("extra_key" if self.cache_salt is None else "cache_salt", "")

    def wants(self) -> list[Wants]:
        """What each prompt's answers carry. Raises ApiError or RequestRefused."""
        asked = self.each("return_logprob", False)
        starts = self.each("logprob_start_len", NONE_OF_THE_PROMPT)
        tops = self.each("top_logprobs_num", 0)
        return [
            Wants(True, None if start == NONE_OF_THE_PROMPT else start, top)
            if yes
            else NOTHING_MORE
            for yes, start, top in zip(asked, starts, tops, strict=True)
        ]

    def warnings(self, strict: bool, vocabulary: int) -> list[str]:
        """Of fields that nothing here knows, and of what is without effect. Raises ApiError for one
        that is not served, and when `strict` for one that is not known.
        """
        found = unknown_in(self, UNSERVED)
        for path, sampling in self.samplings():
            found |= unknown_in(sampling, SAMPLING_UNSERVED, f"{path}.")
        return [
            *unknown_fields(found, strict),
            *self._without_effect(),
            *self._impossible_stops(strict, vocabulary),
        ]

    def _impossible_stops(self, strict: bool, vocabulary: int) -> list[str]:
        """Of stop tokens that the model does not have, which SGLang lets pass: its clients send
        those of several models at once.
        """
        found: dict[str, None] = {}
        for path, sampling in self.samplings():
            name = f"{path}.stop_token_ids"
            beyond = [id for id in sampling.stop_token_ids or () if id >= vocabulary]
            if beyond and strict:
                raise refused(f"{name}: {beyond[0]} is not below {vocabulary}", name)
            if beyond:
                found[f"{name}: {beyond[0]} is not a token of this model and was ignored"] = None
        return list(found)

    def _without_effect(self) -> list[str]:
        """Of log-probabilities that are described and not asked for, which SGLang lets pass."""
        if any(self.each("return_logprob", False)):
            return []
        asked = {
            "logprob_start_len": set(self.each("logprob_start_len", NONE_OF_THE_PROMPT))
            - {NONE_OF_THE_PROMPT},
            "top_logprobs_num": set(self.each("top_logprobs_num", 0)) - {0},
        }
        return [f"{name} has no effect without return_logprob" for name in asked if asked[name]]


async def respond(request: Request, value: dict[str, Any]) -> Response:
    """The answer to a body in this form. Raises ApiError, EngineError or ClientGone."""
    service = service_of(request)
    body = parse_value(value, SglangBody)
    service.check_model(body.model)
    warnings = body.warnings(is_strict(request), service.model.spec.vocabulary)
    rids = body.each("rid", None)
    if isinstance(body.rid, list) and len(set(rids)) < len(rids):
        raise refused("rid must give each prompt a name of its own", "rid")
    asks = await _asks(service, body)
    id = body.rid if isinstance(body.rid, str) else new_id("gen")
    with in_words_of_the_client(_words(body.source, "sampling_params")):
        answers = open_answers(request, id, asks, warnings, events=body.stream)
    many = body.batch is not None or len(answers.all) > 1
    records = _records(service, body, answers, asks, many)
    if body.stream:
        return AnswerStream(answers, SglangFrames(records, many))
    wholes = await fold(request, answers)
    for record, whole in zip(records, wholes, strict=True):
        await record.add_whole(whole)
    contents = [record.content(whole.finish) for record, whole in zip(records, wholes, strict=True)]
    return json_reply(contents if many else contents[0])


def _words(source: str, path: str) -> dict[str, str]:
    """What this form calls our fields."""
    return {
        **{name: f"{path}.{name}" for name in SglangSampling.model_fields},
        "seed": f"{path}.sampling_seed",
        "prompt": source,
        "top_logprobs": "top_logprobs_num",
        "prompt_logprobs_from": "logprob_start_len",
    }


async def _asks(service: Service, body: SglangBody) -> list[Ask]:
    """One for each prompt. What is wrong with the fields is said before a prompt is tokenized."""
    with in_words_of_the_client(_words(body.source, "sampling_params")):
        wants = body.wants()
    drafts = await _drafts(service, body)
    check_answers(sum(draft.n for draft in drafts), "sampling_params.n")
    namespaces = body.namespaces()
    prompts = await _prompts(service, body)
    listed = isinstance(body.rid, list) or body.batch is None
    names = body.each("rid", None) if listed else [None] * len(prompts)
    return [
        replace(
            draft,
            prompt=prompt,
            wants=wanted,
            namespace=namespace,
            priority=body.priority or 0,
            name=name,
        )
        for draft, prompt, wanted, namespace, name in zip(
            drafts, prompts, wants, namespaces, names, strict=True
        )
    ]


async def _drafts(service: Service, body: SglangBody) -> list[Ask]:
    """How the answers to each prompt are drawn. Raises ApiError or RequestRefused."""
    model, samplings = service.model, body.samplings()
    listed = isinstance(body.sampling_params, list)
    drafts = []
    for path, sampling in samplings if listed else samplings[:1]:
        with in_words_of_the_client(_words(body.source, path)):
            draft = sampling.ask(model.defaults, model.tokenizer, f"{path}.")
            await sampling.check(draft, f"{path}.")
        kept = tuple(id for id in draft.sampling.stop_token_ids if id < model.spec.vocabulary)
        params = replace(draft.sampling, stop_token_ids=kept)
        drafts.append(replace(draft, sampling=params, seed=sampling.sampling_seed))
    return drafts if listed else drafts * len(samplings)


async def _prompts(service: Service, body: SglangBody) -> Sequence[Sequence[int]]:
    given = getattr(body, body.source)
    each = [given] if body.batch is None else given
    return await service.encode(each, "text") if body.source == "text" else each


def _records(
    service: Service, body: SglangBody, answers: Answers, asks: Sequence[Ask], many: bool
) -> list[Record]:
    """One for each answer, under the name that the client knows it by."""
    tokenizer, intervals = (
        service.model.tokenizer,
        [each.stream_interval for _, each in body.samplings()],
    )
    places = [
        (number, ask, interval)
        for ask, interval in zip(asks, intervals, strict=True)
        for number in range(ask.n)
    ]
    records = []
    for answer, (number, ask, interval) in zip(answers.all, places, strict=True):
        name = f"{answers.id}_{answer.index}" if many else answers.id
        if ask.name is not None:
            name = f"{ask.name}_{number}" if ask.n > 1 else ask.name
        telling = Telling(
            texts=bool(body.return_text_in_logprobs),
            prompt=bool(body.return_prompt_token_ids),
            receipt=bool(body.receipt),
            interval=interval or 1,
            warnings=answers.warnings,
        )
        records.append(Record(name, answer, ask, tokenizer, telling))
    return records
