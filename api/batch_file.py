"""The two files of a batch job, in OpenAI's format: lines that ask, and lines that answer.

Called by `api/batch.py`. An output is written line by line, and read again when its job goes on:
what is answered there is not asked again.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import orjson
from pydantic import Field

from api.bodies import Form, parse, unknown_fields
from api.errors import ApiError

ID_PREFIX = "batch_req"  # of what answers a line
OPENING = f'{{"id":"{ID_PREFIX}-'.encode()  # of every line that answers


class BatchFileError(Exception):
    """A file that no job can be made of. The message names it and, where there is one, the line."""


class Line(Form):
    """One request."""

    custom_id: str = Field(min_length=1)
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
    body: dict[str, Any]


def read_lines(path: Path) -> Iterator[Line]:
    """The requests of a file, one after another. Empty lines are none.

    Raises BatchFileError naming the first line that is malformed, or whose custom_id another has.
    """
    seen: dict[str, int] = {}  # custom_id: the number of its line
    with _open(path) as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            line = _parse(text, f"{path}, line {number}")
            first = seen.setdefault(line.custom_id, number)
            if first != number:
                raise BatchFileError(
                    f"{path}, line {number}: custom_id {line.custom_id!r} is that of line {first}"
                )
            yield line


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise BatchFileError(f"{path} cannot be read: {error.strerror}") from None


def _parse(text: bytes, place: str) -> Line:
    try:
        line = parse(text, Line)
        unknown_fields(line.model_extra, strict=True)
    except ApiError as error:
        raise BatchFileError(f"{place}: {error.message}") from None
    return line


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to one line."""

    id: str  # of this line of the output
    custom_id: str
    request_id: str
    status: int
    body: bytes  # JSON

    @property
    def failed(self) -> bool:
        """Whether it is an error."""
        return self.status >= 400

    def line(self) -> bytes:
        """As it stands in the file."""
        response = {
            "status_code": self.status,
            "request_id": self.request_id,
            "body": orjson.Fragment(self.body),
        }
        content = {"id": self.id, "custom_id": self.custom_id, "response": response, "error": None}
        return orjson.dumps(content) + b"\n"


class Output:
    """The file of answers. One job at a time has it, until it is closed.

    opened    [ answered before ][ half a line ]
    cut       [ answered before ]
    written   [ answered before ][ line ][ line ] ...
    """

    def __init__(self, path: Path, expected: set[str]) -> None:
        """`expected`: the custom_ids of the job. A half-written last line is cut off.

        Raises BatchFileError for a file that another job writes, or that holds anything else than
        answers to this one; it is then left as it is.
        """
        self.path = path
        self.answered: set[str] = set()  # custom_ids
        self.failed = 0  # of those
        try:
            self._file = path.open("ab+")
        except OSError as error:
            raise BatchFileError(f"{path} cannot be written: {error.strerror}") from None
        try:
            self._lock()
            self._file.truncate(self._read(expected))
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchFileError(f"another batch job writes {self.path}") from None

    def _read(self, expected: set[str]) -> int:
        """Note what is answered. Returns the length of the whole lines in bytes."""
        end = 0
        self._file.seek(0)
        for number, text in enumerate(self._file, 1):
            if not text.endswith(b"\n"):
                if not (text.startswith(OPENING) or OPENING.startswith(text)):
                    raise self._strange(number)
                return end
            self._note(number, text, expected)
            end += len(text)
        return end

    def _note(self, number: int, text: bytes, expected: set[str]) -> None:
        try:
            line = orjson.loads(text)
            name, status = line["custom_id"], line["response"]["status_code"]
            is_ours = name in expected and name not in self.answered
            self.failed += status >= 400
        except (ValueError, TypeError, KeyError):
            raise self._strange(number) from None
        if not is_ours:
            raise self._strange(number)
        self.answered.add(name)

    def _strange(self, number: int) -> BatchFileError:
        return BatchFileError(
            f"{self.path}, line {number}: not an answer to this input: choose another output"
        )

    def write(self, outcome: Outcome) -> None:
        """Add an answer. It is with the system when this returns."""
        self._file.write(outcome.line())
        self._file.flush()
        self.answered.add(outcome.custom_id)
        self.failed += outcome.failed

    def close(self) -> None:
        """Another job may have the file."""
        self._file.close()
