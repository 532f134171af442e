"""What each part measures, in which order, under which flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

PART_S = 480  # that a part may take at most

# Of every measurement: the limits that the reference workload is compared under.
FLAGS = {
    "LOAD_FORMAT": "dummy",
    "MAX_RUNNING": "256",
    "MAX_STEP_TOKENS": "16384",
    "PREFIX_CACHE": "1",
    "REPLICAS": "1",
}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One child process: a generator of results, handed the settings of its environment."""

    name: str
    run: str  # "module:function"
    limit_s: float  # then it is ended
    flags: Mapping[str, str] = field(default_factory=dict)  # over FLAGS
    shape: Literal["model", "large"] = "model"  # which folder its config comes from


START = Measurement("a start", "bench.cuda_check.first_token:start", 90)
OFFLINE = Measurement("without HTTP", "bench.cuda_check.speed:beside_http", 90)
OVER_HTTP = Measurement("over HTTP", "bench.cuda_check.over_http:serve", 130)

PARTS: dict[str, tuple[Measurement, ...]] = {
    "correct": (Measurement("GPU tests", "bench.cuda_check.gpu_tests:run_tests", 470),),
    # the starts first: nothing is compiled yet when the first one begins
    "speed": (START, START, Measurement("offline", "bench.cuda_check.speed:offline", 280)),
    "http": (OFFLINE, OVER_HTTP, OFFLINE, OVER_HTTP),
    "wide": (
        Measurement("other work", "bench.cuda_check.wide:other_work", 150),
        Measurement(
            "shared prefixes, uncached",
            "bench.cuda_check.wide:shared_uncached",
            80,
            {"PREFIX_CACHE": "0"},
        ),
        Measurement(
            "deterministic",
            "bench.cuda_check.wide:deterministic",
            120,
            {"DETERMINISTIC": "1"},
        ),
        Measurement("a larger model", "bench.cuda_check.wide:large", 120, shape="large"),
    ),
    "sglang": (
        # a first start compiles for minutes
        Measurement(
            "SGLang, both ways",
            "bench.cuda_check.sglang_beside:beside_direct",
            300,
            {"BACKEND_IMPL": "sglang"},
        ),
        Measurement("native", "bench.cuda_check.sglang_beside:native", 80, {"BACKEND_IMPL": "hf"}),
        Measurement(
            "native, kernels of SGLang",
            "bench.cuda_check.sglang_beside:native",
            90,
            {"BACKEND_IMPL": "hf", "ATTN_IMPL": "sgl_kernel"},
        ),
    ),
}
