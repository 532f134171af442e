"""From the model settings to a Hugging Face folder on this machine, and to its weights.

MODEL_LOCAL_DIR wins over MODEL_NAME; a name is a local path if it exists, else the hub's: its cache
first, then the network. A GGUF is converted once. LOAD_FORMAT by name is obeyed or refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from backend.hf.loading.convert import cached_conversion
from backend.hf.loading.folder import CONFIG, read_json, weight_files
from backend.hf.loading.hub import ADVICE, fetch
from backend.hf.models import ModelConfig, WeightSource, config_value, positive
from backend.interface import ModelBroken, ModelNotFound, Unsupported
from config import ModelSettings

GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk, always as a Hugging Face folder."""

    folder: Path
    config: ModelConfig  # config.json
    generation: dict[str, Any]  # generation_config.json; empty when there is none
    made_up: bool  # weights are random: LOAD_FORMAT=dummy

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The model's own end tokens: the generation config's, else the config's.

        Raises ModelBroken when they are no token ids.
        """
        for name, values in ((GENERATION, self.generation), (CONFIG, self.config)):
            found = values.get("eos_token_id")
            if found is not None:
                ids = found if isinstance(found, list) else [found]
                if any(type(id) is not int for id in ids):  # True is an int, too
                    raise ModelBroken(f"{name}: eos_token_id must be token ids, has {found!r}")
                return tuple(ids)
        return ()

    def open_weights(self) -> AbstractContextManager[WeightSource]:
        """The tensors, readable until the `with` block ends. Raises ModelBroken."""
        from backend.hf.loading.checkpoint import SafetensorsWeights
        from backend.hf.loading.dummy import DummyWeights

        return DummyWeights(self.config) if self.made_up else SafetensorsWeights(self.folder)


def resolve(settings: ModelSettings) -> ModelFiles:
    """Find the model that `settings` name.

    Raises ModelNotFound, ModelBroken or Unsupported, each with one line.
    """
    folder = LOCAL[settings.load_format](local_place(settings) or fetch(settings))
    config = read_json(folder / CONFIG)
    made_up = settings.load_format == "dummy"
    if not made_up:
        refuse_quantized(folder, config)
    generation = folder / GENERATION
    return ModelFiles(
        folder, config, read_json(generation) if generation.is_file() else {}, made_up
    )


def refuse_quantized(folder: Path, config: ModelConfig) -> None:
    """Raise Unsupported for weights that are not plain numbers."""
    quantization = config_value(config, "quantization_config", dict, {})
    if quantization:
        method = quantization.get("quant_method", "unknown")
        raise Unsupported(f"{folder} is quantized ({method}), which does not run here")


def context_length(settings: ModelSettings, config: ModelConfig, place: Path) -> int:
    """Tokens of prompt and answer: the model's own number, or less by MAX_MODEL_LEN. `place` is
    what messages name. Raises Unsupported when there is none, or it is exceeded.
    """
    text = config_value(config, "text_config", dict, config)
    keys = [key for key in ("max_position_embeddings", "n_positions") if text.get(key) is not None]
    if not keys and not settings.max_model_len:
        raise Unsupported(f"{place} does not say its context: set MAX_MODEL_LEN")
    own = positive(text, keys[0], int) if keys else settings.max_model_len
    if settings.max_model_len > own:
        raise Unsupported(
            f"MAX_MODEL_LEN={settings.max_model_len} exceeds the model's context of {own}"
        )
    return settings.max_model_len or own


def local_place(settings: ModelSettings) -> Path | None:
    """The path that is meant; None when the name is the hub's to know. Raises ModelNotFound."""
    place = Path(settings.local_dir or settings.name).expanduser()
    if place.suffix == ".safetensors" and place.is_file():
        raise ModelNotFound(
            f"{place} is one file of a model: name its folder, MODEL_LOCAL_DIR={place.parent}"
        )
    if settings.local_dir and not place.exists():
        raise ModelNotFound(f"MODEL_LOCAL_DIR={settings.local_dir} does not exist: {ADVICE}")
    return place if place.exists() else None


def gguf_of(settings: ModelSettings, place: Path) -> Path | None:
    """The .gguf file that is meant by the local `place`; None when another format is. Raises
    ModelNotFound when none or many could be.
    """
    if settings.load_format == "gguf" or (settings.load_format == "auto" and _is_gguf(place)):
        return _gguf_file(place)
    return None


def _is_gguf(place: Path) -> bool:
    return place.is_file() or (not weight_files(place) and any(place.glob("*.gguf")))


def _auto(place: Path) -> Path:
    return _gguf(place) if _is_gguf(place) else _safetensors(place)


def _safetensors(place: Path) -> Path:
    if not place.is_dir() or not weight_files(place):
        raise ModelNotFound(f"{place} is no folder with safetensors: {ADVICE}")
    return place


def _gguf(place: Path) -> Path:
    return cached_conversion(_gguf_file(place))


def _gguf_file(place: Path) -> Path:
    files = [place] if place.is_file() else sorted(place.glob("*.gguf"))
    if not files:
        raise ModelNotFound(f"{place} holds no .gguf file: {ADVICE}")
    if len(files) > 1:
        raise ModelNotFound(f"{place} holds {len(files)} .gguf files: name one in MODEL_LOCAL_DIR")
    return files[0]


def _dummy(place: Path) -> Path:
    if not (place / CONFIG).is_file():
        raise ModelNotFound(f"LOAD_FORMAT=dummy needs a folder with {CONFIG}, {place} is none")
    return place


LOCAL: dict[Literal["auto", "safetensors", "gguf", "dummy"], Callable[[Path], Path]] = {
    "auto": _auto,
    "safetensors": _safetensors,
    "gguf": _gguf,
    "dummy": _dummy,
}
