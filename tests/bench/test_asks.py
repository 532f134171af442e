"""Where requests come from, and that their seeds decide all that is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.interface import RequestRefused
from backend.tokenizer import open_tokenizer
from bench.asks import (
    Ask,
    Manner,
    random_prompts,
    random_source,
    read_prompts,
    text_source,
    workload_source,
)
from bench.workloads import mix

MANNER = Manner(new_tokens=8, temperature=0.5, seed=3, ignore_eos=False)


def test_random_prompts_are_new_in_each_run_and_the_same_for_a_seed() -> None:
    source = random_source(4, 16, MANNER)
    first, second = source.draw("0-0", 260), source.draw("0-1", 260)
    assert source.draw("0-0", 260) == first
    assert len({ask.prompt for ask in first + second}) == 8
    assert [ask.seed for ask in first] == [3, 4, 5, 6]
    assert random_source(4, 16, Manner(8, 0.5, 4, False)).draw("0-0", 260) != first


@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_random_prompts_have_about_as_many_tokens_as_asked_for(
    small_model: Path, tokens: int
) -> None:
    tokenizer = open_tokenizer(str(small_model), 49_152)
    for prompt in random_prompts(8, tokens, "seed"):
        assert len(tokenizer.encode(prompt)) == pytest.approx(tokens, rel=0.1)


def test_given_prompts_come_in_order_and_then_again() -> None:
    source = text_source("two", ["a", "b"], 5, MANNER)
    assert source.count == 5
    assert [ask.prompt for ask in source.draw("0-0", 260)] == ["a", "b", "a", "b", "a"]
    assert source.draw("0-0", 260) == source.draw("1-0", 260)


def test_a_workload_is_asked_id_by_id_in_its_own_lengths() -> None:
    source = workload_source("mix", 3, seed=7)
    jobs = mix(260).jobs[:3]
    assert source.draw("0-0", 260) == [
        Ask(job.prompt, job.new_tokens, 0.0, 7 + number, ignore_eos=True)
        for number, job in enumerate(jobs)
    ]
    assert workload_source("reference", None, seed=0).count == 256


def test_more_requests_than_a_workload_has_are_refused_before_anything_starts() -> None:
    with pytest.raises(RequestRefused, match="has 32 requests, 33 were asked for"):
        workload_source("mix", 33, seed=0)


def test_prompts_are_the_lines_of_a_file_or_the_prompts_of_its_objects(tmp_path: Path) -> None:
    plain, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_bytes("one\r\n\n  two \nthr\u2028ee".encode())
    objects.write_text('{"prompt": "one", "id": 4}\n\n{"prompt": "two\\nlines"}\n')
    assert read_prompts(str(plain)) == ["one", "  two ", "thr\u2028ee"]
    assert read_prompts(str(objects)) == ["one", "two\nlines"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "cannot be read: .*No such file"),
        ("empty.txt", b"\n \n", "holds no prompt"),
        ("binary.txt", b"\xff\xfe", "cannot be read"),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "each line must be a JSON object"),
        ("other.jsonl", b'{"text": "a"}\n', "each line must be a JSON object"),
        ("number.jsonl", b'{"prompt": 1}\n', "each line must be a JSON object"),
        ("list.jsonl", b'["prompt"]\n', "each line must be a JSON object"),
    ],
)
def test_a_file_without_prompts_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestRefused, match=rf"--prompts .*{name}:? .*{says}") as refused:
        read_prompts(str(path))
    assert "\n" not in str(refused.value)
