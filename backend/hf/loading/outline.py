"""What a model is before its weights are read: its config.json, and the headers of its files.

A GGUF is not converted, and of a hub model that is not here no weights are fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from backend.hf.loading.checkpoint import SafetensorsWeights
from backend.hf.loading.dummy import dtype_name
from backend.hf.loading.folder import is_complete
from backend.hf.loading.resolve import gguf_of, local_place, refuse_quantized, resolve
from backend.hf.models import ModelConfig
from backend.interface import ModelNotFound, Unsupported
from config import ModelSettings

TABLE = "model.embed_tokens.weight"
# safetensors' names of the dtypes that run, and what an element takes
DTYPES = {"F32": ("float32", 4), "BF16": ("bfloat16", 2), "F16": ("float16", 2)}


@dataclass(frozen=True, slots=True)
class Outline:
    """A model, described."""

    place: Path
    config: ModelConfig
    table: str  # dtype of the embedding table
    stored: dict[str, int]  # bytes of its weights by dtype; empty: no files were there to see


def outline(settings: ModelSettings) -> Outline:
    """Describe the model that `settings` name. Raises ModelNotFound, ModelBroken or Unsupported."""
    place = local_place(settings)
    gguf = None if place is None else gguf_of(settings, place)
    if gguf is not None:
        return _of_gguf(gguf)
    if place is None and settings.name.endswith(".gguf"):
        raise ModelNotFound(
            f"MODEL_NAME={settings.name} is not here: name the file in MODEL_LOCAL_DIR"
        )
    made_up = settings.load_format == "dummy"
    # of made-up weights the hub gives the config.json alone
    config_only = settings.model_copy(update={"load_format": "dummy"})
    files = resolve(settings if place is not None else config_only)
    if not made_up:
        refuse_quantized(files.folder, files.config)
    if made_up or (place is None and not is_complete(files.folder)):
        return Outline(files.folder, files.config, dtype_name(files.config), {})
    return _of_folder(files.folder, files.config)


def _of_folder(folder: Path, config: ModelConfig) -> Outline:
    with SafetensorsWeights(folder) as weights:
        headers = weights.headers()
    stored: dict[str, int] = {}
    for name, (kind, elements) in headers.items():
        if kind not in DTYPES:
            raise Unsupported(f"{folder}: tensor {name} is {kind}: {', '.join(DTYPES)} run here")
        dtype, size = DTYPES[kind]
        stored[dtype] = stored.get(dtype, 0) + size * elements
    kind, _ = headers.get(TABLE, ("BF16", 0))
    return Outline(folder, config, DTYPES[kind][0], stored)


def _of_gguf(path: Path) -> Outline:
    from backend.hf.loading.gguf_config import model_config  # late: its reader takes a while
    from backend.hf.loading.gguf_file import GgufFile

    file = GgufFile(path)
    stored: dict[str, int] = {}
    for tensor in file.tensors.values():
        kind = tensor.tensor_type.name
        stored[kind] = stored.get(kind, 0) + int(tensor.n_bytes)
    config = model_config(file)
    return Outline(path, config, dtype_name(config), stored)
