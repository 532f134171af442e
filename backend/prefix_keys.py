"""Names of cached prefixes, the same in every process: what an engine says it holds, and what the
front looks up.

A prefix is named at the end of each block of about 64 tokens, a whole number of pages. The key of a
block is the 8-byte BLAKE2b digest of (the key before it, its ids as little-endian int32), the key
before the first one is that of the namespace, and a key is read as a little-endian unsigned int. So
equal keys mean equal prefixes, of one namespace, from position 0 on. Never Python's `hash()`: it
differs between processes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

BLOCK_TOKENS = 64  # about: few enough to tell prefixes apart, enough to keep the keys few
KEY_BYTES = 8


def block_tokens(page_tokens: int) -> int:
    """Tokens of a block where a page has `page_tokens`."""
    return page_tokens * max(1, BLOCK_TOKENS // page_tokens)


def namespace_key(namespace: str) -> int:
    """What the first block of a namespace is chained to."""
    text = namespace.encode("utf-8", "surrogatepass")
    return _number(blake2b(text, digest_size=KEY_BYTES, person=b"namespace").digest())


def next_key(before: int, ids: Sequence[int]) -> int:
    """The key of the block `ids` behind the block, or the namespace, with key `before`."""
    return _number(_chain(before.to_bytes(KEY_BYTES, "little"), _pack(ids)))


def prefix_keys(namespace: str, ids: Sequence[int], block: int) -> list[int]:
    """The keys of all full blocks of `ids`, in order."""
    packed = _pack(ids[: len(ids) // block * block])
    width = block * 4
    keys: list[int] = []
    link = namespace_key(namespace).to_bytes(KEY_BYTES, "little")
    for start in range(0, len(packed), width):
        link = _chain(link, packed[start : start + width])
        keys.append(_number(link))
    return keys


def _pack(ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(ids)}i", *ids)


def _chain(link: bytes, packed: bytes) -> bytes:
    return blake2b(link + packed, digest_size=KEY_BYTES).digest()


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "little")
