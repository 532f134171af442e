"""A GGUF by its hub name, with the hub's client replaced by one that serves a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from backend.hf.loading.resolve import resolve
from backend.interface import ModelNotFound, StartFailed
from config import ModelSettings


@dataclass
class Hub:
    """One repository, some/name, and a client's cache of it."""

    remote: Path
    cache: Path
    online: bool = True
    fetched: list[str] = field(default_factory=list)

    def model_info(self, repository: str, timeout: float) -> SimpleNamespace:
        if not self.online or repository != "some/name":
            raise ConnectionError("the hub does not answer")
        files = [path for path in self.remote.rglob("*") if path.is_file()]
        names = [str(path.relative_to(self.remote)) for path in files]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def hf_hub_download(self, repository: str, file: str, local_files_only: bool = False) -> str:
        if not (self.cache / file).is_file():
            if local_files_only:
                raise LocalEntryNotFoundError("not cached")
            (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.remote / file, self.cache / file)
            self.fetched.append(file)
        return str(self.cache / file)

    def snapshot_download(self, repository: str, local_files_only: bool, **_: Any) -> str:
        if local_files_only and not self.cache.is_dir():
            raise LocalEntryNotFoundError("not cached")
        if not local_files_only:
            self.fetched.append("snapshot")
            shutil.copytree(self.remote, self.cache, dirs_exist_ok=True)
        return str(self.cache)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "remote", tmp_path / "hub")
    hub.remote.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.hf_hub_download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


@pytest.fixture
def write(tiny: Callable[..., Any], hub: Hub) -> Callable[[str], None]:
    """Puts a real GGUF into the repository."""

    def put(name: str) -> None:
        (hub.remote / name).parent.mkdir(exist_ok=True)
        tiny("qwen2").write(hub.remote / name)

    return put


def refusal(settings: ModelSettings) -> str:
    with pytest.raises(StartFailed) as caught:
        resolve(settings)
    assert caught.type is ModelNotFound
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("load_format", ["auto", "gguf"])
def test_the_only_gguf_of_a_repository_is_converted_and_then_needs_no_network(
    hub: Hub, write: Callable[[str], None], load_format: Any
) -> None:
    write("m.gguf")
    (hub.remote / "README.md").write_text("a model")
    settings = ModelSettings(name="some/name", load_format=load_format)
    files = resolve(settings)
    assert files.config["model_type"] == "qwen2"
    assert (files.folder / "tokenizer.json").is_file()
    hub.online = False
    assert resolve(settings).folder == files.folder
    assert hub.fetched == ["m.gguf"]


def test_several_ggufs_are_listed_and_one_is_chosen_by_its_name(
    hub: Hub, write: Callable[[str], None]
) -> None:
    write("m-q4.gguf")
    write("large/m-f16.gguf")
    message = refusal(ModelSettings(name="some/name"))
    assert "choose one as MODEL_NAME=some/name/" in message
    assert "large/m-f16.gguf, m-q4.gguf" in message
    assert hub.fetched == []
    files = resolve(ModelSettings(name="some/name/large/m-f16.gguf"))
    assert files.folder.name.startswith("m-f16-")
    assert hub.fetched == ["large/m-f16.gguf"]
    hub.online = False
    assert resolve(ModelSettings(name="some/name/large/m-f16.gguf")).folder == files.folder


def test_safetensors_win_unless_gguf_is_asked_for(hub: Hub, write: Callable[[str], None]) -> None:
    write("m.gguf")
    (hub.remote / "config.json").write_text("{}")
    (hub.remote / "model.safetensors").write_text("")
    assert resolve(ModelSettings(name="some/name")).folder == hub.cache
    files = resolve(ModelSettings(name="some/name", load_format="gguf"))
    assert files.folder != hub.cache
    assert hub.fetched == ["snapshot"]


def test_what_the_repository_does_not_hold_is_said(hub: Hub, write: Callable[[str], None]) -> None:
    gguf = ModelSettings(name="some/name", load_format="gguf")
    assert "some/name holds no .gguf file" in refusal(gguf)
    write("m.gguf")
    message = refusal(ModelSettings(name="some/name/n.gguf"))
    assert message == "some/name has no n.gguf, it has: m.gguf"
    assert "safetensors" in refusal(ModelSettings(name="some/name", load_format="safetensors"))


@pytest.mark.parametrize("name", ["some/name", "some/name/m.gguf"])
def test_a_hub_that_cannot_be_reached_is_one_line(hub: Hub, name: str) -> None:
    hub.online = False
    message = refusal(ModelSettings(name=name, load_format="gguf"))
    assert message.startswith(f"MODEL_NAME={name} is no local path")
    assert "the hub does not answer" in message
