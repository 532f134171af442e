"""Attention by our Triton kernels, which read the pages where they lie: the CUDA path.

A step is one launch a layer for its decodes and one for its chunks; nothing is gathered. Decodes
are cut by a launch of their own, once a step.
"""

from __future__ import annotations

from torch import Tensor

from backend.hf.attention import AttentionOptions, AttentionSetup
from backend.hf.attention.pools import kv_pools
from backend.hf.attention.triton_decode import DecodeAttention
from backend.hf.attention.triton_fixed import FixedAttention
from backend.hf.attention.triton_launch import Kernels, LayerCall
from backend.hf.attention.triton_prefill import PrefillAttention
from backend.hf.batch import ForwardBatch


class TritonAttention:
    """Owns the KV pool: one tensor a layer, [pages * page_tokens, row], on a CUDA device."""

    def __init__(self, setup: AttentionSetup) -> None:
        self.pools = kv_pools(
            setup.geometry, setup.pages, setup.page_tokens, setup.dtype, setup.device
        )
        kernels = Kernels(setup)
        fixed = FixedAttention(kernels)
        self._decode = fixed.decode if setup.deterministic else DecodeAttention(kernels)
        self._prefill = fixed.prefill if setup.deterministic else PrefillAttention(kernels)

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
        if query.stride(2) != 1:
            query = query.contiguous()
        if kv.stride(1) != 1:
            kv = kv.contiguous()
        call = LayerCall(layer, query, kv, self.pools[layer], output, options)
        if batch.decodes.count:
            self._decode(call, batch.decodes)
        if batch.spans:
            self._prefill(call, batch.spans)
