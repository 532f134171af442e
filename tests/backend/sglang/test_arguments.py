"""What SGLang is started with, and what stops the start before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from backend.fake_model import FakeModel
from backend.interface import Unsupported
from backend.sglang.arguments import ATTENTION, SPARE_CONTEXT, engine_arguments, spare_pages
from backend.sglang.folder import ModelFolder
from config import BackendSettings, DeviceSettings, read_settings
from tests.backend.sglang.engine_double import ARGUMENTS
from tests.backend.sglang.scheduler_double import Scheduler
from tests.conformance.cases import VOCABULARY

MODEL = ModelFolder(Path("/models/one"), (3,), 4096)


def arguments(flags: dict[str, str], model: ModelFolder = MODEL) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        for flag, value in flags.items():
            patch.setenv(flag, value)
        return engine_arguments(read_settings().backend, model, "warning")


# flags -> what SGLang is told
HANDED_ON: list[tuple[dict[str, str], dict[str, Any]]] = [
    ({}, {
        "model_path": "/models/one", "skip_tokenizer_init": True,
        "incremental_streaming_output": True, "batch_notify_size": 256,
        "load_format": "auto", "dtype": "auto",
        "trust_remote_code": False, "context_length": None, "tp_size": 1,
        "attention_backend": None, "disable_cuda_graph": False, "enable_torch_compile": False,
        "enable_deterministic_inference": False, "mem_fraction_static": 0.9,
        "max_total_tokens": None, "page_size": 16, "disable_radix_cache": False,
        "max_running_requests": 256, "chunked_prefill_size": 8192, "log_level": "warning",
    }),
    ({"TENSOR_PARALLEL_SIZE": "4"}, {"tp_size": 4}),
    ({"ATTN_IMPL": "triton"}, {"attention_backend": "triton"}),
    ({"ATTN_IMPL": "flash"}, {"attention_backend": "fa3"}),
    ({"ATTN_IMPL": "flashinfer"}, {"attention_backend": "flashinfer"}),
    ({"ATTN_IMPL": "sdpa"}, {"attention_backend": "torch_native"}),
    ({"ENABLE_FLASH_ATTENTION": "0"}, {"attention_backend": "triton"}),
    ({"ENABLE_CUDA_GRAPH": "0"}, {"disable_cuda_graph": True}),
    ({"COMPILE_MODEL": "1"}, {"enable_torch_compile": True}),
    ({"DETERMINISTIC": "1"}, {"enable_deterministic_inference": True}),
    ({"MEMORY_FRACTION": "0.4"}, {"mem_fraction_static": 0.4}),
    ({"PREFIX_CACHE": "0"}, {"disable_radix_cache": True}),
    ({"MAX_RUNNING": "7"}, {"max_running_requests": 7, "batch_notify_size": 7}),
    ({"MAX_STEP_TOKENS": "100", "PAGE_SIZE_TOKENS": "16"}, {"chunked_prefill_size": 112}),
    ({"PAGE_SIZE_TOKENS": "1"}, {"page_size": 1}),
    ({"PAGE_TOKEN_BUDGET": "1000", "PAGE_SIZE_TOKENS": "16"}, {"max_total_tokens": 64 * 16}),
    ({"DTYPE": "bfloat16"}, {"dtype": "bfloat16"}),
    ({"LOAD_FORMAT": "dummy"}, {"load_format": "dummy"}),
    ({"TRUST_REMOTE_CODE": "1"}, {"trust_remote_code": True}),
    ({"DEVICE": "cuda"}, {}),
    ({"MAX_MODEL_LEN": "1000"}, {"context_length": 1000 + SPARE_CONTEXT}),
    ({"MAX_MODEL_LEN": "4096"}, {"context_length": None}),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "told"), HANDED_ON, ids=[" ".join(f) for f, _ in HANDED_ON])
def test_flags_are_handed_on_in_sglangs_names(flags: dict[str, str], told: dict[str, Any]) -> None:
    found = arguments(flags)
    assert {name: found[name] for name in told} == told
    assert found.keys() == ARGUMENTS


REFUSED = [
    ({"DEVICE": "cpu"}, "DEVICE=cpu"),
    ({"DEVICE": "mps"}, "DEVICE=mps"),
    ({"LOAD_FORMAT": "gguf"}, "LOAD_FORMAT=gguf"),
    ({"ATTN_IMPL": "flash", "ENABLE_FLASH_ATTENTION": "0"}, "ENABLE_FLASH_ATTENTION=0"),
    ({"DETERMINISTIC": "1", "COMPILE_MODEL": "1"}, "COMPILE_MODEL=1"),
    ({"DETERMINISTIC": "1", "ATTN_IMPL": "sdpa"}, "ATTN_IMPL=sdpa"),
    ({"MAX_MODEL_LEN": "4097"}, "MAX_MODEL_LEN=4097"),
]


@pytest.mark.parametrize(("flags", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_a_flag_that_cannot_be_honoured_stops_the_start_and_is_named(
    flags: dict[str, str], named: str
) -> None:
    with pytest.raises(Unsupported, match=named) as refusal:
        arguments(flags)
    assert "\n" not in str(refusal.value)


def test_every_choice_of_attention_has_its_name_in_sglang() -> None:
    choices = get_args(DeviceSettings.model_fields["attention"].annotation)
    assert set(choices) <= ATTENTION.keys()


def test_a_context_that_config_json_does_not_tell_is_asked_for_as_it_is() -> None:
    unknown = ModelFolder(MODEL.path, (), None)
    assert arguments({}, unknown)["context_length"] is None
    asked = arguments({"MAX_MODEL_LEN": "100"}, unknown)
    assert asked["context_length"] == 100 + SPARE_CONTEXT


@pytest.mark.parametrize("page_tokens", [1, 2, 3, 4, 7, 16, 256])
@pytest.mark.parametrize("pages", [1, 2, 9])
def test_whatever_the_promised_pages_hold_fits_into_what_sglang_is_asked_for(
    page_tokens: int, pages: int
) -> None:
    held = (pages + spare_pages(page_tokens)) * page_tokens
    model = FakeModel(VOCABULARY, None, (range(VOCABULARY), range(VOCABULARY)))
    pool = held // page_tokens
    scheduler = Scheduler(model, frozenset(), pool, page_tokens, 1, 1, True, True, True)
    promised = pages * page_tokens
    for prompt in range(1, promised + 1):
        assert prompt < held - 1 - 5  # `validate_input_length`
        assert scheduler.limit(prompt, promised - prompt, 10**6) == promised - prompt


def test_the_settings_of_this_backend_are_those_of_any() -> None:
    assert "sglang" in get_args(BackendSettings.model_fields["impl"].annotation)
