"""Instructor: pydantic models as answers, by tools and by JSON schema."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, Field

instructor = pytest.importorskip("instructor", reason="instructor is in requirements-clients.txt")

ASKED = [{"role": "user", "content": "Ann is 30 years old. Who is it?"}]


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_a_person_is_read_from_a_sentence(mode: str, base_url: str, model: str) -> None:
    from openai import OpenAI

    client: Any = instructor.from_openai(
        OpenAI(base_url=base_url, api_key="none"), mode=instructor.Mode[mode]
    )
    person = client.chat.completions.create(
        model=model,
        messages=ASKED,
        response_model=Person,
        temperature=0,
        max_tokens=64,
        max_retries=0,
    )
    assert isinstance(person, Person)
