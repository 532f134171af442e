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
from backend.hf.models import ModelConfig, WeightSource, config_value
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
    folder = LOCAL[settings.load_format](_local(settings) or fetch(settings))
    config = read_json(folder / CONFIG)
    made_up = settings.load_format == "dummy"
    quantization = config_value(config, "quantization_config", dict, {})
    if quantization and not made_up:
        method = quantization.get("quant_method", "unknown")
        raise Unsupported(f"{folder} is quantized ({method}), which does not run here")
    generation = folder / GENERATION
    return ModelFiles(
        folder, config, read_json(generation) if generation.is_file() else {}, made_up
    )


def _local(settings: ModelSettings) -> Path | None:
    """The path that is meant; None when the name is the hub's to know."""
    place = Path(settings.local_dir or settings.name).expanduser()
    if place.suffix == ".safetensors" and place.is_file():
        raise ModelNotFound(
            f"{place} is one file of a model: name its folder, MODEL_LOCAL_DIR={place.parent}"
        )
    if settings.local_dir and not place.exists():
        raise ModelNotFound(f"MODEL_LOCAL_DIR={settings.local_dir} does not exist: {ADVICE}")
    return place if place.exists() else None


def _auto(place: Path) -> Path:
    if place.is_file() or (not weight_files(place) and any(place.glob("*.gguf"))):
        return _gguf(place)
    return _safetensors(place)


def _safetensors(place: Path) -> Path:
    if not place.is_dir() or not weight_files(place):
        raise ModelNotFound(f"{place} is no folder with safetensors: {ADVICE}")
    return place


def _gguf(place: Path) -> Path:
    files = [place] if place.is_file() else sorted(place.glob("*.gguf"))
    if not files:
        raise ModelNotFound(f"{place} holds no .gguf file: {ADVICE}")
    if len(files) > 1:
        raise ModelNotFound(f"{place} holds {len(files)} .gguf files: name one in MODEL_LOCAL_DIR")
    return cached_conversion(files[0])


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
