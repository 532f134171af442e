"""Models of transformers over our pages, each against transformers' own full forward pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from backend.hf.attention import AttentionOptions, KvGeometry
from backend.hf.batch import DecodeRows, ForwardBatch, PrefillSpan
from backend.hf.models import CausalModel
from backend.hf.models.transformers_model import TransformersModel, build_transformers_model
from backend.interface import ModelBroken, Unsupported

PAGE = 4  # tokens in a page
PAGES = 12
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # large enough that attention decides the logits
}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}

# model type: its config, and the width of its KV row
SERVED: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": (SMALL, 64),
    "gpt_neox": ({**SMALL, "intermediate_size": 48}, 64),
    "opt": ({**SMALL, "init_std": 0.2, "ffn_dim": 48, "word_embed_proj_dim": 32}, 64),
    "phi3": (GATED, 32),
    "gemma2": (
        {
            **GATED,
            "head_dim": 8,
            "query_pre_attn_scalar": 16,
            "sliding_window": 4,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 2.0,
        },
        32,
    ),
    "gemma3_text": (
        {
            **GATED,
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        32,
    ),
    "cohere": ({**GATED, "logit_scale": 0.25}, 32),
    "granite": ({**GATED, "logits_scaling": 4.0, "attention_multiplier": 0.5}, 32),
    "mixtral": ({**GATED, "num_local_experts": 4, "sliding_window": 4, **EXPERTS}, 32),
    "qwen3_moe": ({**GATED, "head_dim": 8, "num_experts": 4, **EXPERTS}, 32),
    "olmo2": (GATED, 32),
    "starcoder2": ({**GATED, "sliding_window": 4}, 32),
    "gpt_oss": (
        {**GATED, "head_dim": 8, "num_local_experts": 4, "sliding_window": 4, **EXPERTS},
        32,
    ),
    "deepseek_v3": (
        {
            **GATED,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            **LATENT,
            **EXPERTS,
        },
        4 * (16 + 12),
    ),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "stablelm": (GATED, "drop the keyword"),
    "falcon": (SMALL, "attention interface"),
    "gptj": ({**SMALL, "rotary_dim": 8}, "attention interface"),
    "bloom": (SMALL, "attention interface"),
    "mpt": ({**SMALL, "d_model": 32, "n_heads": 4, "n_layers": 2}, "attention interface"),
    "mamba": (SMALL, "linear_attention|attention interface"),
    "qwen3_next": ({**GATED, "num_experts": 4, **EXPERTS}, "linear_attention"),
    "bert": (SMALL, "differ from transformers' own"),
    "t5": ({"vocab_size": 96, "d_model": 32, "num_layers": 2}, "encoder-decoder"),
}


class LoopAttention:
    """Paged attention one token at a time: each reads its own pages back, in float32."""

    def __init__(self, geometry: KvGeometry) -> None:
        self.geometry = geometry
        pool = torch.full((geometry.layers, PAGES * PAGE, geometry.row), float("nan"))
        self.pools: list[Tensor] = list(pool)

    def attend(
        self,
        layer: int,
        query: Tensor,
        kv: Tensor,
        batch: ForwardBatch,
        options: AttentionOptions,
        output: Tensor,
    ) -> None:
        pages = list(batch.decodes.pages)
        for span in batch.spans:
            pages += [span.pages] * span.count
        rows = zip(query, batch.positions.tolist(), pages, strict=True)
        torch.stack([self._attend(layer, *row, options) for row in rows], out=output)

    def _attend(
        self, layer: int, query: Tensor, position: int, pages: Tensor, options: AttentionOptions
    ) -> Tensor:
        shape = self.geometry
        slots = [int(pages[p // PAGE]) * PAGE + p % PAGE for p in range(position + 1)]
        rows = self.pools[layer][slots[-options.window :] if options.window else slots]
        keys, values = rows.tensor_split([shape.kv_heads * shape.key_width], dim=1)
        group = len(query) // shape.kv_heads
        output = []
        for head, vector in enumerate(query):
            own = slice(head // group * shape.key_width, (head // group + 1) * shape.key_width)
            scores = keys[:, own] @ vector * options.scale
            if options.softcap:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            if options.sinks is not None:
                scores = torch.cat([scores, options.sinks[head : head + 1]])
            own = slice(head // group * shape.value_width, (head // group + 1) * shape.value_width)
            output.append(scores.softmax(0)[: len(rows)] @ values[:, own])
        return torch.stack(output)


Chunk = tuple[int, int, int]  # sequence, first position, count

PROMPTS = [
    [5, 17, 80, 33, 9, 61, 2, 44, 71, 28],
    [90, 7, 7, 51, 12, 38, 66, 20],
    [31, 4, 59, 83, 16],
]
TABLES = torch.tensor([[7, 2, 9], [0, 11, 4], [5, 1, 3]])  # pages of each prompt
STEPS: list[tuple[list[Chunk], list[Chunk]]] = [  # decodes, prompt chunks
    ([], [(0, 0, 4), (1, 0, 6)]),
    ([(1, 6, 1)], [(0, 4, 4), (2, 0, 3)]),
    ([(1, 7, 1), (0, 8, 1), (2, 3, 1)], []),
    ([(0, 9, 1)], [(2, 4, 1)]),
]


def forward_batch(decodes: list[Chunk], spans: list[Chunk]) -> ForwardBatch:
    tokens = [(s, p) for s, start, count in decodes + spans for p in range(start, start + count)]
    lengths = [start + 1 for _, start, _ in decodes]
    offset, prefills = len(decodes), []
    for sequence, start, count in spans:
        prefills.append(PrefillSpan(offset, count, start, TABLES[sequence]))
        offset += count
    return ForwardBatch(
        token_ids=torch.tensor([PROMPTS[s][p] for s, p in tokens]),
        positions=torch.tensor([p for _, p in tokens]),
        write_at=torch.tensor([int(TABLES[s, p // PAGE]) * PAGE + p % PAGE for s, p in tokens]),
        decodes=DecodeRows(
            len(decodes),
            torch.tensor([s for s, _, _ in decodes], dtype=torch.int64),
            torch.tensor(lengths),
            TABLES,
            TABLES.shape[1],
        ),
        spans=tuple(prefills),
    )


def write_config(folder: Path, kind: str, **values: Any) -> transformers.PreTrainedConfig:
    config = transformers.AutoConfig.for_model(kind, **values)
    config.save_pretrained(folder)
    return config


def write_model(folder: Path, kind: str, **values: Any) -> Any:
    """A random checkpoint in `folder`: the same model, set to transformers' own attention."""
    config = write_config(folder, kind, **values)
    torch.manual_seed(1)
    loader: Any = transformers.AutoModelForCausalLM
    model = loader.from_config(config, attn_implementation="eager")
    model.eval().save_pretrained(folder)
    return model


