"""Many schemas, each answered by the small real model: what ends with "stop" must validate.

    python -m tests.end_to_end.schema_wall [how many]

The oracle is the package jsonschema. The last line says how many answers ended how.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any, TypeAlias

import jsonschema

from backend.grammar_forms import schema_grammar
from backend.interface import SamplingParams
from config import BackendSettings, ModelSettings, Settings
from engine.llm import LLM, Answer

logger = logging.getLogger(__name__)

Schema: TypeAlias = dict[str, Any]

MODEL = Path("models/smollm2-135m-instruct")
PROMPT = "<|im_start|>user\nAnswer with JSON only: {}<|im_end|>\n<|im_start|>assistant\n"
NAMES = ("name", "age", "city", "tags", "is open", "größe")

SCALARS: tuple[Schema, ...] = (
    {"type": "integer", "minimum": 0, "maximum": 120},
    {"type": "integer", "exclusiveMinimum": -5, "exclusiveMaximum": 5},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 50},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "boolean"},
    {"type": "null"},
    {"type": "string", "maxLength": 12},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "pattern": "^[A-Z][a-z]{2,6}$"},
    {"type": "string", "pattern": "[0-9]{3}-[0-9]{4}", "maxLength": 12},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "email", "maxLength": 30},
    {"enum": ["red", "green", 3, None, True, 1.5]},
    {"enum": ['a "quoted" word', "back\\slash", "é🙂", "line\nbreak"]},
    {"const": {"fixed": [1, "two"]}},
    {"type": ["integer", "null"], "minimum": 1, "maximum": 9},
    {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 4}]},
    {"oneOf": [{"type": "integer", "minimum": 1, "maximum": 9}, {"type": "null"}]},
    {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 7}]},
)


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": 3}


def pair(items: Schema) -> Schema:
    return {"type": "array", "prefixItems": [{"type": "boolean"}, items], "items": False}


def closed(value: Schema) -> Schema:
    return {
        "type": "object",
        "properties": {"value": value, "ok": {"type": "boolean"}},
        "required": ["value", "ok"],
        "additionalProperties": False,
    }


def optional(value: Schema) -> Schema:
    return {
        "type": "object",
        "properties": dict.fromkeys(NAMES[:3], value),
        "required": [NAMES[1]],
        "additionalProperties": False,
    }


def referred(value: Schema) -> Schema:
    return {"$defs": {"it": value}, **closed({"$ref": "#/$defs/it"})}


def nested(value: Schema) -> Schema:
    return closed(array(closed(value)))


def named(value: Schema) -> Schema:
    return {
        "type": "object",
        "properties": dict.fromkeys(NAMES, value),
        "required": list(NAMES),
        "additionalProperties": False,
    }


def mapped(value: Schema) -> Schema:
    return {
        "type": "object",
        "patternProperties": {"^[a-z]{1,5}$": value},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 2,
    }


def tree(value: Schema) -> Schema:
    node = closed(value)
    node["properties"]["next"] = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


def plain(value: Schema) -> Schema:
    return value


def either(value: Schema) -> Schema:
    return {"anyOf": [closed(value), array({"type": "null"})]}


def hinted(value: Schema) -> Schema:
    return {"title": "It", "description": "What it is", "examples": [1], **closed(value)}


def list_of_pairs(value: Schema) -> Schema:
    return {"type": "array", "items": pair(value), "minItems": 1, "maxItems": 2}


SHAPES = (
    *(closed, array, plain, optional, nested, referred, pair, named, mapped, tree, either, hinted),
    list_of_pairs,
)


def schemas() -> Iterator[Schema]:
    """299 of them, so mixed that the first ones are of every shape and every scalar."""
    count = len(SHAPES) * len(SCALARS)  # without a common factor: each pair comes once
    yield from (SHAPES[at % len(SHAPES)](SCALARS[at % len(SCALARS)]) for at in range(count))
    yield {"type": "object"}


def answer_all(llm: LLM, wanted: Sequence[Schema], new: int) -> list[tuple[Schema, Answer]]:
    """Each schema greedily and with temperature 1, all in one batch."""
    cases = list(product(wanted, (0.0, 1.0)))
    prompts = [
        llm.tokenizer.encode(PROMPT.format(json.dumps(schema)[:120]), add_special_tokens=False)
        for schema, _ in cases
    ]
    samplings = [
        SamplingParams(max_new_tokens=new, temperature=temperature, grammar=schema_grammar(schema))
        for schema, temperature in cases
    ]
    answers = llm.generate(prompts, samplings, seed=7)
    return [(schema, answer) for (schema, _), answer in zip(cases, answers, strict=True)]


def judge(schema: Schema, answer: Answer) -> str:
    """How an answer ended. Raises ValidationError or ValueError for one that ended and is wrong."""
    if answer.finish.reason == "stop":
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        value = json.loads(answer.text)
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value)
    return answer.finish.reason


def open_small(folder: Path = MODEL) -> LLM:
    model = ModelSettings(local_dir=str(folder))
    return LLM(Settings(backend=BackendSettings(impl="hf", model=model)))


def main() -> int:
    """1 when an answer is wrong, or none of them ended."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    wanted = list(islice(schemas(), int(sys.argv[1]) if sys.argv[1:] else None))
    ends: Counter[str] = Counter()
    with open_small() as llm:
        for schema, answer in answer_all(llm, wanted, new=96):
            try:
                ends[judge(schema, answer)] += 1
            except (ValueError, jsonschema.ValidationError) as error:
                ends["wrong"] += 1
                logger.warning("%s: %r: %s", json.dumps(schema), answer.text, error)
    logger.warning("%d schemas, twice each: %s", len(wanted), dict(ends))
    return int(ends["wrong"] > 0 or not ends["stop"] or ends["error"] > 0)


if __name__ == "__main__":
    sys.exit(main())
