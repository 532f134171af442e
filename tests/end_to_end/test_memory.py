"""How much memory the small real model takes, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backend.hf.precision import cpu_has_bfloat16

BUDGETS = {"float32": 4096, "bfloat16": 16384}  # tokens: what a slow and a fast processor fill
PROBE = """
import json, psutil
import torch
memory = psutil.Process().memory_info
before = memory().rss
from backend.interface import SamplingParams
from engine.llm import LLM
with LLM() as llm:
    spec = llm.spec
    prompts = [[number + 10] * 1000 for number in range(spec.pages // 64)]
    llm.generate(prompts, SamplingParams(max_new_tokens=8, ignore_eos=True))
    load = llm.engine.load()
    print(json.dumps({
        "used": memory().rss - before,
        "weights": spec.weight_bytes,  # of the products: the head among them
        "vocabulary": spec.vocabulary,
        "pages": spec.pages * spec.page_tokens * spec.kv_bytes_per_token,
        "filled": 1 - load.pages_free / load.pages_total,
    }))
"""


@pytest.mark.parametrize("dtype", BUDGETS)
def test_memory_is_weights_a_second_copy_of_the_tied_head_the_pages_and_a_fifth(
    small_model: Path, root: Path, dtype: str
) -> None:
    if dtype == "bfloat16" and not cpu_has_bfloat16():
        pytest.skip("this processor has no bfloat16 arithmetic: filling the pages takes an hour")
    environment = os.environ | {
        "MODEL_LOCAL_DIR": str(small_model),
        "DEVICE": "cpu",
        "DTYPE": dtype,
        "PAGE_TOKEN_BUDGET": str(BUDGETS[dtype]),
        "PYTHONPATH": str(root),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    table = found["vocabulary"] * 576 * (4 if dtype == "float32" else 2)
    assert found["filled"] > 0.95, "the pages must have been written to count"
    assert found["used"] < 1.2 * (found["weights"] + table + found["pages"])