def build(folder: Path, dummy: bool = False, context: int = 0) -> CausalModel:
    config = json.loads((folder / "config.json").read_text())
    return build_transformers_model(folder, config, torch.float32, "cpu", False, dummy, context)


@pytest.mark.parametrize("kind", SERVED)
def test_chunks_and_decodes_over_pages_give_the_logits_of_one_full_forward(
    kind: str, tmp_path: Path
) -> None:
    values, row = SERVED[kind]
    theirs = write_model(tmp_path, kind, **values)
    ours = build(tmp_path)
    attention = LoopAttention(ours.geometry)

    assert (ours.geometry.layers, ours.geometry.row) == (2, row)
    with torch.no_grad():
        wanted = [theirs(torch.tensor([prompt]), use_cache=False).logits[0] for prompt in PROMPTS]
        for decodes, spans in STEPS:
            got = ours.logits(ours.hidden(forward_batch(decodes, spans), attention))
            parts = [wanted[s][start : start + count] for s, start, count in decodes + spans]
            torch.testing.assert_close(got, torch.cat(parts), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_run_is_refused_by_name_with_the_reason(
    kind: str, tmp_path: Path
) -> None:
    values, reason = REFUSED[kind]
    write_config(tmp_path, kind, architectures=["ItsName"], **values)
    with pytest.raises(Unsupported, match=rf"ItsName.*({reason})") as error:
        build(tmp_path, dummy=True)
    assert "\n" not in str(error.value)


def test_a_window_that_only_the_mask_knows_is_refused_though_no_short_sequence_shows_it(
    tmp_path: Path,
) -> None:
    model = write_model(tmp_path, "gemma2", **GATED, head_dim=8, sliding_window=32)
    model.model.layers[0].self_attn.sliding_window = None
    with pytest.raises(Unsupported, match=r"layer 0 asks for a window of None .* shows 32 of"):
        TransformersModel("Gemma2", model, "cpu")


def drop_position_ids(model: Any) -> None:
    forward = model.model.forward
    model.model.forward = lambda position_ids=None, **rest: forward(**rest)


def skip_a_layer(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def scale_the_logits(model: Any) -> None:
    model.config.logit_scale = 0.5


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (drop_position_ids, "hidden states differ"),
        (skip_a_layer, r"each of its 2 layers, and ran in layers \[0\]"),
        (scale_the_logits, "logits differ"),
    ],
)
def test_modelling_code_that_departs_from_ours_fails_the_probe(
    spoil: Callable[[Any], None], reason: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path, "llama", **GATED)
    model.requires_grad_(False)
    spoil(model)
    with pytest.raises(Unsupported, match=f"Spoilt.*{reason}"):
        TransformersModel("Spoilt", model, "cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_a_decode_step_reads_every_weight_but_a_table_that_it_only_looks_up(
    tied: bool, tmp_path: Path
) -> None:
    theirs = write_model(tmp_path, "llama", **GATED, tie_word_embeddings=tied)
    ours = build(tmp_path)
    count = sum(weight.numel() for weight in theirs.parameters())
    assert ours.vocabulary == 96
    assert ours.parameters == count
    assert ours.weight_bytes == 4 * (count - (0 if tied else 96 * 32))


