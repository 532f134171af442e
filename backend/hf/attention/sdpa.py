"""Attention by torch's scaled_dot_product_attention over gathered pages: the CPU path, and the
reference of every kernel.

Grouped queries are a dimension of the query, never repeated keys: at decode [rows, kv_heads, group,
width] reads each key once for its whole group. A step gathers each layer's pages once, into memory
that is kept between steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backend.hf.attention import AttentionOptions, AttentionSetup
from backend.hf.attention.pools import kv_pools
from backend.hf.batch import DecodeGroup, DecodeRows, ForwardBatch, PrefillSpan

GATHERED_TOKENS = 1 << 14  # that decodes are gathered in at once, unless one row is longer


class SdpaAttention:
    """Owns the KV pool: one tensor a layer, [pages * page_tokens, row]."""

    def __init__(self, setup: AttentionSetup) -> None:
        self._geometry = setup.geometry
        self._page_tokens = setup.page_tokens
        self.pools = kv_pools(
            setup.geometry, setup.pages, setup.page_tokens, setup.dtype, setup.device
        )
        self._gathered = torch.empty(0, dtype=setup.dtype, device=setup.device)

    def attend(
        self,
        layer: int,
        query: Tensor,
        kv: Tensor,
        batch: ForwardBatch,
        options: AttentionOptions,
        output: Tensor,
    ) -> None:
        """See `PagedAttention.attend`."""
        pool = self.pools[layer]
        count = batch.decodes.count
        if count:
            self._decode(pool, query[:count], batch, options, output[:count])
        for span in batch.spans:
            own = slice(span.offset, span.offset + span.count)
            output[own] = self._prefill(pool, query[own], span, batch, options)

    def _decode(
        self,
        pool: Tensor,
        query: Tensor,
        batch: ForwardBatch,
        options: AttentionOptions,
        output: Tensor,
    ) -> None:
        """query [rows, heads, width] -> `output` [rows, heads, value_width]."""
        geometry = self._geometry
        key = batch.decodes, options.window
        if key not in batch.groups:
            batch.groups[key] = self._groups(batch.decodes, options.window, query.dtype)
        sinks = _sinks(options, (1, geometry.kv_heads, -1, 1))
        for group in batch.groups[key]:
            keys, values = self._gather(pool, group.pages)
            own = query[group.rows].unflatten(1, (geometry.kv_heads, -1))
            found = _attention(own, keys, values, group.mask, options, sinks)
            output[group.rows] = found.flatten(1, 2)

    def _groups(
        self, rows: DecodeRows, window: int | None, dtype: torch.dtype
    ) -> list[DecodeGroup]:
        """Rows whose lengths round up to the same power of two: one long row makes no other wait,
        and what is gathered at once has a bound.
        """
        members: dict[int, list[int]] = {}
        lengths = rows.lengths.tolist()
        for row, length in enumerate(lengths):
            members.setdefault(length.bit_length(), []).append(row)
        most = {bits: max(1, GATHERED_TOKENS >> bits) for bits in members}
        return [
            self._group(rows, alike[start : start + most[bits]], lengths, window, dtype)
            for bits, alike in members.items()
            for start in range(0, len(alike), most[bits])
        ]

    def _group(
        self,
        rows: DecodeRows,
        members: list[int],
        lengths: list[int],
        window: int | None,
        dtype: torch.dtype,
    ) -> DecodeGroup:
        pages = -(-max(lengths[row] for row in members) // self._page_tokens)
        own: Tensor | slice = slice(None)
        if len(members) < rows.count:
            own = torch.tensor(members, device=rows.slots.device)
        mask = _decode_mask(rows.lengths[own], pages * self._page_tokens, window, dtype)
        return DecodeGroup(own, rows.table[rows.slots[own], :pages], mask)

    def _prefill(
        self,
        pool: Tensor,
        query: Tensor,
        span: PrefillSpan,
        batch: ForwardBatch,
        options: AttentionOptions,
    ) -> Tensor:
        """query [count, heads, width] -> [count, heads, value_width]."""
        geometry = self._geometry
        end = span.start + span.count
        keys, values = (
            part[0, :, None, :end] for part in self._gather(pool, span.pages[None])
        )  # [kv_heads, 1, end, width]
        grouped = query.reshape(span.count, geometry.kv_heads, -1, geometry.key_width)
        grouped = grouped.permute(1, 2, 0, 3)  # [kv_heads, group, count, width]
        key = span, options.window
        if key not in batch.masks:
            batch.masks[key] = _chunk_mask(span, options.window, query.dtype)
        sinks = _sinks(options, (geometry.kv_heads, -1, 1, 1))
        mixed = _attention(grouped, keys, values, batch.masks[key], options, sinks)
        return mixed.permute(2, 0, 1, 3).reshape(span.count, -1, geometry.value_width)

    def _gather(self, pool: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of `pages` [rows, n]: [rows, kv_heads, n * page_tokens, width] each, views of one
        copy.
        """
        geometry = self._geometry
        rows, count = pages.shape
        whole = pool.view(-1, self._page_tokens * geometry.row)
        needed = pages.numel() * whole.shape[1]
        if self._gathered.numel() < needed:
            self._gathered = pool.new_empty(needed)
        target = self._gathered[:needed].view(pages.numel(), whole.shape[1])
        torch.index_select(whole, 0, pages.reshape(-1), out=target)
        tokens = target.view(rows, count * self._page_tokens, geometry.row)
        split = geometry.kv_heads * geometry.key_width
        keys = tokens[..., :split].view(rows, -1, geometry.kv_heads, geometry.key_width)
        values = tokens[..., split:].view(rows, -1, geometry.kv_heads, geometry.value_width)
        return keys.transpose(1, 2), values.transpose(1, 2)


