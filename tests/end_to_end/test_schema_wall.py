"""The first schemas of the wall, and that a bound stream says what the whole says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from backend.grammar_forms import schema_grammar
from backend.interface import SamplingParams
from engine.llm import LLM
from tests.end_to_end.schema_wall import SCALARS, SHAPES, answer_all, judge, open_small, schemas

FEW = 24
SCHEMA = {"type": "array", "items": {"enum": ["one", "two"]}, "minItems": 2, "maxItems": 2}


@pytest.fixture(scope="module")
def llm(small_model: Path) -> Iterator[LLM]:
    with open_small(small_model) as found:
        yield found


def test_the_wall_has_three_hundred_schemas_of_every_shape_and_scalar() -> None:
    assert len({repr(schema) for schema in schemas()}) == len(SHAPES) * len(SCALARS) + 1 == 300


def test_what_ends_with_stop_matches_its_schema(llm: LLM) -> None:
    answered = answer_all(llm, list(islice(schemas(), FEW)), new=20)
    ends = Counter(judge(schema, answer) for schema, answer in answered)
    assert set(ends) == {"stop", "length"}
    assert ends["stop"] > FEW / 2


def test_a_bound_stream_says_what_the_whole_says(llm: LLM) -> None:
    prompt = llm.tokenizer.encode("Hello")
    sampling = SamplingParams(max_new_tokens=20, grammar=schema_grammar(SCHEMA))
    (whole,) = llm.generate([prompt], sampling)
    pieces = list(llm.stream(prompt, sampling))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert pieces[-1].finish == whole.finish
