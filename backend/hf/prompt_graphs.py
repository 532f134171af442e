"""What stands between the attentions of a step that holds prompts, as CUDA graphs, by the number of
tokens (piecewise graphs, as vLLM and SGLang name them).

Attention itself is launched as ever, so that one set of graphs serves every mix of decodes and
chunks. Without graphs a step is bound by its launches: about ten a layer, each tens of microseconds
of the host. A step of fewer tokens than its graphs have is padded: padding writes to the spare page
and no attention reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from backend.hf.attention import PagedAttention
from backend.hf.batch import ForwardBatch
from backend.hf.cuda_graphs import Recorder, Sizes, ladder
from backend.hf.models.decoder import Decoder, Flow

# Tokens: (up to, apart). More are bound by the device.
STEPS = ((128, 32), (256, 64), (512, 128), (1024, 256), (1 << 30, 512))
MOST_TOKENS = 4096


@dataclass(frozen=True, eq=False, slots=True)
class Captured:
    """The graphs of one size: between attentions, so one more than there are layers."""

    graphs: list[torch.cuda.CUDAGraph]
    flow: Flow
    hidden: Tensor  # [size, hidden]: what the last one leaves


class PromptGraphs:
    """The prompt graphs of one executor."""

    def __init__(
        self,
        model: Decoder,
        attention: PagedAttention,
        recorder: Recorder,
        largest: int,
        spare_row: int,
        device: str,
    ) -> None:
        """`largest`: tokens of a step; `spare_row`: the first row of the spare page."""
        self._model = model
        self._attention = attention
        self._recorder = recorder
        self._sizes = Sizes(ladder(min(largest, MOST_TOKENS), STEPS), self._capture)
        self._spare_row = spare_row
        # token ids, positions and places of a step
        shape = 3, self._sizes.largest
        self._inputs = torch.zeros(shape, dtype=torch.int64, device=device)
        self._room = model.room(self._sizes.largest)
        self._room.mixed.zero_()  # padding is what earlier steps left, and never garbage

    def hidden(self, batch: ForwardBatch) -> Tensor | None:
        """Final hidden states [tokens, hidden] of a step, good until the next one. None where its
        size is not captured yet, or too large.
        """
        tokens = len(batch.token_ids)
        found = self._sizes.find(tokens)
        if found is None:
            return None
        size, captured = found
        torch.stack(
            (batch.token_ids, batch.positions, batch.write_at), out=self._inputs[:, :tokens]
        )
        self._inputs[2, tokens:size].fill_(self._spare_row)
        captured.graphs[0].replay()
        for layer, graph in enumerate(captured.graphs[1:]):
            self._model.attend(layer, captured.flow, batch, self._attention)
            graph.replay()
        return captured.hidden[:tokens]

    def prepare(self) -> bool:
        """Capture one more size. False: all of them are there."""
        return self._sizes.prepare()

    def _capture(self, size: int) -> Captured:
        model, pools, room = self._model, self._attention.pools, self._room.first(size)
        token_ids, positions, write_at = self._inputs[:, :size]
        write_at.fill_(self._spare_row)

        def enter() -> Flow:
            return model.enter(token_ids, positions, write_at, pools, room)

        flow = enter()  # each part once, before it is recorded
        if model.layers > 1:
            model.advance(0, flow, pools)
        model.leave(flow)
        first, flow = self._recorder.record(enter)
        graphs = [first]
        for layer in range(model.layers - 1):
            graph, _ = self._recorder.record(partial(model.advance, layer, flow, pools))
            graphs.append(graph)
        last, hidden = self._recorder.record(lambda: model.leave(flow))
        return Captured([*graphs, last], flow, hidden)
