"""The names of prefixes: equal for equal prefixes, wherever they are made, and for no others."""

from __future__ import annotations

import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from backend.prefix_keys import block_tokens, namespace_key, next_key, prefix_keys

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=12)


def by_the_book(namespace: str, ids: list[int], block: int) -> list[int]:
    """The scheme as its docstring states it, one id at a time."""
    link = blake2b(namespace.encode(), digest_size=8, person=b"namespace").digest()
    keys = []
    for position, token in enumerate(ids):
        if position % block == 0:
            digest = blake2b(link, digest_size=8)
        digest.update(token.to_bytes(4, "little"))
        if (position + 1) % block == 0:
            link = digest.digest()
            keys.append(int.from_bytes(link, "little"))
    return keys


@pytest.mark.parametrize(
    ("page", "block"), [(1, 64), (16, 64), (24, 48), (32, 64), (48, 48), (64, 64), (256, 256)]
)
def test_a_block_is_whole_pages_and_about_64_tokens(page: int, block: int) -> None:
    assert block_tokens(page) == block


@given(st.sampled_from(["", "a", "ß"]), IDS, st.integers(1, 4))
def test_the_keys_are_those_of_the_scheme(namespace: str, ids: list[int], block: int) -> None:
    keys = prefix_keys(namespace, ids, block)
    assert keys == by_the_book(namespace, ids, block)
    assert all(0 <= key < 2**64 for key in keys)


@given(IDS, st.integers(1, 4))
def test_a_chain_is_extended_to_the_keys_that_are_made_at_once(ids: list[int], block: int) -> None:
    chain, key = [], namespace_key("salt")
    for start in range(0, len(ids) - block + 1, block):
        key = next_key(key, ids[start : start + block])
        chain.append(key)
    assert chain == prefix_keys("salt", ids, block)


def test_a_key_names_everything_before_it() -> None:
    assert prefix_keys("", [1, 2, 3, 4], 2)[:1] == prefix_keys("", [1, 2, 9, 9], 2)[:1]
    assert prefix_keys("", [1, 2, 3, 4], 2)[1] != prefix_keys("", [9, 2, 3, 4], 2)[1]
    assert prefix_keys("", [3, 4], 2)[0] != prefix_keys("", [1, 2, 3, 4], 2)[1]


def test_namespaces_share_no_key() -> None:
    assert not {*prefix_keys("a", range(8), 2)} & {*prefix_keys("b", range(8), 2)}


def test_a_namespace_that_spells_a_chain_shares_no_key_with_it() -> None:
    forged = (b"AAAAAAAA" + (7).to_bytes(4, "little")).decode()
    assert namespace_key(forged) != next_key(int.from_bytes(b"AAAAAAAA", "little"), [7])


def test_any_text_is_a_namespace() -> None:
    assert namespace_key("\ud800") != namespace_key("\ud801")


def test_another_process_makes_the_same_keys(root: Path) -> None:
    code = "from backend.prefix_keys import prefix_keys; print(*prefix_keys('salt', range(9), 4))"
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, cwd=root, env={"PYTHONHASHSEED": "7"}, capture_output=True)
    assert [int(key) for key in told.stdout.split()] == prefix_keys("salt", range(9), 4)
