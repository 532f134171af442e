"""What each token id stands for, in bytes: a list lookup instead of a decoder call for every token.

Built once from a checkpoint's tokenizer.json. The text of an answer is the concatenation of its
tokens' bytes, decoded as UTF-8, less one leading space where the decoder says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backend.interface import Unsupported

Decoder = Mapping[str, Any]  # an entry of tokenizer.json's decoder

_METASPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_BYTE_LEVEL = ("ByteLevel",)
_SENTENCEPIECE: list[Decoder] = [
    {"type": "Replace", "pattern": {"String": _METASPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP: Decoder = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


@dataclass(frozen=True, slots=True)
class ByteTable:
    """Bytes by token id. Ids that no token has, as in a padded vocabulary, are empty."""

    table: Sequence[bytes]
    visible: Sequence[bytes]  # the same, with special tokens empty
    strips_leading_space: bool  # the very first byte of a text is dropped when it is a space

    @classmethod
    def of(
        cls, table: Sequence[bytes], special_ids: Collection[int], strips_leading_space: bool
    ) -> ByteTable:
        """A table together with its visible half."""
        visible = list(table)
        for token in special_ids:
            visible[token] = b""
        return cls(table, visible, strips_leading_space)


def gpt2_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Radford et al. 2019: printable bytes stand for themselves, the others in order for U+0100 and
    up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(printable))
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


def byte_table(
    decoder: Decoder | None,
    vocabulary: Mapping[str, int],
    added: Mapping[int, str],
    special_ids: Collection[int],
    size: int,
) -> ByteTable:
    """The bytes of `vocabulary` (the model's own tokens) and `added` tokens, `size` ids at least.

    `decoder` is the one in tokenizer.json. Raises Unsupported naming it when its text is not a
    concatenation of its tokens' bytes.
    """
    to_bytes, raw_added, strips = _rules(decoder)
    table = [b""] * max(size, 1 + max([*vocabulary.values(), *added], default=-1))
    for id, content in added.items():
        # a byte-level decoder would read é as the byte 0xE9; a user wants the é
        table[id] = content.encode() if raw_added else to_bytes(content)
    for token, id in vocabulary.items():
        table[id] = to_bytes(token)
    return ByteTable.of(table, special_ids, strips)


def _rules(decoder: Decoder | None) -> tuple[Callable[[str], bytes], bool, bool]:
    """How a token becomes bytes, whether added tokens are raw, whether a leading space goes."""
    parts = _parts(decoder)
    kinds = tuple(part["type"] for part in parts)
    if kinds == _BYTE_LEVEL:
        alphabet = gpt2_alphabet()
        return lambda token: _byte_level(token, alphabet), True, False
    if kinds == ("Metaspace",) and parts[0]["replacement"] == _METASPACE:
        return _sentencepiece, False, parts[0].get("prepend_scheme") != "never"
    if parts in (_SENTENCEPIECE, [*_SENTENCEPIECE, _STRIP]):
        return _sentencepiece, False, parts[-1] == _STRIP
    raise Unsupported(
        f"tokenizer.json has the decoder {' + '.join(kinds) or 'none'}; byte-level and "
        "sentencepiece-style decoders are understood: convert the tokenizer, or serve token ids"
    )


def _parts(decoder: Decoder | None) -> list[Decoder]:
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


def _byte_level(token: str, alphabet: Mapping[str, int]) -> bytes:
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:
        return token.encode()  # a whole token that was never spelled in the alphabet


def _sentencepiece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else token.replace(_METASPACE, " ").encode()
