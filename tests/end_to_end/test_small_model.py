"""The small real model, whole: what it answers is what transformers answers, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from backend.tokenizer import HfTokenizer
from tests.backend.hf.reference import check_against, open_scheduler

ESSAY = (
    "Rivers shape the land they cross. In the mountains they cut narrow valleys; on the plains "
    "they wander, leaving lakes where a bend was cut off. People settled beside them early, for "
    "water, for fish, and because a boat was the only way to move a heavy load. "
)
PROMPTS = [
    "a",
    "Hello",
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "Q: What is 17 + 25?\nA:",
    "def fibonacci(n: int) -> int:\n    ",
    "SELECT name, count(*) FROM orders\nWHERE",
    "#include <stdio.h>\n\nint main(void) {\n",
    '{"name": "Ada", "born": 1815, "languages": [',
    "从前有一座山，山里有一座庙，",
    "请用一句话介绍北京。",
    "🙂🙃 emoji test 🚀🚀🚀 and then",
    "Ünïcödé — naïve café, smörgåsbord, ",
    "    \n\n\t  indented",
    "<|im_start|>user\nName three primary colors.<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8, 13,",
    ESSAY,
    ESSAY * 4,
    ESSAY * 12,
    ESSAY * 60,  # about 3,000 tokens
]


def test_twenty_prompts_get_the_tokens_and_log_probabilities_of_transformers(
    small_model: Path,
) -> None:
    tokenizer = HfTokenizer.load(small_model)
    prompts = tokenizer.encode_batch(PROMPTS)
    assert min(map(len, prompts)) == 1
    assert max(map(len, prompts)) > 2900
    reference = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval()
    check_against(reference, open_scheduler(small_model), prompts, new_tokens=16, tolerance=1e-3)


@pytest.mark.parametrize("step_tokens", [7, 64])
def test_the_chunk_size_of_prefill_changes_no_answer(small_model: Path, step_tokens: int) -> None:
    tokenizer = HfTokenizer.load(small_model)
    prompts = tokenizer.encode_batch(PROMPTS[:17])
    reference = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval()
    scheduler = open_scheduler(small_model, step_tokens=step_tokens, page_tokens=8)
    check_against(reference, scheduler, prompts, new_tokens=4, tolerance=1e-3)
