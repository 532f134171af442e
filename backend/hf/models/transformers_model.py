"""Any causal language model of transformers, by its own modelling code, over our pages.

Chosen for architectures that have no model file here; imports transformers, so it is imported only
then.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from backend.hf.attention import KvGeometry, PagedAttention
from backend.hf.batch import ForwardBatch
from backend.hf.models import CausalModel, ModelConfig
from backend.hf.models.transformers_attention import EAGER, STEP, PagedStep, StepAttention
from backend.hf.models.transformers_probe import probe
from backend.interface import ModelBroken, Unsupported, first_line

Untyped = Any  # transformers' models, and most of their methods, carry no types
AUTO_MODEL: Untyped = AutoModelForCausalLM
DUMMY_SEED = 0
PAGED_LAYERS = {"full_attention", "sliding_attention"}  # of transformers' names for layers
MOVING_ROPES = ("dynamic", "longrope")  # frequencies follow the largest position of a forward pass

# What families do to the head's output, in this order, by the name of the number in their config.
# The probe refuses a model that does anything else.
LOGIT_STEPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logit_scale": torch.mul,
    "logits_scaling": torch.div,
    "final_logit_softcapping": lambda logits, cap: cap * torch.tanh(logits / cap),
}


class TransformersModel:
    """A `CausalModel` that drives transformers' modelling code."""

    def __init__(self, name: str, model: Untyped, device: str) -> None:
        config = model.config.get_text_config(decoder=True)
        self.name = name
        self.model = model
        self.layers: int = config.num_hidden_layers
        self._decoder: nn.Module = model.get_decoder()
        self._head: nn.Module = model.get_output_embeddings()
        self._logit_steps = [
            (apply, value)
            for field, apply in LOGIT_STEPS.items()
            if (value := getattr(config, field, None)) is not None
        ]
        table, head = model.get_input_embeddings().weight, self._head.weight
        self.vocabulary: int = len(head)
        self.parameters: int = sum(weight.numel() for weight in model.parameters())
        looked_up = 0 if table is head else table.nbytes  # a lookup reads a row of it
        self.weight_bytes: int = sum(weight.nbytes for weight in model.parameters()) - looked_up
        self.geometry: KvGeometry = probe(self, device)

    def hidden(self, batch: ForwardBatch, attention: PagedAttention) -> Tensor:
        step = PagedStep(batch, attention)
        return self.run(batch.token_ids[None], batch.positions[None], step)[0]

    def run(self, token_ids: Tensor, positions: Tensor, step: StepAttention) -> Tensor:
        """Final hidden states: token_ids, positions [1, tokens] to [1, tokens, hidden]."""
        state = self._decoder(
            input_ids=token_ids, position_ids=positions, use_cache=False, **{STEP: step}
        )
        hidden: Tensor = state.last_hidden_state
        return hidden

    def run_eager(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """transformers' own answer, when set to eager attention: hidden states and logits of whole
        sequences, token_ids [rows, tokens].
        """
        state = self._decoder(input_ids=token_ids, use_cache=False)
        return state.last_hidden_state, self.model(input_ids=token_ids, use_cache=False).logits

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        logits: Tensor = self._head(hidden).float()
        for apply, value in self._logit_steps:
            logits = apply(logits, value)
        return logits if out is None else out.copy_(logits)


def build_transformers_model(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: str,
    trust_remote_code: bool,
    dummy: bool,
    context: int = 0,
) -> CausalModel:
    """The model in `folder` (config.json, and safetensors unless `dummy`), proven to run.

    `context`: positions a sequence may reach; 0: the config's own number. Raises Unsupported naming
    the architecture, and ModelBroken when weights are missing or damaged.
    """
    name = (config.get("architectures") or [config.get("model_type", "this model")])[0]
    try:
        foreign = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        _refuse_config(name, foreign, context)
        model = (
            _dummy(foreign, dtype, device, trust_remote_code)
            if dummy
            else _read(folder, foreign, dtype, trust_remote_code)
        )
    except (OSError, SafetensorError) as error:
        raise ModelBroken(f"weights of {name} in {folder}: {first_line(error)}") from error
    except (ValueError, KeyError, ImportError) as error:
        raise Unsupported(
            f"{name} is no causal language model of transformers {transformers.__version__}:"
            f" {first_line(error)}"
        ) from error
    if model.get_output_embeddings() is None:
        raise Unsupported(f"{name} has no head over a vocabulary: choose a language model")
    model = model.eval().requires_grad_(False).to(device)
    return TransformersModel(name, model, device)


def _read(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool
) -> Untyped:
    model, report = AUTO_MODEL.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=EAGER,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,  # reported below, by name
        output_loading_info=True,
    )
    wrong = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if wrong:
        raise ModelBroken(
            f"{folder}: {len(wrong)} weights are missing or of another shape than config.json"
            f" says, the first is {wrong[0]}: fetch the model again"
        )
    return model


def _dummy(
    config: PreTrainedConfig, dtype: torch.dtype, device: str, trust_remote_code: bool
) -> Untyped:
    """Random weights as transformers draws them, the same in every process."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(DUMMY_SEED)
        return AUTO_MODEL.from_config(
            config, dtype=dtype, attn_implementation=EAGER, trust_remote_code=trust_remote_code
        )


def _refuse_config(name: str, config: PreTrainedConfig, context: int) -> None:
    """What the probe's short passes would not show."""
    if config.is_encoder_decoder:
        raise Unsupported(f"{name} is an encoder-decoder model: choose a decoder-only one")
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or PAGED_LAYERS)
    if other := sorted(kinds - PAGED_LAYERS):
        raise Unsupported(
            f"{name} has layers of kind {', '.join(other)}; only {', '.join(sorted(PAGED_LAYERS))}"
            " run on paged attention: choose another model"
        )
    longest = getattr(text, "max_position_embeddings", 0)
    context = context or longest
    for rope in _ropes(getattr(text, "rope_parameters", None) or {}):
        until = rope.get("original_max_position_embeddings", longest)
        if rope.get("rope_type") in MOVING_ROPES and context > until:
            raise Unsupported(
                f"{name} rotates every token by the longest position of its batch"
                f" (rope_type {rope['rope_type']}) beyond {until}: set MAX_MODEL_LEN={until}"
            )


def _ropes(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Rotary parameters are one dict, or one a kind of layer."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]
