"""From the model settings to a Hugging Face folder on this machine, and to its weights.

MODEL_LOCAL_DIR wins over MODEL_NAME; a name is a local path if it exists, else the hub's: its cache
first, then the network. A GGUF is converted once. LOAD_FORMAT by name is obeyed or refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from backend.hf.loading.convert import cached_conversion
from backend.hf.loading.folder import CONFIG, is_complete, read_json, weight_files
from backend.hf.models import ModelConfig, WeightSource
from backend.interface import ModelNotFound, Unsupported
from config import ModelSettings

HUB_TIMEOUT_S = 2.0  # to answer whether the model exists; asked twice
HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
HUB_WEIGHTS = ["*.safetensors"]
HUB_CODE = ["*.py"]  # only with TRUST_REMOTE_CODE=1
HUB_IGNORED = ["*/*", "consolidated*"]  # other formats of the same weights
ADVICE = (
    "set MODEL_LOCAL_DIR to a model folder or a .gguf file "
    "(`make model` writes one to models/smollm2-135m-instruct)"
)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk, always as a Hugging Face folder."""

    folder: Path
    config: ModelConfig  # config.json
    generation: dict[str, Any]  # generation_config.json; empty when there is none
    made_up: bool  # weights are random: LOAD_FORMAT=dummy

    @property
    def tokenizer(self) -> str | None:
        """The folder, if it holds a tokenizer."""
        return str(self.folder) if (self.folder / "tokenizer.json").is_file() else None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The model's own end tokens: the generation config's, else the config's."""
        ids = self.generation.get("eos_token_id", self.config.get("eos_token_id"))
        if ids is None:
            return ()
        return tuple(ids) if isinstance(ids, list) else (ids,)

    def open_weights(self) -> AbstractContextManager[WeightSource]:
        """The tensors, readable until the `with` block ends. Raises ModelBroken."""
        from backend.hf.loading.checkpoint import SafetensorsWeights
        from backend.hf.loading.dummy import DummyWeights

        return DummyWeights(self.config) if self.made_up else SafetensorsWeights(self.folder)


def resolve(settings: ModelSettings) -> ModelFiles:
    """Find the model that `settings` name.

    Raises ModelNotFound, ModelBroken or Unsupported, each with one line.
    """
    place = _local(settings)
    folder = LOCAL[settings.load_format](place) if place else _from_hub(settings)
    config = read_json(folder / CONFIG)
    made_up = settings.load_format == "dummy"
    if "quantization_config" in config and not made_up:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise Unsupported(f"{folder} is quantized ({method}), which does not run here")
    generation = folder / "generation_config.json"
    return ModelFiles(
        folder, config, read_json(generation) if generation.is_file() else {}, made_up
    )


def _local(settings: ModelSettings) -> Path | None:
    """The path that is meant; None when the name is the hub's to know."""
    if settings.local_dir:
        place = Path(settings.local_dir).expanduser()
        if not place.exists():
            raise ModelNotFound(f"MODEL_LOCAL_DIR={settings.local_dir} does not exist: {ADVICE}")
        return place
    place = Path(settings.name).expanduser()
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


def _from_hub(settings: ModelSettings) -> Path:
    """The snapshot of a hub model, fetched if the hub's cache does not hold it whole."""
    if settings.load_format == "gguf":
        raise Unsupported(
            f"LOAD_FORMAT=gguf needs a local file, MODEL_NAME={settings.name} is none: {ADVICE}"
        )
    from huggingface_hub import HfApi, snapshot_download  # late: half a second
    from huggingface_hub.errors import LocalEntryNotFoundError

    made_up = settings.load_format == "dummy"
    wanted = [*HUB_FILES, *HUB_WEIGHTS * (not made_up), *HUB_CODE * settings.trust_remote_code]

    def snapshot(local: bool) -> Path:
        return Path(
            snapshot_download(
                settings.name,
                allow_patterns=wanted,
                ignore_patterns=HUB_IGNORED,
                local_files_only=local,
            )
        )

    try:
        with suppress(LocalEntryNotFoundError):
            cached = snapshot(local=True)
            if is_complete(cached) or (made_up and (cached / CONFIG).is_file()):
                return cached
        HfApi().model_info(settings.name, timeout=HUB_TIMEOUT_S)  # the download would wait longer
        return snapshot(local=False)
    except Exception as error:  # whatever its HTTP library raises: the model cannot be had
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelNotFound(
            f"MODEL_NAME={settings.name} is no local path, is not in the hub's cache, and the hub "
            f"does not give it ({reason[0]}): {ADVICE}"
        ) from error
