"""What this backend takes from mlx-lm, all of it: its names change from release to release.

Owned by the backend; one thread. Everything that computes does so on `Library.stream`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.utils import get_total_parameters, load_model

PromptCache: TypeAlias = list[Any]  # what each layer keeps of one sequence
Processor: TypeAlias = Callable[[mx.array, mx.array], mx.array]
Sampler: TypeAlias = Callable[[mx.array], mx.array]

ENDLESS = 1 << 40  # tokens: when an answer ends is ours to say
# Caches grow by 256 positions at a time, so that these two lengths differ by what is in between.
SHORT, LONG = 256, 512


class Model:
    """A loaded model. Logits are float32: log-probabilities in bfloat16 would make ties."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, ids: mx.array, cache: PromptCache) -> mx.array:
        """Logits [rows, positions, vocabulary] of `ids` [rows, positions], which enter `cache`.

        Nothing is computed before somebody asks for it: logits that nobody reads cost nothing.
        """
        return self._inner(ids, cache=cache).astype(mx.float32)

    def new_cache(self) -> PromptCache:
        """The cache of a sequence that has no position yet."""
        found: PromptCache = make_prompt_cache(self._inner)
        return found

    @property
    def weights(self) -> dict[str, mx.array]:
        """By name."""
        return dict(tree_flatten(self._inner.parameters()))

    @property
    def parameters(self) -> int:
        """Elements of all weights, those of packed ones counted one by one."""
        return int(get_total_parameters(self._inner))


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model turns out to be."""

    vocabulary: int  # width of the logits
    dtype: str  # of what it computes
    parameters: int
    weight_bytes: int  # that a decode step reads
    token_bytes: int  # of a position in all layers' caches; 0: they do not grow


def load(folder: Path, dtype: str, config: dict[str, Any], trust_remote_code: bool) -> Model:
    """The model of a folder, with `config` over its own, its weights as `dtype` ("auto": as they
    are stored). Raises whatever mlx-lm does.
    """
    inner, _ = load_model(
        folder, lazy=True, model_config=config, trust_remote_code=trust_remote_code
    )
    if dtype != "auto":
        _cast(inner, getattr(mx, dtype))
    mx.eval(inner.parameters())
    return Model(inner)


def _cast(inner: Any, dtype: mx.Dtype) -> None:
    """Hold weights as `dtype`, but those that are packed, or that the model wants as they are."""
    casts = getattr(inner, "cast_predicate", lambda name: True)

    def cast(name: str, weight: mx.array) -> mx.array:
        floating = mx.issubdtype(weight.dtype, mx.floating)
        return weight.astype(dtype) if floating and casts(name) else weight

    inner.update(tree_map_with_path(cast, inner.parameters()))


def can_cut(cache: PromptCache) -> bool:
    """Whether `cut` may be asked to shorten it. A state that all positions share cannot be."""
    return bool(can_trim_prompt_cache(cache))


def cut(cache: PromptCache, positions: int) -> None:
    """Take that many positions off its end."""
    if positions:
        trim_prompt_cache(cache, positions)


def copied(cache: PromptCache) -> PromptCache:
    """One that can be changed. They share memory until then."""
    return copy.deepcopy(cache)


def start_computing(cache: PromptCache) -> None:
    """Do not wait for it; without this a cache taken out of a batch would hold all of it."""
    mx.async_eval([each.state for each in cache])


class Progress(NamedTuple):
    """How far the prompt of a row has come."""

    row: int
    computed: int  # positions, of those it was added with
    done: bool  # all of them, and its first token is drawn


class Batch:
    """Rows that mlx-lm computes together. It draws a token ahead of those that it hands out."""

    def __init__(self, model: Model, rows: int, prompt_tokens: int, stream: Any) -> None:
        """`rows` at most; `prompt_tokens` of each prompt are computed in a step."""
        self._generator = BatchGenerator(
            model,
            completion_batch_size=rows,
            prefill_batch_size=rows,
            prefill_step_size=prompt_tokens,
            stream=stream,
        )

    def add(
        self,
        ids: Sequence[int],
        held: int,
        cache: PromptCache,
        processors: Sequence[Processor] = (),
        sampler: Sampler | None = None,
    ) -> int:
        """A new row: `ids`, of which `cache` holds the first `held`, fewer than all. Returns its
        number. Rows without a sampler take the most probable token, all of them at once.
        """
        (row,) = self._generator.insert(
            [list(ids[held:])],
            max_tokens=[ENDLESS],
            caches=[cache],
            all_tokens=[list(ids[:held])],
            samplers=[sampler],
            logits_processors=[list(processors)],
        )
        return int(row)

    def step(self) -> tuple[list[Progress], list[tuple[int, int]]]:
        """Decode a token of each row whose prompt is done, and go on with the other prompts.
        Returns news of prompts, and (row, token).
        """
        prompts, tokens = self._generator.next()
        return (
            [Progress(each.uid, each.progress[0], each.end_of_prompt) for each in prompts],
            [(each.uid, int(each.token)) for each in tokens],
        )

    def extract(self, row: int) -> tuple[PromptCache, list[int]]:
        """A copy of what is cached of a row, and the ids that it holds."""
        cache, ids = self._generator.extract_cache([row])[row]
        return cache, list(ids)

    def remove(self, rows: Sequence[int]) -> None:
        """Forget rows, whatever they were doing."""
        self._generator.remove(list(rows))

    def close(self) -> None:
        """Give back what the device was told to hold."""
        self._generator.close()
        mx.clear_cache()


def look_at(model: Model, stream: Any) -> Shape:
    """Find out by asking: a token is drawn, so that what cannot run, or not in a batch, fails
    here. To be called on `stream`.
    """
    batch = Batch(model, 1, 1, stream)
    row = batch.add([0], 0, model.new_cache())
    while not batch.step()[1]:
        continue
    cache, _ = batch.extract(row)
    batch.close()
    held = next(each for _, each in tree_flatten([each.state for each in cache]) if _floats(each))
    return Shape(
        vocabulary=int(model(mx.zeros((1, 1), dtype=mx.int32), model.new_cache()).shape[-1]),
        dtype=str(held.dtype).removeprefix("mlx.core."),
        parameters=model.parameters,
        weight_bytes=_bytes_read(model.weights),
        token_bytes=(_cache_bytes(model, LONG) - _cache_bytes(model, SHORT)) // (LONG - SHORT),
    )


def _bytes_read(weights: Mapping[str, mx.array]) -> int:
    """What a decode step reads of weights: of a table that is no head, a row alone."""
    untied = any("lm_head" in name for name in weights)
    read = [weight for name, weight in weights.items() if not (untied and "embed_tokens" in name)]
    return sum(int(weight.nbytes) for weight in read)


def _floats(value: object) -> bool:
    return isinstance(value, mx.array) and bool(mx.issubdtype(value.dtype, mx.floating))


def _cache_bytes(model: Model, positions: int) -> int:
    """What a cache of so many positions takes. Nothing is computed for it."""
    cache = model.new_cache()
    model(mx.zeros((1, positions), dtype=mx.int32), cache)
    return sum(int(each.nbytes) for each in cache)


def open_stream(device: str) -> Any:
    """Where a backend on `device` computes, from whichever thread it is used."""
    return mx.new_thread_local_stream(mx.gpu if device == "mps" else mx.cpu)


def computing(stream: Any) -> AbstractContextManager[Any]:
    """Let what is done within compute on `stream`."""
    found: AbstractContextManager[Any] = mx.stream(stream)
    return found


def has_metal() -> bool:
    """Whether there is an Apple GPU that mlx can use."""
    return bool(mx.metal.is_available())


def recommended_bytes() -> int:
    """What the GPU may use at most before the system suffers."""
    return int(mx.device_info()["max_recommended_working_set_size"])


def active_bytes() -> int:
    """What arrays take now."""
    return int(mx.get_active_memory())
