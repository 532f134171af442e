"""Grammars over the built-in tokenizer: what may follow, what is complete, what cannot be."""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import replace

import pytest

from backend.grammar import KEPT, Compiled, Grammars, GrammarState, check_grammar
from backend.grammar_forms import Tag, choice_grammar, ebnf_grammar, schema_grammar, tag_grammar
from backend.interface import BackendSpec, Grammar, GrammarKind, RequestRefused, TokenMask
from backend.tokenizer import ByteTokenizer
from tests.backend.test_interface import SPEC as PAPER

END = ByteTokenizer.EOS
SPEC = replace(PAPER, vocabulary=300, stop_ids=(END, 7))  # more ids than the tokenizer has


GRAMMARS = Grammars(SPEC)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return GRAMMARS


def begin(grammars: Grammars, grammar: Grammar, text: str = "") -> GrammarState:
    return grammars.compile(grammar).result(10).begin(text.encode())


def allowed(state: GrammarState, may_end: bool = True) -> set[int]:
    (mask,) = GRAMMARS.masks([(state, may_end)])
    return ids_in(mask)


def ids_in(mask: TokenMask) -> set[int]:
    assert (mask.dtype.name, len(mask)) == ("int32", 10)
    return {id for id in range(320) if mask[id // 32] >> (id % 32) & 1}


def accepts(state: GrammarState, text: str) -> bool:
    """Whether `text` is allowed, id by id, and then the end."""
    for id in text.encode():
        if id not in allowed(state):
            return False
        state.advance([id])
    return END in allowed(state)


def test_masks_of_several_answers_are_those_of_each(grammars: Grammars) -> None:
    grammar = Grammar("regex", "ab*c?")
    texts = ("", "a", "ab")
    asked = [(begin(grammars, grammar, text), True) for text in texts]
    together = [ids_in(mask) for mask in grammars.masks(asked)]
    assert together == [allowed(begin(grammars, grammar, text)) for text in texts]
    assert together[0] != together[1]
    assert grammars.masks([]) == []


def test_only_what_may_follow_is_allowed_and_all_end_tokens_where_it_may_end(
    grammars: Grammars,
) -> None:
    state = begin(grammars, Grammar("regex", "a(bc|b)*"))
    assert allowed(state) == {ord("a")}
    state.advance(b"a")
    assert allowed(state) == {ord("b"), END, 7}
    assert allowed(state, may_end=False) == {ord("b")}
    assert not state.complete


def test_where_nothing_may_follow_the_answer_is_complete_and_must_end(grammars: Grammars) -> None:
    state = begin(grammars, Grammar("regex", "ab"), "ab")
    assert state.complete
    assert allowed(state) == allowed(state, may_end=False) == {END, 7}


def test_a_state_is_rebuilt_from_what_was_received(grammars: Grammars) -> None:
    grammar = schema_grammar({"type": "object", "properties": {"a": {"type": "integer"}}})
    whole = begin(grammars, grammar)
    for at, id in enumerate(b'{"a": 12}'):
        resumed = begin(grammars, grammar, '{"a": 12}'[:at])
        assert allowed(resumed) == allowed(whole)
        whole.advance([id])
    assert whole.complete


def test_answers_of_one_grammar_do_not_move_each_other(grammars: Grammars) -> None:
    grammar = Grammar("regex", "abc")
    first, second = begin(grammars, grammar), begin(grammars, grammar)
    first.advance(b"ab")
    assert allowed(second) == {ord("a")}


@pytest.mark.parametrize("left", [b"x", bytes([ord("a"), 255])])
def test_a_token_that_is_not_allowed_is_an_error_that_stays(
    grammars: Grammars, left: bytes
) -> None:
    state = begin(grammars, Grammar("regex", "abc"))
    state.advance(left)
    assert state.error
    assert "\n" not in state.error
    assert not state.complete
    state.advance(b"")
    assert state.error


def test_a_grammar_is_compiled_once_and_the_oldest_are_forgotten() -> None:
    grammars = Grammars(SPEC)
    first = grammars.compile(Grammar("regex", "a0"))
    assert grammars.compile(Grammar("regex", "a0")) is first
    for number in range(1, KEPT):
        grammars.compile(Grammar("regex", f"a{number}"))
    assert grammars.compile(Grammar("regex", "a0")) is first  # and is now the newest
    second = grammars.compile(Grammar("regex", "a1"))
    grammars.compile(Grammar("regex", "new"))
    assert grammars.compile(Grammar("regex", "a0")) is first
    assert grammars.compile(Grammar("regex", "a1")) is second
    grammars.close()


def failure(future: Future[Compiled]) -> RequestRefused:
    with pytest.raises(RequestRefused) as refused:
        future.result(10)
    assert "\n" not in str(refused.value)
    return refused.value


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (replace(SPEC, folder="nowhere"), "no tokenizer.json"),
        (replace(SPEC, stop_ids=()), "needs an end token"),
    ],
)
def test_a_model_without_text_or_without_an_end_has_no_grammars(
    spec: BackendSpec, words: str
) -> None:
    assert words in str(failure(Grammars(spec).compile(Grammar("regex", "a"))))


WRONG = [
    (Grammar("regex", "a("), "unclosed group"),
    (Grammar("regex", r"\bfoo"), "lookarounds"),
    (Grammar("lark", "start: x"), "unknown"),
    (Grammar("lark", "start: " + "(" * 500 + '"a"' + ")" * 500), "too deeply nested"),
    (Grammar("json_schema", '{"type": "no"}'), "Invalid type"),
]


