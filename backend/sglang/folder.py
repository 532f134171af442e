"""From the model settings to the folder that SGLang is to load, and what we read in it ourselves.

MODEL_LOCAL_DIR wins over MODEL_NAME; a name is a local path if it exists, else the hub's: its cache
first, then the network. SGLang reads safetensors only, as far as we ask it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.interface import ModelBroken, ModelNotFound, Unsupported, first_line
from config import ModelSettings

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS = "*.safetensors"
HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
HUB_CODE = ["*.py"]  # only with TRUST_REMOTE_CODE=1
HUB_IGNORED = ["*/*", "consolidated*"]  # other formats of the same weights
CONTEXT_KEYS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A Hugging Face folder on this machine."""

    path: Path
    end_ids: tuple[int, ...]  # the model's own: the generation config's, else the config's
    context: int | None  # positions, as config.json has them; SGLang may know of more


def find_model(settings: ModelSettings) -> ModelFolder:
    """The folder that `settings` name. Raises ModelNotFound, ModelBroken or Unsupported."""
    path = _local(settings) or _from_hub(settings)
    config = _read_json(path / CONFIG)
    generation = path / GENERATION
    ends = _read_json(generation) if generation.is_file() else {}
    found = ends.get("eos_token_id")
    found = config.get("eos_token_id") if found is None else found
    ids = () if found is None else tuple(found) if isinstance(found, list) else (found,)
    if any(type(id) is not int for id in ids):  # True is an int, too
        raise ModelBroken(f"{path}: eos_token_id must be token ids, is {found!r}")
    text = config.get("text_config", config)
    context = next((text[key] for key in CONTEXT_KEYS if text.get(key)), None)
    return ModelFolder(path, ids, context)


def _local(settings: ModelSettings) -> Path | None:
    """The path that is meant; None when the name is the hub's to know."""
    place = Path(settings.local_dir or settings.name).expanduser()
    if not place.exists():
        if settings.local_dir:
            raise ModelNotFound(f"MODEL_LOCAL_DIR={settings.local_dir} does not exist")
        return None
    weights = settings.load_format != "dummy"
    if place.is_dir() and (place / CONFIG).is_file() and (not weights or any(place.glob(WEIGHTS))):
        return place
    wanted = f"{CONFIG} and safetensors" if weights else CONFIG
    raise ModelNotFound(
        f"{place} is no folder with {wanted}, which is what the backend sglang loads: "
        "use BACKEND_IMPL=hf for a GGUF"
    )


def _from_hub(settings: ModelSettings) -> Path:
    """The folder of a hub model. Its cache is asked first, so that no network is needed then."""
    from huggingface_hub import snapshot_download  # late: half a second
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted: dict[str, Any] = {
        "allow_patterns": [
            *HUB_FILES,
            *([] if settings.load_format == "dummy" else [WEIGHTS]),
            *(HUB_CODE if settings.trust_remote_code else []),
        ],
        "ignore_patterns": HUB_IGNORED,
    }
    try:
        try:
            found = Path(snapshot_download(settings.name, local_files_only=True, **wanted))
            if any(found.glob(WEIGHTS)) or settings.load_format == "dummy":
                return found
        except LocalEntryNotFoundError:
            pass
        found = Path(snapshot_download(settings.name, **wanted))
    except Exception as error:  # whatever its HTTP library raises: the model cannot be had
        raise ModelNotFound(
            f"MODEL_NAME={settings.name} is no local path, is not in the hub's cache, and the hub "
            f"does not give it ({first_line(error)}): set MODEL_LOCAL_DIR to a model folder"
        ) from error
    if settings.load_format != "dummy" and not any(found.glob(WEIGHTS)):
        raise Unsupported(
            f"MODEL_NAME={settings.name} has no safetensors, which is what the backend sglang "
            "loads: use BACKEND_IMPL=hf for a GGUF"
        )
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """Raises ModelBroken when `path` cannot be read or holds no JSON object."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelBroken(f"cannot read {path}: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise ModelBroken(f"{path} must hold a JSON object, holds a {type(value).__name__}")
    return value
