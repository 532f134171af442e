"""What every handler works with: the pool, the tokenizer, the model's name and defaults.

One for each server; handlers find it by `service_of(request)`. It serves from the moment that the
first engine is ready; before that, and while it drains, whatever needs a model raises Unavailable.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from fastapi import Request

from api.answers import Answers, Ask
from api.dialect import Dialect
from api.errors import model_not_found, refused
from api.response_store import ResponseStore
from api.sampling_fields import SamplingDefaults
from backend.interface import BackendSpec, RequestRefused, TooLong, Unavailable
from backend.tokenizer import Tokenizer, open_tokenizer
from config import DialectSettings, Settings
from engine.multi_device import REFUSALS, EnginePool

SLICE = 1 << 20  # characters that are tokenized at a time


@dataclass(frozen=True, slots=True)
class Model:
    """What is known of the model once an engine has told its spec."""

    spec: BackendSpec
    tokenizer: Tokenizer
    defaults: SamplingDefaults
    names: tuple[str, ...]  # that a request may call it by; the first is shown
    dialect: Dialect
    created: int = field(default_factory=lambda: int(time.time()))  # when it was ready; unix time

    @staticmethod
    def open(spec: BackendSpec, alias: str | None, dialect: DialectSettings) -> Model:
        """Read the model's tokenizer and generation_config.json. Raises StartFailed."""
        folder = PurePath(spec.folder).name if spec.folder else None
        names = dict.fromkeys(name for name in (alias, spec.model, folder) if name)
        tokenizer = open_tokenizer(spec.folder, spec.vocabulary)
        return Model(
            spec,
            tokenizer,
            SamplingDefaults.of(spec.folder),
            tuple(names),
            Dialect.of(tokenizer, dialect),
        )


class Service:
    """Requests in, answers out, for handlers of any API."""

    def __init__(self, settings: Settings, pool: EnginePool) -> None:
        self.settings = settings
        self.pool = pool
        self.responses = ResponseStore()
        self._model: Model | None = None

    @property
    def model(self) -> Model:
        """Raises Unavailable until it is there."""
        if self._model is None:
            raise Unavailable(REFUSALS["starting"])
        return self._model

    async def wait_for_model(self) -> None:
        """Return when the first engine is ready and its tokenizer is loaded. Raises StartFailed."""
        spec = await self.pool.ready()
        alias, dialect = self.settings.server.alias, self.settings.dialect
        self._model = await asyncio.to_thread(Model.open, spec, alias, dialect)

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 for a model that is not this one."""
        if name is not None and name not in self.model.names:
            raise model_not_found(name)

    async def encode(self, texts: Sequence[str], param: str) -> list[list[int]]:
        """Token ids of prompts, special tokens added. Raises RequestRefused naming `param`."""
        for text in texts:
            self._check_size(text, param)
        ids: list[list[int]] = []
        for some in _slices(texts):
            ids += await asyncio.to_thread(self._encode, some, True, param)
        return ids

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        edit: Callable[[str], str] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, by the model's own template; `edit` makes of its text what
        is encoded. Raises RequestRefused.
        """
        model = self.model

        def render() -> list[int]:
            told, shown = model.dialect.worded(messages, tools)
            text = model.tokenizer.render(
                told,
                tools=shown,
                add_generation_prompt=add_generation_prompt,
                **(template_kwargs or {}),
            )
            text = text if edit is None else edit(text)
            self._check_size(text, "messages")
            return self._encode([text], False, "messages")[0]

        return await asyncio.to_thread(render)

    def _encode(self, texts: Sequence[str], special: bool, param: str) -> list[list[int]]:
        try:
            return self.model.tokenizer.encode_batch(texts, special)
        except RequestRefused as error:
            raise RequestRefused(f"{param}: {error}", param) from None

    def _check_size(self, text: str, param: str) -> None:
        """Refuse what cannot fit before it is tokenized: no token is longer than the longest."""
        spec, longest = self.model.spec, self.model.tokenizer.longest
        if longest and len(text) > spec.max_model_len * longest:
            raise TooLong(
                f"{param} of {len(text):,} characters exceeds the context of "
                f"{spec.max_model_len:,} tokens: shorten it",
                param,
            )

    def open(
        self,
        id: str,
        asks: Sequence[Ask],
        owner: str,
        warnings: Sequence[str] = (),
        *,
        progress: bool = False,
    ) -> Answers:
        """Start the answers of one request, all or none; `progress`: the engine tells of it.

        Raises RequestRefused, Overloaded or Unavailable. Who opens closes.
        """
        model = self.model
        answers = Answers(id, self.pool, list(warnings), progress)
        answers.open(asks, model.tokenizer, owner, self.settings.generation.max_new_tokens)
        return answers


def _slices(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """`texts` in runs of about SLICE characters: the tokenizer takes a hundred bytes for each."""
    start = size = 0
    for index, text in enumerate(texts):
        size += len(text)
        if size > SLICE:
            yield texts[start : index + 1]
            start, size = index + 1, 0
    if start < len(texts):
        yield texts[start:]


def new_id(prefix: str) -> str:
    """A name that no other request has."""
    return f"{prefix}-{secrets.token_hex(12)}"


def service_of(request: Request) -> Service:
    """The server's service."""
    service: Service = request.app.state.service
    return service


def is_strict(request: Request) -> bool:
    """Whether a field that nothing here knows is refused, on whatever route: because the server
    was started so (STRICT_FIELDS), or because this request asks for it (`x-strict: 1`).
    """
    asked = _switched_on(request, "x-strict")
    return service_of(request).settings.server.strict_fields or asked


def open_answers(
    request: Request,
    id: str,
    asks: Sequence[Ask],
    warnings: Sequence[str] = (),
    *,
    events: bool | None = False,
) -> Answers:
    """Start the answers to a request, for its owner. `events`: they leave as a stream of events,
    which tells of its progress to who sends `x-progress: 1`: simple clients choke on comments.

    Raises ApiError, and what `Service.open` raises.
    """
    asked = _switched_on(request, "x-progress")
    service, progress = service_of(request), asked and bool(events)
    return service.open(id, asks, owner_of(request), warnings, progress=progress)


def _switched_on(request: Request, header: str) -> bool:
    """Whether a header that is 0 or 1 is 1. Raises ApiError 400 for anything else."""
    value = request.headers.get(header, "0")
    if value not in ("0", "1"):
        raise refused(f"{header} must be 0 or 1, got {value!r:.40}", header)
    return value == "1"


def owner_of(request: Request) -> str:
    """Who asks: the fingerprint of the API key, "" where none is wanted."""
    owner: str = request.scope.get("state", {}).get("owner", "")
    return owner
