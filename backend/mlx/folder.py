"""From the model settings to a folder on this machine, and what its config.json says. Loads without
mlx: what cannot run is refused before the seconds that its import takes.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.interface import ModelBroken, ModelNotFound, StartFailed, Unsupported, first_line
from config import ModelSettings

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model*.safetensors"
HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", WEIGHTS]
HUB_CODE = ["*.py"]  # only with TRUST_REMOTE_CODE=1
HUB_TIMEOUT_S = 2.0  # to answer whether the model exists
ADVICE = (
    "set MODEL_LOCAL_DIR to a model folder "
    "(`make model` writes one to models/smollm2-135m-instruct)"
)
CONTEXT_KEYS = ("max_position_embeddings", "n_positions")

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder, and what its JSON files say."""

    path: Path
    context: int  # tokens of prompt and answer
    end_ids: tuple[int, ...]  # the model's own end tokens
    rotation: Config  # what mlx-lm is told besides: see `rotation`


def read_folder(settings: ModelSettings) -> ModelFolder:
    """The folder that `settings` name. Raises ModelNotFound, ModelBroken or Unsupported."""
    path = find_folder(settings)
    config = read_config(path)
    refuse_code(config, path, settings.trust_remote_code)
    return ModelFolder(
        path, context_length(settings, config, path), end_ids(config), rotation(config)
    )


def find_folder(settings: ModelSettings) -> Path:
    """The folder that `settings` name: MODEL_LOCAL_DIR, else MODEL_NAME, which is a local path if
    it exists and the hub's name if not. Raises ModelNotFound or Unsupported.
    """
    if settings.load_format not in ("auto", "safetensors"):
        raise Unsupported(
            f"LOAD_FORMAT={settings.load_format}: the backend mlx reads folders with safetensors; "
            "use LOAD_FORMAT=auto, or BACKEND_IMPL=hf"
        )
    place = Path(settings.local_dir or settings.name).expanduser()
    if settings.local_dir and not place.exists():
        raise ModelNotFound(f"MODEL_LOCAL_DIR={settings.local_dir} does not exist: {ADVICE}")
    folder = place if place.exists() else _fetch(settings)
    if not any(folder.glob(WEIGHTS)):  # nothing is in what is no folder
        raise ModelNotFound(f"{folder} is no folder with {WEIGHTS}: {ADVICE}")
    return folder


def _fetch(settings: ModelSettings) -> Path:
    """The folder of a hub model, fetched if the hub's cache does not hold it whole."""
    from huggingface_hub import HfApi, snapshot_download  # half a second
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = [*HUB_FILES, *HUB_CODE * settings.trust_remote_code]
    try:
        with suppress(LocalEntryNotFoundError):
            return Path(
                snapshot_download(settings.name, allow_patterns=wanted, local_files_only=True)
            )
        # asked first, because the download would wait longer
        HfApi().model_info(settings.name, timeout=HUB_TIMEOUT_S)
        return Path(snapshot_download(settings.name, allow_patterns=wanted))
    except Exception as error:  # whatever its HTTP library raises: the model cannot be had
        raise ModelNotFound(
            f"MODEL_NAME={settings.name} is no local path, is not in the hub's cache, and the hub "
            f"does not give it ({first_line(error)}): {ADVICE}"
        ) from error


def read_config(folder: Path) -> Config:
    """What config.json says, end tokens as generation_config.json has them where it has any.

    Raises ModelBroken.
    """
    config = _read_json(folder / CONFIG)
    generation = folder / GENERATION
    own = _read_json(generation).get("eos_token_id") if generation.is_file() else None
    return config if own is None else config | {"eos_token_id": own}


def _read_json(path: Path) -> Config:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelBroken(f"cannot read {path}: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise ModelBroken(f"{path} must hold a JSON object, holds a {type(value).__name__}")
    return value


def end_ids(config: Config) -> tuple[int, ...]:
    """The model's own end tokens. Raises ModelBroken when they are no token ids."""
    found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(id) is not int for id in ids):  # True is an int, too
        raise ModelBroken(f"{CONFIG}: eos_token_id must be token ids, has {found!r}")
    return tuple(ids)


def context_length(settings: ModelSettings, config: Config, folder: Path) -> int:
    """Tokens of prompt and answer: the model's own number, or less by MAX_MODEL_LEN. Raises
    StartFailed when there is none, or it is exceeded.
    """
    text = config.get("text_config", config)
    asked = settings.max_model_len
    key = next((key for key in CONTEXT_KEYS if text.get(key) is not None), None)
    if key is None and not asked:
        raise Unsupported(f"{folder} does not say its context: set MAX_MODEL_LEN")
    own = asked if key is None else text[key]
    if type(own) is not int or own < 1:
        raise ModelBroken(f"{folder / CONFIG}: {key} must be a number from 1, is {own!r}")
    if asked > own:
        raise Unsupported(f"MAX_MODEL_LEN={asked} exceeds the model's context of {own}")
    return asked or own


def rotation(config: Config) -> Config:
    """How positions are rotated, in the words that all of mlx-lm's models read. transformers 5
    writes them as `rope_parameters`, which some of these models would not see: they would run, with
    the wrong angles.
    """
    found = config.get("rope_parameters")
    if not isinstance(found, dict) or "rope_theta" not in found or "rope_theta" in config:
        return {}  # what differs from layer to layer is read by the models that have it
    scaled = found.get("rope_type", "default") != "default"
    scaling = {"rope_scaling": found} if scaled and config.get("rope_scaling") is None else {}
    return {"rope_theta": found["rope_theta"], **scaling}


def refuse_code(config: Config, folder: Path, trusted: bool) -> None:
    """Raise Unsupported for a folder that brings its own code, unless that is trusted."""
    if config.get("model_file") is not None and not trusted:
        raise Unsupported(
            f"{folder} runs code of its own, {config['model_file']}: read it, then set "
            "TRUST_REMOTE_CODE=1"
        )


def load_failed(folder: Path, error: Exception) -> StartFailed:
    """What mlx-lm says of a folder, in one line. Its kind tells more than its words, sometimes."""
    kind = type(error).__name__
    return StartFailed(f"mlx-lm cannot load {folder}: {kind}: {first_line(error)}")
