"""Tokenizers built from GGUF metadata, against hand-made splits and a plain sentencepiece."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
from tokenizers import Tokenizer

from backend.hf.loading.gguf_file import GgufFile
from backend.hf.loading.gguf_folder import write_folder
from backend.hf.loading.gguf_tokenizer import PRE_TOKENIZERS, tokenizer
from backend.interface import ModelBroken

TEXT = "hello world 12 is 4+8\n\n don't \u4f60\u597d \u00bd \U0001f600 e\u0301  tab\t!"


def _byte_level(tiny: Callable[..., Any], tmp_path: Path, **metadata: Any) -> Tokenizer:
    source = tiny("llama").write(tmp_path / "m.gguf", **metadata)
    return tokenizer(GgufFile(source), 272)


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    assert tokenizer.pre_tokenizer is not None
    return [text[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["It", "'s", " 2024", ",", " x", "=", "12345", "!", "\n\n"]),
        ("smollm", ["It", "'s", " ", *"2024", ",", " x", "=", *"12345", "!", "\n\n"]),
        ("qwen2", ["It", "'s", " ", *"2024", ",", " x", "=", *"12345", "!\n\n"]),
        ("llama-bpe", ["It", "'s", " ", "202", "4", ",", " x", "=", "123", "45", "!\n\n"]),
        ("tekken", ["It", "'s", " ", *"2024", ",", " x", "=", *"12345", "!\n\n"]),
    ],
)
def test_words_are_cut_as_the_named_pre_tokenizer_cuts_them(
    tiny: Callable[..., Any], tmp_path: Path, pre: str, words: list[str]
) -> None:
    text = "It's 2024, x=12345!\n\n"
    assert _words(_byte_level(tiny, tmp_path, pre=pre), text) == words


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_text_survives_the_way_to_ids_and_back(
    tiny: Callable[..., Any], tmp_path: Path, pre: str
) -> None:
    built = _byte_level(tiny, tmp_path, pre=pre)
    text = TEXT.replace("e\u0301", "\u00e9") if pre == "qwen2" else TEXT
    assert built.decode(built.encode(TEXT, add_special_tokens=False).ids) == text


def test_merges_apply_in_their_order_and_digits_stay_single(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    found = _byte_level(tiny, tmp_path).encode("hello well 12").tokens
    assert found == ["hello", "\u0120w", "e", "ll", "\u0120", "1", "2"]


def test_control_tokens_are_special_and_the_users_own_are_not(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    built = _byte_level(tiny, tmp_path)
    found = built.encode("<|im_start|>h<tool>h<|im_end|>[PAD1]")
    assert found.tokens[:5] == ["<|im_start|>", "h", "<tool>", "h", "<|im_end|>"]
    assert len(found.ids) == 5 + len("[PAD1]")  # padding is no token of a text
    assert built.decode(found.ids) == "h<tool>h[PAD1]"


@pytest.mark.parametrize(
    ("pre", "flags", "frame"),
    [
        ("smollm", {}, (0, 0)),
        ("llama-bpe", {}, (1, 0)),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, (0, 0)),
        ("smollm", {"tokenizer.ggml.add_bos_token": True}, (1, 0)),
        ("smollm", {"tokenizer.ggml.add_eos_token": True}, (0, 1)),
    ],
)
def test_first_and_end_tokens_frame_a_prompt_as_the_file_says(
    tiny: Callable[..., Any],
    tmp_path: Path,
    pre: str,
    flags: dict[str, bool],
    frame: tuple[int, int],
) -> None:
    built = _byte_level(tiny, tmp_path, pre=pre, flags=flags)
    bare = built.encode("wow", add_special_tokens=False).ids
    assert built.encode("wow").ids == [0] * frame[0] + bare + [1] * frame[1]


def test_a_whole_word_of_llama3_needs_no_merges(tiny: Callable[..., Any], tmp_path: Path) -> None:
    merges = ["h e", "l l"]
    assert _byte_level(tiny, tmp_path, pre="llama3", merges=merges).encode(
        "hello", add_special_tokens=False
    ).tokens == ["hello"]


@pytest.mark.parametrize(
    "metadata",
    [{"merges": ["h q"]}, {"merges": ["hello"]}, {"kinds": [1, 1]}, {"tokens": ["a"] * 300}],
)
def test_lists_that_contradict_each_other_are_one_line(
    tiny: Callable[..., Any], tmp_path: Path, metadata: dict[str, Any]
) -> None:
    with pytest.raises(ModelBroken) as caught:
        _byte_level(tiny, tmp_path, **metadata)
    assert "\n" not in str(caught.value)
    assert "m.gguf" in str(caught.value)


def test_transformers_reads_the_same_tokenizer_from_the_folder(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    source = tiny("llama").write(tmp_path / "m.gguf")
    (tmp_path / "hf").mkdir()
    write_folder(source, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert theirs(TEXT).input_ids == ours.encode(TEXT).ids
    assert (theirs.bos_token, theirs.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert theirs.chat_template == "{{ messages }}"


def _sentencepiece(path: Path, pieces: dict[str, float], prefix: bool) -> Tokenizer:
    """Unknown, begin and end, 256 bytes, then `pieces` with their scores."""
    writer = gguf.GGUFWriter(path, "llama")
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([0.0] * 259 + list(pieces.values()))
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(pieces)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokenizer(GgufFile(path), len(texts))


def _joined(text: str, pieces: dict[str, float]) -> list[str]:
    """Sentencepiece's rule, literally: join the neighbours whose union scores highest."""
    parts = list(text)
    while True:
        unions = [(pieces.get(a + b), at) for at, (a, b) in enumerate(pairwise(parts))]
        known = [(-score, at) for score, at in unions if score is not None]
        if not known:
            return parts
        at = min(known)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_scores_give_the_same_pieces_as_joining_the_best_neighbours(tmp_path: Path) -> None:
    draw = random.Random(3)
    letters = "abc\u2581"
    grown = ["".join(draw.choices(letters, k=draw.randint(2, 4))) for _ in range(60)]
    # a piece is only ever reached through shorter ones, as in a trained vocabulary
    wanted = sorted({piece[:end] for piece in grown for end in range(2, len(piece) + 1)})
    draw.shuffle(wanted)
    wanted.sort(key=len)
    pieces = dict.fromkeys(letters, -1000.0)
    pieces |= {piece: -float(rank) for rank, piece in enumerate(wanted)}
    built = _sentencepiece(tmp_path / "m.gguf", pieces, prefix=False)
    for _ in range(300):
        text = "".join(draw.choices("abc ", k=draw.randint(1, 30)))
        found = built.encode(text, add_special_tokens=False).tokens
        assert found == _joined(text.replace(" ", "\u2581"), pieces)


def test_sentencepiece_falls_back_to_bytes_and_gives_the_text_back(tmp_path: Path) -> None:
    pieces = {"\u2581": -9.0, "h": -9.0, "i": -9.0, "hi": -1.0, "\u2581hi": -2.0}
    built = _sentencepiece(tmp_path / "m.gguf", pieces, prefix=True)
    found = built.encode("hi \u4f60\n")
    assert found.tokens == ["<s>", "\u2581hi", "\u2581", "<0xE4>", "<0xBD>", "<0xA0>", "<0x0A>"]
    assert built.decode(found.ids) == "hi \u4f60\n"
