"""What stands in a Hugging Face folder: JSON files and weight files. Loads without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from backend.interface import ModelBroken

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelBroken when `path` cannot be read or holds no JSON object."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelBroken(f"cannot read {path}: {reason}") from error
    if not isinstance(value, dict):
        raise ModelBroken(f"{path} must hold a JSON object, holds a {type(value).__name__}")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model, those missing included; empty when it has none.

    Raises ModelBroken when they cannot be told from others.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        if not names or not isinstance(names, dict):
            raise ModelBroken(f"{folder / INDEX} has no weight_map")
        return [folder / name for name in sorted(set(names.values()))]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise ModelBroken(f"{folder} holds {len(files)} safetensors files and no {INDEX}")
    return files


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a config and every weight file that belongs to it."""
    files = weight_files(folder)
    return (folder / CONFIG).is_file() and bool(files) and all(file.is_file() for file in files)
