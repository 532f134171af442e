"""The two files of a batch job: what a line may be, and what an interruption leaves."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from api.batch_file import BatchFileError, Outcome, Output, read_lines

GOOD: dict[str, Any] = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"prompt": "hello"},
}


def outcome(name: str, status: int = 200) -> Outcome:
    return Outcome(f"batch_req-{name}", name, f"req-{name}", status, b'{"text":"\\u00fc"}')


def written(path: Path, *names: str, status: int = 200) -> bytes:
    """What a job leaves that answered these."""
    with closing(Output(path, set(names))) as output:
        for name in names:
            output.write(outcome(name, status))
    return path.read_bytes()


def refusal(path: Path, expected: set[str]) -> str:
    """Why an output is not taken; it must be left as it was."""
    before = path.read_bytes()
    with pytest.raises(BatchFileError) as raised:
        Output(path, expected)
    assert path.read_bytes() == before
    return str(raised.value)


def test_lines_are_read_in_order_and_empty_ones_are_none(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text(f"{json.dumps(GOOD)}\n\n  \n{json.dumps({**GOOD, 'custom_id': 'b'})}")
    lines = list(read_lines(path))
    assert [line.custom_id for line in lines] == ["a", "b"]
    assert (lines[0].url, lines[0].body) == (GOOD["url"], GOOD["body"])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ("\xff", "JSON"),
        (json.dumps({**GOOD, "custom_id": ""}), "custom_id"),
        (json.dumps({**GOOD, "custom_id": 7}), "custom_id"),
        (json.dumps({name: GOOD[name] for name in ("method", "url", "body")}), "custom_id"),
        (json.dumps({**GOOD, "method": "GET"}), "method"),
        (json.dumps({**GOOD, "url": "/control"}), "url"),
        (json.dumps({**GOOD, "body": "hello"}), "body"),
        (json.dumps({**GOOD, "priority": 1}), "priority"),
    ],
)
def test_a_malformed_line_is_named_by_number_and_field(
    tmp_path: Path, text: str, names: str
) -> None:
    path = tmp_path / "in"
    path.write_text(f"{json.dumps({**GOOD, 'custom_id': 'first'})}\n{text}\n", "latin-1")
    with pytest.raises(BatchFileError, match=f"line 2: .*{names}"):
        list(read_lines(path))


def test_a_custom_id_that_comes_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n")
    with pytest.raises(BatchFileError, match="line 3: custom_id 'a' is that of line 1"):
        list(read_lines(path))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BatchFileError, match=r"in cannot be read: No such file"):
        list(read_lines(tmp_path / "in"))
    with pytest.raises(BatchFileError, match=r"out cannot be written: No such file"):
        Output(tmp_path / "none" / "out", set())


def test_an_answer_is_a_line_in_the_form_of_openai(tmp_path: Path) -> None:
    text = written(tmp_path / "out", "a")
    assert json.loads(text) == {
        "id": "batch_req-a",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "req-a", "body": {"text": "ü"}},
        "error": None,
    }


def test_an_answer_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with closing(Output(tmp_path / "out", {"a"})) as output:
        output.write(outcome("a"))
        assert (tmp_path / "out").read_bytes().endswith(b"\n")


@given(cut=st.integers(0, 400))
def test_wherever_a_write_was_cut_whole_answers_stay_and_the_rest_goes(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "out"
    names = {"a": 200, "b": 400, "c": 200}
    lines = [outcome(name, status).line() for name, status in names.items()]
    left = b"".join(lines)[:cut]
    path.write_bytes(left)
    whole = left.count(b"\n")
    with closing(Output(path, set(names))) as output:
        assert output.answered == set(list(names)[:whole])
        assert output.failed == (whole > 1)
        assert path.read_bytes() == b"".join(lines[:whole])
        for name in list(names)[whole:]:
            output.write(outcome(name, names[name]))
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        "notes of mine",
        "notes of mine\n",
        '{"custom_id": "a"}\n',
        '{"custom_id": "a", "response": {"status_code": "200"}}\n',
        '{"custom_id": ["a"], "response": {"status_code": 200}}\n',
        "[1]\n",
        json.dumps(GOOD) + "\n",
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "out"
    path.write_text(text)
    assert "line 1" in refusal(path, {"a"})


def test_the_answers_of_another_job_or_twice_the_same_are_left_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "out"
    text = written(path, "a", "b")
    assert "line 2" in refusal(path, {"a", "c"})
    path.write_bytes(text + text[: text.index(b"\n") + 1])
    assert "line 3" in refusal(path, {"a", "b"})


def test_two_jobs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with closing(Output(path, {"a"})):
        assert "another batch job" in refusal(path, {"a"})
    Output(path, {"a"}).close()
