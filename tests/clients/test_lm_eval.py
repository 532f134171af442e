"""lm-eval's `local-completions` scores 50 questions as its transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is in requirements-clients.txt")

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent.parent / "models" / "smollm2-135m-instruct"
TASK = {
    "task": "common_knowledge",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(HERE / "evaluation" / "items.jsonl")}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
CLOSE = 0.01  # of a sum of log-probabilities, both in float32


def evaluate(kind: str, **arguments: Any) -> dict[str, Any]:
    """lm-eval's results of the task with one kind of model."""
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=kind, model_args=arguments, tasks=[dict(TASK)], batch_size=8, log_samples=True
    )
    return found


def likelihoods(found: dict[str, Any]) -> list[list[float]]:
    """For each question the log-probability of each choice."""
    samples = sorted(found["samples"]["common_knowledge"], key=lambda each: each["doc_id"])
    return [[float(choice[0]) for choice in each["filtered_resps"]] for each in samples]


def test_the_scores_are_those_of_transformers(base_url: str, model: str) -> None:
    ours = evaluate(
        "local-completions",
        model=model,
        base_url=f"{base_url}/completions",
        tokenizer=str(FOLDER),
        tokenizer_backend="huggingface",
        num_concurrent=4,
        max_length=4096,
    )
    theirs = evaluate("hf", pretrained=str(FOLDER), dtype="float32", device="cpu")
    for metric in ("acc,none", "acc_norm,none"):
        results = [each["results"]["common_knowledge"][metric] for each in (ours, theirs)]
        assert results[0] == results[1]
    for found, wanted in zip(likelihoods(ours), likelihoods(theirs), strict=True):
        assert found == pytest.approx(wanted, abs=CLOSE)
