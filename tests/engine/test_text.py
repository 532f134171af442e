from __future__ import annotations

import codecs
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, strategies as st
from tokenizers import Tokenizer as Inner, decoders, models, pre_tokenizers

from backend.interface import Finish, RequestRefused
from backend.tokenizer import ByteTokenizer, HfTokenizer
from engine.text import MAX_STOP_LENGTH, MAX_STOP_STRINGS, TextStream, decode, stop_strings

LENGTH = Finish("length")


@dataclass(frozen=True)
class Pieces:
    """A vocabulary made for one test: token i is the i-th piece."""

    table: Sequence[bytes]
    strips_leading_space: bool = False

    @property
    def visible(self) -> Sequence[bytes]:
        return self.table


@dataclass(frozen=True)
class Answer:
    """What a client has in the end."""

    text: str
    finish: Finish | None
    tokens: int


def stream(
    deltas: Sequence[Sequence[int]],
    finish: Finish,
    pieces: Pieces,
    stop: Sequence[str] = (),
) -> Answer:
    """Feed `deltas`, the last with `finish`, and fold what comes out."""
    text_stream = TextStream(pieces, stop)
    last = len(deltas) - 1
    news = [
        text_stream.feed(tokens, finish if place == last else None)
        for place, tokens in enumerate(deltas)
    ]
    finishes = [piece.finish for piece in news if piece.finish is not None]
    assert finishes == [text_stream.finish]  # exactly one piece has it
    ended = next(place for place, piece in enumerate(news) if piece.finish is not None)
    assert not any(piece.text for piece in news[ended + 1 :])
    return Answer("".join(piece.text for piece in news), text_stream.finish, text_stream.tokens)


def expected(pieces: Sequence[bytes], finish: Finish, stop: Sequence[str]) -> Answer:
    """Character by character over the whole text: the first that completes a stop string, the
    longest such; then token by token for the one that brought it.
    """
    whole = b"".join(pieces).decode(errors="replace")
    for end in range(len(whole) + 1):
        complete = [string for string in stop if whole[:end].endswith(string)]
        if complete:
            longest = max(complete, key=len)
            count = next(n for n in range(len(pieces) + 1) if end <= certain(pieces, n))
            kept = whole[: end - len(longest)]
            return Answer(kept, Finish("stop", matched=longest), count)
    return Answer(whole, finish, len(pieces))