@pytest.mark.parametrize(("grammar", "words"), WRONG, ids=[each[1] for each in WRONG])
def test_front_and_engine_refuse_the_same_grammars(
    grammars: Grammars, grammar: Grammar, words: str
) -> None:
    assert words in str(failure(grammars.compile(grammar)))
    with pytest.raises(RequestRefused, match=words):
        check_grammar(grammar)


# Other notations


def test_a_choice_is_one_of_its_texts_whatever_they_hold(grammars: Grammars) -> None:
    choices = ["yes", 'a "quoted" one', "line\nbreak", "é🙂", "back\\slash", "/x/", "a|b"]
    for text in choices:
        assert accepts(begin(grammars, choice_grammar(choices)), text)
    for text in ("no", "a", ""):
        assert not accepts(begin(grammars, choice_grammar(choices)), text)


GBNF = 'root ::= item ("," item)*\nitem ::= [0-9]+ | "(" root ")"'


@pytest.mark.parametrize("text", [GBNF, 'start: ITEM ("," ITEM)*\nITEM: /[0-9]+/'])
def test_ebnf_is_read_in_either_notation(grammars: Grammars, text: str) -> None:
    assert accepts(begin(grammars, ebnf_grammar(text)), "12,3")
    assert not accepts(begin(grammars, ebnf_grammar(text)), "12,")
    assert accepts(begin(grammars, ebnf_grammar(text)), "(1,(2))") == (text == GBNF)


@pytest.mark.parametrize("text", ["root ::= (", "nothing at all", "root ::= other"])
def test_ebnf_that_cannot_be_read_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        check_grammar(ebnf_grammar(text))
    assert "\n" not in str(refused.value)


def test_tags_bind_what_follows_a_trigger_and_leave_the_rest_free(grammars: Grammars) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammar = tag_grammar([Tag("<f", "<f=x>", schema, "</f>"), Tag("<f", "<f=y>", True, "</f>")])
    for text in ("free text", 'so: <f=x>{"a": 1}</f> and <f=y>[1, 2]</f> on'):
        assert accepts(begin(grammars, grammar), text)
    for text in ('<f=z>{"a": 1}</f>', '<f=x>{"b": 1}</f>', '<f=x>{"a": 1}', "<f=x>{  "):
        assert not accepts(begin(grammars, grammar), text)


# JSON


def test_white_space_is_a_blank_or_a_line_break_with_its_indentation(grammars: Grammars) -> None:
    grammar = schema_grammar({"type": "object"})
    for text in ('{"a":1}', '{ "a" : 1 }', '{\n    "a": 1\n}', '{\r\n\t"a": 1}'):
        assert accepts(begin(grammars, grammar), text)
    for text in ('{  "a":1}', '{\n\n"a":1}', ' {"a":1}', '{"a":1}\n'):
        assert not accepts(begin(grammars, grammar), text)


def test_a_key_cannot_be_spelled_so_that_its_schema_is_evaded(grammars: Grammars) -> None:
    grammar = schema_grammar(
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "additionalProperties": True,
        }
    )
    assert accepts(begin(grammars, grammar), '{"a": 1, "b": "x"}')
    for text in ('{"a": "x"}', '{"\\u0061": "x"}', '{"b": 1, "a": "x"}'):
        assert not accepts(begin(grammars, grammar), text)


def test_a_schema_as_text_and_as_an_object_are_the_same_grammar() -> None:
    schema = {"type": "array", "items": {"enum": ["é", 1.5, None]}}
    assert schema_grammar(schema) == schema_grammar(json.dumps(schema))


HALF = "\\ud800"  # of a surrogate pair, as JSON spells it


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", json.loads(f'"a{HALF}"')),
        ("lark", json.loads(f'"start: /a{HALF}/"')),
        ("json_schema", f'{{"const": "a{HALF}"}}'),
        ("json_schema", '{"type": "number", "minimum": NaN}'),
        ("json_schema", '{"type": "integer", "maximum": 1e999}'),
        ("json_schema", f'{{"type": "integer", "minimum": {"1" * 4000}}}'),
        ("json_schema", f'{{"const": {"[" * 900}{"]" * 900}}}'),
    ],
    ids=["regex", "lark", "schema", "nan", "infinity", "large", "deep"],
)
def test_what_no_parser_can_read_is_refused(kind: GrammarKind, text: str) -> None:
    with pytest.raises(RequestRefused):
        check_grammar(Grammar(kind, text))


def chain(length: int) -> list[tuple[str, dict[str, object]]]:
    """Definitions that lead from a0 to the last one."""
    links: list[tuple[str, dict[str, object]]] = [
        (f"a{at}", {"type": "array", "items": {"$ref": f"#/$defs/a{at + 1}"}})
        for at in range(length)
    ]
    return [*links, (f"a{length}", {"type": "string"})]


@pytest.mark.parametrize("turned", [False, True])
def test_definitions_that_lead_on_and_on_are_refused_before_a_stack_overflows(turned: bool) -> None:
    for length, fits in ((300, True), (3000, False)):
        definitions = chain(length)
        schema = {"$defs": dict(definitions[::-1] if turned else definitions), "$ref": "#/$defs/a0"}
        if fits:
            check_grammar(schema_grammar(schema))
        else:
            with pytest.raises(RequestRefused, match="levels deep"):
                check_grammar(schema_grammar(schema))


@pytest.mark.parametrize(
    "text",
    [
        "start: r0\n" + "".join(f"r{at}: ((((r{at + 1}))))\n" for at in range(400)) + 'r400: "a"',
        "start: " + '"a" ' * 5000,
    ],
    ids=["rules", "length"],
)
def test_a_large_ebnf_is_refused(text: str) -> None:
    with pytest.raises(RequestRefused, match="the EBNF has"):
        ebnf_grammar(text)
