"""Which backend a flag opens, and what is said when it cannot be."""

from __future__ import annotations

import logging
import os
import platform
from pathlib import Path
from typing import get_args

import pytest

from backend.interface import StartFailed, Unsupported
from config import OPENMP_SPINS, BackendSettings, ConfigError, ModelSettings, read_settings
from engine import opening
from engine.opening import BACKENDS, open_backend

SPINS = "GOMP_SPINCOUNT"
FLAGS = {
    "BACKEND_IMPL": "fake",
    "MAX_MODEL_LEN": "300",
    "PAGE_SIZE_TOKENS": "8",
    "PAGE_TOKEN_BUDGET": "808",
    "MAX_RUNNING": "5",
    "MAX_STEP_TOKENS": "77",
    "FAKE_DEPTH": "3",
}


@pytest.fixture(autouse=True)
def _spins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening sets the variable: what it was comes back."""
    monkeypatch.setenv(SPINS, "before")
    monkeypatch.delenv(SPINS)


APPLE = ("Darwin", "arm64")


@pytest.mark.parametrize(
    ("system", "installed", "chosen", "why"),
    [
        (APPLE, True, "mlx", "mlx-lm is installed"),
        (APPLE, False, "hf", "mlx-lm is not installed"),
        (("Darwin", "x86_64"), True, "hf", "fastest on this machine"),
        (("Linux", "aarch64"), True, "hf", "fastest on this machine"),
    ],
)
def test_auto_takes_mlx_on_apple_silicon_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    system: tuple[str, str],
    installed: bool,
    chosen: str,
    why: str,
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system[0])
    monkeypatch.setattr(platform, "machine", lambda: system[1])
    monkeypatch.setattr(opening, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setitem(BACKENDS, chosen, BACKENDS["fake"])
    caplog.set_level(logging.INFO)
    open_backend(BackendSettings(impl="auto"))
    (said,) = [message for message in caplog.messages if "BACKEND_IMPL=auto" in message]
    assert said.startswith(f"BACKEND_IMPL=auto: {chosen}, as ")
    assert why in said


@pytest.mark.parametrize("name", ["sglang", "mlx"])
def test_a_backend_whose_package_is_missing_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=rf'^[^\n]*pip install "mini-sglang\[{name}\]"[^\n]*$'):
        open_backend(BackendSettings(impl=name))


def test_a_backend_asked_for_by_name_is_no_choice_to_speak_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    assert open_backend(BackendSettings(impl="fake")).spec.name == "fake"
    assert not caplog.messages


def test_every_name_that_the_flag_takes_has_an_opener() -> None:
    names = get_args(BackendSettings.model_fields["impl"].annotation)
    assert set(names) == {"auto", *BACKENDS}


def test_flags_reach_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for flag, value in FLAGS.items():
        monkeypatch.setenv(flag, value)
    spec = open_backend(read_settings().backend).spec
    assert (spec.max_model_len, spec.page_tokens, spec.pages) == (300, 8, 101)
    assert (spec.max_running, spec.max_step_tokens, spec.depth) == (5, 77, 3)


def test_a_name_that_nobody_has_is_refused_in_one_line_that_names_the_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BACKEND_IMPL", "hg")
    with pytest.raises(ConfigError, match=r"^BACKEND_IMPL=hg: [^\n]*'hf'[^\n]*$"):
        read_settings()


@pytest.mark.parametrize("impl", ["auto", "hf", "fake"])
@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"model_type": "unheard of"}'])
def test_what_cannot_be_loaded_is_refused_in_one_line_that_names_the_folder(
    tmp_path: Path, impl: str, content: str | None
) -> None:
    folder = tmp_path / "model"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    settings = BackendSettings.model_validate(
        {"impl": impl, "model": ModelSettings(local_dir=str(folder))}
    )
    with pytest.raises(StartFailed) as failed:
        open_backend(settings)
    assert "\n" not in str(failed.value)
    assert str(folder) in str(failed.value)


@pytest.mark.parametrize(("given", "then"), [(None, OPENMP_SPINS), ("7", "7")])
def test_threads_spin_less_where_the_user_has_no_word_on_it(
    monkeypatch: pytest.MonkeyPatch, given: str | None, then: str
) -> None:
    if given is not None:
        monkeypatch.setenv(SPINS, given)
    open_backend(BackendSettings(impl="fake"))
    assert os.environ[SPINS] == then
