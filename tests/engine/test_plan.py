"""`python -m engine.plan`: what it says, what it refuses, and that a start agrees."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backend.hf.opening import open_backend
from backend.interface import ModelBroken, ModelNotFound, StartFailed, Unsupported
from config import BackendSettings, BatchSettings, CacheSettings, DeviceSettings, ModelSettings
from engine.plan import card, main, make_plan, size
from engine.scheduler import Scheduler

GB = 10**9


def shaped(root: Path, name: str, **parts: Any) -> BackendSettings:
    """Settings for a model of which only the config.json is there."""
    model = ModelSettings(local_dir=str(root / "tests" / "shapes" / name), load_format="dummy")
    return BackendSettings(model=model, **parts)


def test_the_plan_of_a_model_that_is_worked_out_by_hand(root: Path) -> None:
    plan = make_plan(shaped(root, "qwen3-0.6b"), 141 * GB)
    table, layers = 151936 * 1024, 28 * 1024 * (2048 + 2048 + 2048 + 3 * 3072)
    norms = 28 * (2 * 1024 + 24 * 128) + 1024
    assert (plan.device, plan.dtype, plan.context) == ("cuda", "bfloat16", 40960)
    assert plan.parameters == table + layers
    assert plan.weights == {"bfloat16": 2 * (table + layers + norms)}
    assert plan.kv_bytes_per_token == 28 * 2 * 8 * 128 * 2
    assert (plan.limits.max_running, plan.limits.max_step_tokens) == (256, 8192)
    pages_take = plan.pages * 16 * plan.kv_bytes_per_token
    assert 0.85 * 141 * GB < pages_take + sum(plan.weights.values()) < 0.9 * 141 * GB
    assert plan.sequences == {
        length: plan.pages // (length // 16) for length in (1024, 4096, 40960)
    }
    assert plan.refusal is None


def test_fewer_rows_and_shorter_steps_leave_more_pages(root: Path) -> None:
    wide = make_plan(shaped(root, "qwen3-8b"), 24 * GB)
    small = BatchSettings(max_running=16, max_step_tokens=1024)
    narrow = make_plan(shaped(root, "qwen3-8b", batch=small), 24 * GB)
    assert 0 < wide.pages < narrow.pages
    assert wide.sequences[40960] == 0


def test_what_does_not_fit_is_said_and_shown(root: Path) -> None:
    plan = make_plan(shaped(root, "qwen3-8b"), 16 * GB)
    assert plan.pages == 0
    assert plan.refusal is not None
    assert "take a smaller model" in plan.refusal
    assert ("pages", "0 of 16 tokens: 0 tokens, 0 MiB") in list(card(plan))


def test_a_start_on_this_machine_agrees(small_model: Path) -> None:
    settings = BackendSettings(
        model=ModelSettings(local_dir=str(small_model)),
        device=DeviceSettings(device="cpu"),
        cache=CacheSettings(budget_tokens=4096),
        batch=BatchSettings(max_running=2, max_step_tokens=64),
    )
    plan = make_plan(settings)
    backend = open_backend(settings, Scheduler)
    spec = backend.spec
    backend.close()
    assert (plan.parameters, plan.dtype, plan.context, plan.pages) == (
        spec.parameters,
        spec.dtype,
        spec.max_model_len,
        spec.pages,
    )
    assert plan.kv_bytes_per_token == spec.kv_bytes_per_token
    assert plan.limits == settings.batch
    assert plan.peak is None
    weights = sum(path.stat().st_size for path in small_model.glob("*.safetensors"))
    assert list(plan.stored) == ["bfloat16"]
    assert 0.999 * weights < plan.stored["bfloat16"] < weights


def test_weights_that_are_not_whole_are_refused_as_a_start_would(
    root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(root / "tests" / "shapes" / "qwen3-0.6b", folder)
    settings = BackendSettings(model=ModelSettings(local_dir=str(folder)))
    with pytest.raises(ModelNotFound, match="no folder with safetensors"):
        make_plan(settings, GB)
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelBroken, match=r"model\.safetensors"):
        make_plan(settings, GB)


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, Unsupported, "GPT2LMHeadModel runs through trans"),
        ({"hidden_size": "wide"}, ModelBroken, "hidden_size must be int"),
        ({"torch_dtype": "float8"}, Unsupported, "config.json has dtype float8"),
    ],
)
def test_a_config_that_cannot_be_planned_is_one_line(
    root: Path, tmp_path: Path, changes: dict[str, Any], kind: type[StartFailed], says: str
) -> None:
    config = json.loads((root / "tests/shapes/qwen3-0.6b/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    model = ModelSettings(local_dir=str(tmp_path), load_format="dummy")
    with pytest.raises(kind, match=says):
        make_plan(BackendSettings(model=model), GB)


def test_a_context_beyond_the_models_is_refused_as_a_start_would(root: Path) -> None:
    settings = shaped(root, "qwen3-0.6b")
    model = settings.model.model_copy(update={"max_model_len": 50_000})
    with pytest.raises(Unsupported, match="MAX_MODEL_LEN=50000 exceeds the model's context"):
        make_plan(settings.model_copy(update={"model": model}), GB)


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("141GB", 141 * GB),
        ("80GiB", 80 << 30),
        ("1.5 TiB", 3 << 39),
        ("24G", 24 * GB),
        ("512MiB", 512 << 20),
        ("1000", 1000),
    ],
)
def test_sizes_are_read_in_either_kind_of_unit(text: str, bytes_: int) -> None:
    assert size(text) == bytes_


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0", "12XB", "1.2.3GB", "i", "."])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        size(text)


def test_the_command_prints_a_card_or_one_object(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODEL_LOCAL_DIR", str(root / "tests" / "shapes" / "qwen3-0.6b"))
    monkeypatch.setenv("LOAD_FORMAT", "dummy")
    assert main(["--device-memory", "141GB"]) == 0
    assert "parameters            596.0 M\n" in capsys.readouterr().out
    assert main(["--device-memory", "141GB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["kv_bytes_per_token"] == 114688
    assert plan["limits"] == {"max_running": 256, "max_step_tokens": 8192}
    assert plan["peak"].keys() == {"held", "prefill", "decode", "graphs"}
    monkeypatch.setenv("ENABLE_CUDA_GRAPH", "0")
    assert main(["--device-memory", "141GB", "--json"]) == 0
    without = json.loads(capsys.readouterr().out)
    assert without["peak"]["graphs"] == 0
    assert without["pages"] > plan["pages"]
    assert main(["--device-memory", "1GB"]) == 1
    shown = capsys.readouterr()
    assert "pages                 0 of 16 tokens" in shown.out
    assert len(shown.err.splitlines()) == 1


def test_the_command_fails_with_one_line_where_there_is_nothing_to_plan(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "engine.plan"],
        env={**os.environ, "MODEL_LOCAL_DIR": "/nowhere"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("MODEL_LOCAL_DIR=/nowhere does not exist")
    assert len(done.stderr.splitlines()) == 1
