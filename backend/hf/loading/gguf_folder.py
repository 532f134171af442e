"""A Hugging Face folder written from a GGUF: config, tokenizer, bfloat16 weights in shards."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from backend.hf.loading.folder import CONFIG, INDEX, WEIGHTS
from backend.hf.loading.gguf_config import generation_config, model_config
from backend.hf.loading.gguf_file import GgufFile
from backend.hf.loading.gguf_tensors import TensorEntry, read_tensor, tensor_entries
from backend.hf.loading.gguf_tokenizer import has_tokenizer, tokenizer, tokenizer_config

SHARD_BYTES = 2_000_000_000  # of weights held in memory at once

logger = logging.getLogger(__name__)


def write_folder(source: Path, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the model in `source` (a .gguf) into the empty `folder`.

    Raises ModelBroken or Unsupported, having written anything or nothing.
    """
    file = GgufFile(source)
    config = model_config(file)
    entries = tensor_entries(file, config)
    _write_json(folder / CONFIG, config)
    _write_json(folder / "generation_config.json", generation_config(file))
    if has_tokenizer(file):
        tokenizer(file, config["vocab_size"]).save(str(folder / "tokenizer.json"))
        _write_json(
            folder / "tokenizer_config.json",
            tokenizer_config(file, config["max_position_embeddings"]),
        )
    _write_weights(file, entries, folder, shard_bytes)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(
    file: GgufFile, entries: list[TensorEntry], folder: Path, shard_bytes: int
) -> None:
    shards = _shards(entries, shard_bytes)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        name = name if len(shards) > 1 else WEIGHTS
        tensors = {entry.name: read_tensor(file, entry) for entry in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # the library makes it readable for its owner alone
        places |= dict.fromkeys(tensors, name)
        logger.info("wrote %s, %d of %d", name, number, len(shards))
    if len(shards) > 1:
        total = sum(entry.bytes for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / INDEX, index)


def _shards(entries: list[TensorEntry], shard_bytes: int) -> list[list[TensorEntry]]:
    """`entries` in order, cut where the next one would exceed `shard_bytes`."""
    shards: list[list[TensorEntry]] = []
    room = 0
    for entry in entries:
        if not shards or entry.bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.bytes
    return shards