def _sinks(options: AttentionOptions, shape: tuple[int, ...]) -> Tensor | None:
    """The sinks of the heads, shaped like their scores."""
    return None if options.sinks is None else options.sinks.view(shape)


def _decode_mask(lengths: Tensor, positions: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 at the positions that each row sees, -inf at the others: [rows, 1, 1, positions]."""
    at = torch.arange(positions, device=lengths.device)
    seen = at < lengths[:, None]
    if window is not None:
        seen &= at >= lengths[:, None] - window
    return _additive(seen, dtype)[:, None, None]


def _chunk_mask(span: PrefillSpan, window: int | None, dtype: torch.dtype) -> Tensor | None:
    """0 at the positions that each query of a chunk sees, -inf at the others: [count, positions].

    None: plainly causal from position 0.
    """
    if span.start == 0 and (window is None or window >= span.count):
        return None
    at = torch.arange(span.start + span.count, device=span.pages.device)
    queries = at[span.start :, None]
    seen = at <= queries
    if window is not None:
        seen &= at > queries - window
    return _additive(seen, dtype)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to scores, in the dtype that torch's kernel takes without converting."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)


def _attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    options: AttentionOptions,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax attention over four dimensions, the last two [queries, width] and [positions, width].

    `mask` None means causal. `sinks` are the options' own, shaped like the scores. Softcap and
    sinks are not in torch's kernel, so these two are spelled out.
    """
    keys = keys.expand(-1, query.shape[1], -1, -1)
    values = values.expand(-1, query.shape[1], -1, -1)
    # In float32 on CUDA torch's kernel is wrong under a mask for the last of 64 n + 1 queries
    # (torch 2.11: off by up to 0.66); the sums below are right.
    sound = not (query.is_cuda and query.dtype == torch.float32)
    if options.softcap is None and sinks is None and sound:
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=options.scale
        )
    scores = query.float() @ keys.transpose(-1, -2).float() * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is None:
        mask = torch.full_like(scores, -torch.inf).triu(1)
    scores = scores + mask
    if sinks is not None:
        sinks = sinks.float().expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[-2]]
    return (weights @ values.float()).to(values.dtype)