def test_dummy_weights_are_the_same_each_time_and_leave_the_generator_alone(
    tmp_path: Path,
) -> None:
    write_config(tmp_path, "olmo2", **GATED)
    batch = forward_batch(*STEPS[0])
    torch.manual_seed(3)
    state = torch.get_rng_state()
    models = [build(tmp_path, dummy=True) for _ in range(2)]
    hidden = [model.hidden(batch, LoopAttention(model.geometry)) for model in models]
    assert torch.equal(hidden[0], hidden[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_rotary_angles_that_follow_the_longest_of_a_batch_bound_the_context(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    write_config(
        tmp_path,
        "phi3",
        **GATED,
        original_max_position_embeddings=32,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors},
    )
    with pytest.raises(Unsupported, match="MAX_MODEL_LEN=32"):
        build(tmp_path, dummy=True)
    assert build(tmp_path, dummy=True, context=32).geometry.layers == 2


def lose_a_weight(folder: Path) -> None:
    weights = safetensors_of(folder)
    del weights["model.norm.weight"]
    save(weights, folder)


def reshape_a_weight(folder: Path) -> None:
    weights = safetensors_of(folder)
    weights["model.norm.weight"] = torch.ones(7)
    save(weights, folder)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def safetensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def save(weights: dict[str, Tensor], folder: Path) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [lose_a_weight, reshape_a_weight, truncate, remove])
def test_a_damaged_checkpoint_is_broken_and_never_filled_with_random_weights(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    write_model(tmp_path, "olmo2", **GATED, architectures=["Olmo2ForCausalLM"])
    damage(tmp_path)
    with pytest.raises(ModelBroken, match=r"model\.norm\.weight|Olmo2ForCausalLM") as error:
        build(tmp_path)
    assert "\n" not in str(error.value)


def test_an_architecture_unknown_to_transformers_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such", "architectures": ["NoSuch"]}')
    with pytest.raises(Unsupported, match="NoSuch"):
        build(tmp_path)