def certain(pieces: Sequence[bytes], count: int) -> int:
    """Characters that the first `count` pieces complete; the last brings half ones, too."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return len(decoder.decode(b"".join(pieces[:count]), final=count == len(pieces)))


def cut(data: bytes, borders: Sequence[int]) -> list[bytes]:
    """`data` in parts, cut at `borders` (taken modulo its length)."""
    at = sorted({0, len(data), *(border % (len(data) + 1) for border in borders)})
    return [data[start:end] for start, end in pairwise(at)]


BORDERS = st.lists(st.integers(0, 200), max_size=30)
TEXT = st.text(st.sampled_from("ab é好🙂\n\ufffd"), max_size=25)
STOPS = st.lists(st.text(st.sampled_from("abé好🙂\ufffd"), min_size=1, max_size=4), max_size=4)
BROKEN = st.lists(
    st.sampled_from([b"a", b"b", b"\xc3", b"\xa9", b"\xf0\x9f", b"\x99\x82", b"\xe5\xa5", b"\xbd"]),
    max_size=15,
).map(b"".join)


@given(data=TEXT.map(str.encode) | BROKEN, borders=BORDERS, chunks=BORDERS, stop=STOPS)
@example(data=b"abc", borders=[1], chunks=[], stop=["abc", "b"])
@example(data="aé".encode(), borders=[2], chunks=[], stop=["é"])
@example(data=b"ab\xe5", borders=[1, 2], chunks=[], stop=["b\ufffd"])
def test_text_finish_and_count_are_those_of_a_full_text_search_for_every_split_and_chunking(
    data: bytes, borders: list[int], chunks: list[int], stop: list[str]
) -> None:
    parts = cut(data, borders)
    ids = list(range(len(parts)))
    at = sorted({0, len(ids), *(chunk % (len(ids) + 1) for chunk in chunks)})
    deltas = [ids[start:end] for start, end in pairwise(at)] or [[]]
    wanted = expected(parts, LENGTH, stop)
    assert stream(deltas, LENGTH, Pieces(parts), stop) == wanted
    assert stream([*([id] for id in ids), []], LENGTH, Pieces(parts), stop) == wanted


@given(data=TEXT.map(str.encode) | BROKEN, borders=BORDERS, stop=STOPS)
def test_text_is_held_back_only_while_a_stop_string_may_be_beginning(
    data: bytes, borders: list[int], stop: list[str]
) -> None:
    parts = cut(data, borders)
    text_stream = TextStream(Pieces(parts), stop)
    seen = given_out = ""
    decoder = TextStream(Pieces(parts))
    for id in range(len(parts)):
        seen += decoder.feed([id]).text
        given_out += text_stream.feed([id]).text
        if text_stream.finish is not None:
            return
        waiting = next(
            seen[at:]
            for at in range(len(seen) + 1)
            if at == len(seen)
            or any(string.startswith(seen[at:]) and string != seen[at:] for string in stop)
        )
        assert given_out + waiting == seen


def test_deltas_after_the_end_are_dropped_and_not_counted() -> None:
    text_stream = TextStream(Pieces([b"go", b"ST", b"OP", b"more"]), ["STOP"])
    assert text_stream.feed([0, 1]).text == "go"
    piece = text_stream.feed([2, 3])
    assert (piece.text, piece.finish) == ("", Finish("stop", matched="STOP"))
    late = text_stream.feed([3], Finish("abort"))
    assert (late.text, late.finish) == ("", None)
    assert text_stream.finish == Finish("stop", matched="STOP")
    assert text_stream.tokens == 3


@pytest.mark.parametrize(
    ("finish", "keep", "text"),
    [
        (Finish("stop", matched=1), False, "a"),
        (Finish("stop", matched=1), True, "aEND"),
        (Finish("length"), False, "aEND"),
        (Finish("stop", matched=None), False, "aEND"),
    ],
)
def test_the_stop_token_is_counted_and_has_no_text_unless_it_is_wanted(
    finish: Finish, keep: bool, text: str
) -> None:
    text_stream = TextStream(Pieces([b"a", b"END"]), keep_stop=keep)
    piece = text_stream.feed([0, 1], finish)
    assert (piece.text, piece.finish, text_stream.tokens) == (text, finish, 2)


def test_a_stop_string_that_is_spelled_by_the_stop_token_alone_is_not_seen() -> None:
    finish = Finish("stop", matched=1)
    assert stream([[0], [1]], finish, Pieces([b"a", b"END"]), ["END"]) == Answer("a", finish, 2)


def test_a_stop_string_before_the_stop_token_of_the_same_delta_ends_the_answer() -> None:
    answer = stream([[0, 1, 2]], Finish("stop", matched=2), Pieces([b"a", b"b", b"END"]), ["b"])
    assert answer == Answer("a", Finish("stop", matched="b"), 2)


@pytest.mark.parametrize("reason", ["length", "abort", "error"])
def test_what_was_held_back_comes_with_the_finish(reason: str) -> None:
    text_stream = TextStream(Pieces([b"a", b"ST", b"\xf0\x9f"]), ["STOP"])
    assert [text_stream.feed([id]).text for id in range(3)] == ["a", "", ""]
    finish = Finish(reason)  # type: ignore[arg-type]
    piece = text_stream.feed([], finish)
    assert (piece.text, piece.finish) == ("ST\ufffd", finish)


@given(ids=st.lists(st.integers(0, 259), max_size=12))
def test_special_tokens_are_skipped_or_spelled_out(ids: list[int]) -> None:
    tokenizer = ByteTokenizer()
    visible = [id for id in ids if id < 256]
    assert decode(tokenizer, ids) == bytes(visible).decode(errors="replace")
    spelled = b"".join(map(tokenizer.bytes_of, ids)).decode(errors="replace")
    assert decode(tokenizer, ids, skip_special_tokens=False) == spelled


def test_only_the_first_space_of_the_whole_text_is_stripped() -> None:
    pieces = Pieces([b"", b" ", b" a"], strips_leading_space=True)
    assert decode(pieces, [0, 2, 2]) == "a a"
    assert decode(pieces, [0, 1, 2, 2]) == " a a"
    assert stream([[0], [1], [2]], LENGTH, pieces, ["  "]).text == " a"


# -- against the decoders of the tokenizers package


@cache
def byte_level() -> Inner:
    """Every byte, a few longer tokens, two of them special."""
    words = ["Ġthe", "Ġc", "è¯", "ðŁĻ", "Ĥ", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Inner(models.BPE({token: id for id, token in enumerate(alphabet + words)}, []))
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    return inner


@cache
def sentencepiece() -> Inner:
    """Llama 2 style: byte fallback, one leading space stripped."""
    words = ["<s>", "</s>", "▁", "▁▁", "▁the", "er", "好", "🙂", "é"]
    tokens = words + [f"<0x{byte:02X}>" for byte in range(256)]
    inner = Inner(
        models.BPE({token: id for id, token in enumerate(tokens)}, [], byte_fallback=True)
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    inner.add_special_tokens(["<s>", "</s>"])
    return inner


@cache
def loaded(inner: Inner) -> HfTokenizer:
    return HfTokenizer(inner, {}, {}, 0)


@given(data=st.data(), skip=st.booleans())
def test_byte_level_text_is_what_the_tokenizers_package_decodes_valid_or_not(
    data: st.DataObject, skip: bool
) -> None:
    inner = byte_level()
    ids = data.draw(st.lists(st.integers(0, inner.get_vocab_size() - 1), max_size=20))
    ours = decode(loaded(inner), ids, skip_special_tokens=skip)
    assert ours == inner.decode(ids, skip_special_tokens=skip)


@given(data=st.data(), skip=st.booleans())
def test_sentencepiece_text_is_what_the_tokenizers_package_decodes(
    data: st.DataObject, skip: bool
) -> None:
    inner = sentencepiece()
    word = st.integers(0, 8).map(lambda id: [id])
    character = st.text(min_size=1, max_size=2).map(lambda text: [9 + b for b in text.encode()])
    parts = data.draw(st.lists(word | character, max_size=12))
    ids = [id for part in parts for id in part]
    ours = decode(loaded(inner), ids, skip_special_tokens=skip)
    assert ours == inner.decode(ids, skip_special_tokens=skip)


def test_invalid_bytes_of_sentencepiece_spoil_themselves_alone() -> None:
    inner = sentencepiece()
    ids = [9 + byte for byte in "é".encode() + b"\xf0\x9f"]
    assert decode(loaded(inner), ids) == "é\ufffd"  # one for each broken character, as in UTF-8
    assert inner.decode(ids) == "\ufffd" * 4  # there one for each byte of the run


def test_the_small_models_text_is_what_the_tokenizers_package_decodes(small_model: Path) -> None:
    inner = Inner.from_file(str(small_model / "tokenizer.json"))
    ours = HfTokenizer.load(small_model)
    chooser = random.Random(7)
    text = json.dumps({"text": "Größe 你好 🙂‍↔️"}, ensure_ascii=False) + "\n  def f(): pass\n"
    answers = [inner.encode(text * 20).ids]
    answers += [chooser.choices(range(inner.get_vocab_size()), k=50) for _ in range(100)]
    for ids in answers:
        assert decode(ours, ids) == inner.decode(ids)


# -- what a request may ask


@pytest.mark.parametrize(
    ("stop", "found"),
    [(None, ()), ("a", ("a",)), ([], ()), (["a", "bc"], ("a", "bc"))],
)
def test_stop_strings_come_as_one_several_or_none(
    stop: str | list[str] | None, found: tuple[str, ...]
) -> None:
    assert stop_strings(stop) == found


@pytest.mark.parametrize(
    "stop", ["", ["a", ""], ["a"] * (MAX_STOP_STRINGS + 1), "a" * (MAX_STOP_LENGTH + 1), [1]]
)
def test_stop_strings_that_cannot_be_are_refused_by_name(stop: str | list[str]) -> None:
    with pytest.raises(RequestRefused, match="stop") as caught:
        stop_strings(stop)
    assert caught.value.param == "stop"
