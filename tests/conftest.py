"""What every test stands on: no flag of the developer's shell, no network, the small real model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import config

ROOT = Path(__file__).parent.parent
NOT_SHIPPED = {"build", "dist", "docs", "models", "tests"}


def parts(top: type[config.Part] = config.Settings) -> Iterator[type[config.Part]]:
    """`top` and every group of settings below it."""
    yield top
    for field in top.model_fields.values():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, config.Part):
            yield from parts(inner)


def flag_defaults() -> dict[str, object]:
    """Every flag and its default."""
    return {
        field.alias: field.default
        for part in parts()
        for field in part.model_fields.values()
        if field.alias is not None
    }


def pytest_configure() -> None:
    """Before anything is collected, so that it holds for child processes and wide fixtures too."""
    for flag in flag_defaults():
        os.environ.pop(flag, None)
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and config.get_device() != "cuda":
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, this machine has none"))


@pytest.fixture(scope="session")
def flags() -> dict[str, object]:
    return flag_defaults()


@pytest.fixture(scope="session")
def settings_parts() -> list[type[config.Part]]:
    return list(parts())


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the tree."""
    return ROOT


@pytest.fixture(scope="session")
def sources() -> list[Path]:
    """Every Python file that users import or run, relative to the root."""
    folders = [
        path
        for path in ROOT.iterdir()
        if path.is_dir() and path.name not in NOT_SHIPPED and not path.name.startswith(".")
    ]
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    return sorted(path.relative_to(ROOT) for path in paths)


@pytest.fixture(scope="session")
def small_model() -> Path:
    """The small real model as a Hugging Face folder."""
    folder = ROOT / "models" / "smollm2-135m-instruct"
    if not (folder / "config.json").is_file():
        pytest.fail(f"{folder} is missing: run `make model`")
    return folder
