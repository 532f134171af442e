"""What sampling fields mean to the engine, and what holds where they say nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from api.bodies import parse_value
from api.errors import ApiError
from api.sampling_fields import GREEDY, SamplingDefaults, SamplingFields
from backend.interface import ModelBroken, RequestRefused, SamplingParams
from backend.tokenizer import ByteTokenizer, IdTokenizer

BYTES = ByteTokenizer()


def params(**fields: object) -> SamplingParams:
    return parse_value(fields, SamplingFields).params(GREEDY, 8, None)


def test_every_field_reaches_the_engine() -> None:
    found = params(
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        frequency_penalty=0.2,
        presence_penalty=-0.3,
        repetition_penalty=1.1,
        logit_bias={"5": 1, "7": -2.5},
        stop_token_ids=[9],
        ignore_eos=True,
    )
    assert found == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        frequency_penalty=0.2,
        presence_penalty=-0.3,
        repetition_penalty=1.1,
        logit_bias=((5, 1.0), (7, -2.5)),
        max_new_tokens=8,
        stop_token_ids=(9,),
        ignore_eos=True,
    )


def test_a_field_that_is_null_is_the_default_of_the_form() -> None:
    nothing = parse_value(dict.fromkeys(SamplingFields.model_fields), SamplingFields)
    defaults = SamplingDefaults(0.7, 0.8, 20, 0.05, 1.05)
    assert nothing.params(defaults, None, None) == SamplingParams(
        temperature=0.7, top_p=0.8, top_k=20, min_p=0.05, repetition_penalty=1.05
    )
    assert nothing.params(GREEDY, None, None) == SamplingParams()


def test_zero_is_a_value_and_not_the_default() -> None:
    fields = parse_value({"temperature": 0, "top_k": 0, "min_p": 0}, SamplingFields)
    found = fields.params(SamplingDefaults(0.7, 1.0, 20, 0.05), None, None)
    assert (found.temperature, found.top_k, found.min_p) == (0, 0, 0)


def test_a_top_k_of_minus_one_is_all() -> None:
    assert params(top_k=-1) == params(top_k=0) == params()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", -1),
        ("frequency_penalty", 3),
        ("presence_penalty", float("nan")),
        ("repetition_penalty", 0),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": float("nan")}),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestRefused, match=name) as caught:
        params(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"5.0": 1}),
        ("n", 0),
        ("n", 129),
        ("n", -1),
        ("ignore_eos", 1),
        ("stop_token_ids", 5),
        ("skip_special_tokens", "no"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ApiError) as caught:
        params(**{name: value})
    assert (caught.value.status, caught.value.param) == (400, name)


@pytest.mark.parametrize(("stop", "strings"), [(None, ()), ("a", ("a",)), (["a", "b"], ("a", "b"))])
def test_stop_is_one_string_or_many(stop: object, strings: tuple[str, ...]) -> None:
    assert parse_value({"stop": stop}, SamplingFields).stops(BYTES) == strings


@pytest.mark.parametrize("stop", ["", [""], ["a"] * 65, "a" * 1025])
def test_a_stop_string_that_cannot_be_looked_for_is_refused(stop: object) -> None:
    with pytest.raises(RequestRefused, match="stop"):
        parse_value({"stop": stop}, SamplingFields).stops(BYTES)


def test_where_answers_have_no_text_there_are_no_stop_strings() -> None:
    assert SamplingFields().stops(IdTokenizer(8)) == ()
    with pytest.raises(RequestRefused, match="give stop_token_ids"):
        parse_value({"stop": "a"}, SamplingFields).stops(IdTokenizer(8))


@pytest.mark.parametrize(
    ("content", "defaults"),
    [
        ("{}", SamplingDefaults()),
        ('{"temperature": 0.6, "top_k": 20}', SamplingDefaults(temperature=0.6, top_k=20)),
        ('{"temperature": 0.6, "do_sample": false}', SamplingDefaults(temperature=0.0)),
        ('{"temperature": null, "max_length": 7}', SamplingDefaults()),
    ],
)
def test_defaults_are_the_models_generation_config(
    tmp_path: Path, content: str, defaults: SamplingDefaults
) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    assert SamplingDefaults.of(str(tmp_path)) == defaults


@pytest.mark.parametrize("content", ["{", "[1]", '{"top_p": "x"}', '{"temperature": -1}'])
def test_a_generation_config_that_nobody_can_draw_by_stops_the_start(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ModelBroken, match=r"generation_config\.json"):
        SamplingDefaults.of(str(tmp_path))


def test_a_model_that_says_nothing_is_sampled_as_it_is(tmp_path: Path) -> None:
    assert SamplingDefaults.of(None) == SamplingDefaults.of(str(tmp_path)) == SamplingDefaults()


def test_the_small_model_is_sampled_as_its_authors_say(small_model: Path) -> None:
    said = json.loads((small_model / "generation_config.json").read_text())
    defaults = SamplingDefaults.of(str(small_model))
    for name in SamplingDefaults.__slots__:
        assert getattr(defaults, name) == said.get(name, getattr(SamplingDefaults(), name))
