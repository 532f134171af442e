"""Start-up of the native backend: what is chosen, what is refused, who else runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from backend.hf.memory import page_budget
from backend.hf.opening import open_backend
from backend.interface import ModelBroken, ModelNotFound, StartFailed, Unsupported
from config import BackendSettings, BatchSettings, CacheSettings, DeviceSettings, ModelSettings
from engine.scheduler import Scheduler
from tests.backend.hf.reference import check_against, open_scheduler, random_prompts


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=[3, 5],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    return tmp_path


def open_with(model: ModelSettings, device: DeviceSettings | None = None) -> Scheduler:
    settings = BackendSettings(
        model=model,
        device=device or DeviceSettings(device="cpu"),
        cache=CacheSettings(budget_tokens=256),
    )
    backend = open_backend(settings, Scheduler)
    assert isinstance(backend, Scheduler)
    return backend


def test_an_architecture_without_code_of_our_own_answers_as_transformers_does(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2,
        eos_token_id=None,
    )  # fmt: skip
    reference = AutoModelForCausalLM.from_config(config).eval()
    reference.save_pretrained(tmp_path)
    scheduler = open_scheduler(tmp_path, step_tokens=32, page_tokens=4)
    prompts = random_prompts(random.Random(0), count=4, longest=60, vocabulary=97)
    check_against(reference, scheduler, prompts, new_tokens=12, tolerance=1e-3)


def test_the_spec_says_what_the_checkpoint_and_the_settings_decided(tiny_llama: Path) -> None:
    spec = open_with(ModelSettings(local_dir=str(tiny_llama), max_model_len=100)).spec
    assert (spec.max_model_len, spec.vocabulary, spec.stop_ids) == (100, 97, (3, 5))
    assert (spec.pages, spec.page_tokens) == (16, 16)
    assert spec.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4  # layers, K and V, heads, width, float32


def test_without_a_budget_pages_fill_what_rows_can_use_and_memory_holds(tiny_llama: Path) -> None:
    settings = BackendSettings(
        model=ModelSettings(local_dir=str(tiny_llama)),
        device=DeviceSettings(device="cpu"),
        batch=BatchSettings(max_running=2),
    )
    assert open_backend(settings, Scheduler).spec.pages == 2 * 128 // 16
    starved = settings.model_copy(
        update={"device": DeviceSettings(device="cpu", memory_fraction=1e-9)}
    )
    with pytest.raises(StartFailed, match="hold no page"):
        open_backend(starved, Scheduler)


def test_a_budget_beyond_the_memory_there_is_names_both_sizes() -> None:
    settings = BackendSettings(cache=CacheSettings(budget_tokens=1 << 28))
    message = r"PAGE_TOKEN_BUDGET=268435456 takes 268,435,456 MiB, [\d,]+ MiB are available"
    with pytest.raises(StartFailed, match=message):
        page_budget(settings, kv_bytes=1 << 20, context=128, device="cpu")
    assert page_budget(settings, kv_bytes=1, context=128, device="cpu") == 1 << 28


def test_a_context_longer_than_the_models_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(Unsupported, match="MAX_MODEL_LEN=200 exceeds the model's context of 128"):
        open_with(ModelSettings(local_dir=str(tiny_llama), max_model_len=200))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_refused_by_name(tiny_llama: Path) -> None:
    with pytest.raises(Unsupported, match="DEVICE=cuda"):
        open_with(ModelSettings(local_dir=str(tiny_llama)), DeviceSettings(device="cuda"))


def test_an_unknown_architecture_is_refused_by_name(tiny_llama: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    config |= {"architectures": ["WhimsyForCausalLM"], "model_type": "whimsy"}
    (tiny_llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="WhimsyForCausalLM"):
        open_with(ModelSettings(local_dir=str(tiny_llama)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            (key, value)
            for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
            for value in (None, "30", 0, True, [4])
        ),
        ("intermediate_size", None),
        ("num_key_value_heads", 3),
        ("head_dim", 8.5),
        ("rms_norm_eps", "small"),
        ("hidden_act", 1),
        ("tie_word_embeddings", "yes"),
        ("attention_bias", 1),
        ("rope_parameters", "default"),
    ],
)
def test_a_key_of_the_config_that_makes_no_sense_is_named(
    tiny_llama: Path, key: str, value: object
) -> None:
    message = broken_config(tiny_llama, {key: value})
    assert message.startswith("config.json: ")
    assert key in message


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("linear", "factor"),
        ("llama3", "factor"),
        ("llama3", "low_freq_factor"),
        ("llama3", "high_freq_factor"),
        ("llama3", "original_max_position_embeddings"),
        ("yarn", "factor"),
        ("yarn", "mscale"),
        ("default", "rope_theta"),
        ("yarn", "rope_type"),
    ],
)
@pytest.mark.parametrize("wrong", [None, "four", [4]])
def test_a_rope_without_one_of_its_parameters_is_refused(
    tiny_llama: Path, kind: str, key: str, wrong: object
) -> None:
    rope: dict[str, object] = {
        "rope_type": kind, "rope_theta": 10_000, "factor": 4, "low_freq_factor": 1,
        "high_freq_factor": 4, "original_max_position_embeddings": 64, "mscale": 1,
    }  # fmt: skip
    if wrong is None and (kind == "yarn" or key == "rope_theta"):
        wrong = False  # these have a default
    if key == "rope_type" and wrong == "four":
        wrong = 4  # any text is a type, if only an unknown one
    message = broken_config(tiny_llama, {"rope_parameters": {**rope, key: wrong}})
    assert message.startswith(f"config.json: {key} must be ")


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("Mistral", "sliding_window", "all"),
        ("Qwen2", "sliding_window", 0),
        ("Qwen2", "use_sliding_window", "no"),
        ("Qwen2", "max_window_layers", "28"),
        ("Qwen3", "layer_types", ["full_attention"]),
        ("Qwen3", "attention_bias", "no"),
    ],
)
def test_a_familys_own_keys_are_checked_too(
    tiny_llama: Path, family: str, key: str, value: object
) -> None:
    changes = {"architectures": [f"{family}ForCausalLM"], "use_sliding_window": True, key: value}
    assert broken_config(tiny_llama, changes).startswith(f"config.json: {key} must be ")


def broken_config(folder: Path, changes: dict[str, object]) -> str:
    """The one line with which a changed config.json is refused."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelBroken) as caught:
        open_with(ModelSettings(local_dir=str(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_and_a_truncated_file_end_the_start_with_one_line(
    tiny_llama: Path,
) -> None:
    with pytest.raises(ModelNotFound, match="MODEL_LOCAL_DIR=/no/such/model") as missing:
        open_with(ModelSettings(local_dir="/no/such/model"))
    weights = tiny_llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelBroken, match=r"model\.safetensors") as broken:
        open_with(ModelSettings(local_dir=str(tiny_llama)))
    assert "\n" not in f"{missing.value}{broken.value}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_weights_stay_within_a_tolerance_of_float32(
    tiny_llama: Path, dtype: str
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    reference.bfloat16().float()  # the checkpoint's numbers, as sixteen bits hold them
    scheduler = open_scheduler(tiny_llama, dtype=dtype)
    prompts = random_prompts(random.Random(1), count=4, longest=60, vocabulary=97)
    check_against(reference, scheduler, prompts, new_tokens=0, tolerance=0.02)
