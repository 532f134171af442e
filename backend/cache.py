"""Pages of the KV cache: who holds them, who may share them, which go first.

Owned by the backend of one engine; called by the scheduler only. Pure bookkeeping: page ids in,
page ids out. The tensors behind the ids live with the executor. After any call,
`PrefixCache.check()` accounts for every page exactly once.

The tree is SGLang's RadixAttention (Zheng et al. 2024) with one node a page, so that no node is
ever split and eviction takes single pages from the tail of the least recently used prefix.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from backend.prefix_keys import block_tokens, namespace_key, next_key


class PagePool:
    """Free page ids, handed out lowest first at the start, then last returned first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Hand out `count` pages. Raises ValueError when there are not as many."""
        if count > len(self._free):
            raise ValueError(f"{count} pages wanted, {len(self._free)} free")
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Sequence[int]) -> None:
        """Take pages back. The caller held them and forgets them."""
        self._free.extend(pages)

    def ids(self) -> Sequence[int]:
        """The free pages, for the books."""
        return tuple(self._free)


PageKey = tuple[str, tuple[int, ...]]  # namespace and token ids of one page


def page_key(namespace: str, tokens: Sequence[int], index: int, page_tokens: int) -> PageKey:
    """What page `index` of `tokens` is found by."""
    return namespace, tuple(tokens[index * page_tokens : (index + 1) * page_tokens])


@dataclass(eq=False, slots=True)
class Node:
    """One full page of tokens behind its parent's.

    Only the root has no parent and holds no page.
    """

    key: PageKey
    page: int
    parent: Node | None
    children: dict[PageKey, Node] = field(default_factory=dict)
    pins: int = 0  # leases that hold this page or one behind it
    used: int = 0  # clock of the last lease that held it
    queued: bool = False  # has an entry in the eviction heap
    prefix_key: int | None = None  # where a block ends: the name of all tokens up to here


class RadixTree:
    """Pages by the tokens they hold and those before them.

    Only a page that nobody pins and that has nothing behind it can be evicted, least recently used
    first. The heap holds an entry a node at most; an entry that is out of date is put right when it
    comes up, so that using a prefix costs nothing.
    """

    def __init__(self) -> None:
        self.root = Node(("", ()), -1, None)
        self.pages = 0  # in the tree
        self.pinned = 0  # of these, held by a lease
        self._heap: list[tuple[int, int, Node]] = []  # (used, page, node)
        self._clock = 0

    def match(self, keys: Iterable[PageKey]) -> list[Node]:
        """The longest path from the root that spells `keys`; without the root."""
        path: list[Node] = []
        node = self.root
        for key in keys:
            child = node.children.get(key)
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def insert(self, parent: Node, key: PageKey, page: int) -> Node:
        """The node of `key` behind `parent`: a new one that holds `page`, or the one that is there
        with a page of its own.
        """
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(key, page, parent)
            self.pages += 1
        return node

    def pin(self, nodes: Sequence[Node]) -> None:
        """Hold the pages of `nodes`: they stay until they are unpinned as often."""
        self._clock += 1
        for node in nodes:
            self.pinned += not node.pins
            node.pins += 1
            node.used = self._clock

    def unpin(self, nodes: Sequence[Node]) -> None:
        """Let go of pages pinned before."""
        self._clock += 1
        for node in nodes:
            node.pins -= 1
            node.used = self._clock
            self.pinned -= not node.pins
            self._offer(node)

    def _offer(self, node: Node) -> None:
        if not (node.pins or node.children or node.queued or node.parent is None):
            node.queued = True
            heapq.heappush(self._heap, (node.used, node.page, node))

    def evict(self, count: int) -> list[Node]:
        """Drop up to `count` pages, least recently used first.

        Returns their nodes, fewer when the rest is in use.
        """
        dropped: list[Node] = []
        while len(dropped) < count and self._heap:
            used, _, node = heapq.heappop(self._heap)
            node.queued = False
            if node.pins or node.children:
                continue  # offered again when that ends
            if node.used != used:
                self._offer(node)
                continue
            self._remove(node)
            dropped.append(node)
        return dropped

    def _remove(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.key]
        self.pages -= 1
        self._offer(node.parent)

    def nodes(self) -> Iterator[Node]:
        """Every node that holds a page."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node


class PrefixEvents:
    """Keys of prefixes that entered and left since somebody last asked: the difference alone.

    A key that came and went, or went and came back, is not in it. So the two lists share no key,
    and whoever applies them, in whichever order, holds what the tree holds.
    """

    def __init__(self) -> None:
        self._entered: dict[int, None] = {}  # dicts, for their order
        self._evicted: dict[int, None] = {}

    def enter(self, key: int) -> None:
        """A prefix is in the tree that was not."""
        if key in self._evicted:
            del self._evicted[key]
        else:
            self._entered[key] = None

    def leave(self, key: int) -> None:
        """A prefix is gone that was in the tree."""
        if key in self._entered:
            del self._entered[key]
        else:
            self._evicted[key] = None

    def drain(self) -> tuple[list[int], list[int]]:
        """(entered, evicted), and begin anew."""
        drained = list(self._entered), list(self._evicted)
        self._entered.clear()
        self._evicted.clear()
        return drained


@dataclass(eq=False, slots=True)
class Lease:
    """Pages held for one sequence. Closed exactly once; closing again raises.

        position   0 ......... shared ......... settled ........ capacity
        pages      [ tree's, pinned ][ entered as they settle ][ ours, empty ]
        on close     unpinned            unpinned               back to the pool

    A page that the tree has got from somebody else meanwhile stays ours (in `duplicates`), because
    the device reads it; the path goes on through the tree's.
    """

    namespace: str
    pages: list[int]  # in position order
    shared: int  # positions answered by the tree at the start; a multiple of the page size
    path: list[Node]  # pinned until close; one for each page that has entered the tree
    duplicates: list[int] = field(default_factory=list)
    closed: bool = False


class PrefixCache:
    """The pages of one device: leased to running sequences, kept in a tree for those to come, or
    free.

    `prefix` False keeps nothing: every page goes back to the pool on close.
    """

    def __init__(self, pages: int, page_tokens: int, prefix: bool = True) -> None:
        self.pool = PagePool(pages)
        self.tree = RadixTree()
        self.page_tokens = page_tokens
        self.prefix = prefix
        self._block_pages = block_tokens(page_tokens) // page_tokens
        self._events = PrefixEvents()
        self._leases: set[Lease] = set()  # for the books only; never iterated to decide anything

    @property
    def available(self) -> int:
        """Pages that a lease could get now: free ones and those that eviction would free."""
        return self.pool.free + self.tree.pages - self.tree.pinned

    @property
    def leased(self) -> int:
        """Pages held by running sequences, shared ones counted once."""
        return self.pool.size - self.available

    def match(self, namespace: str, tokens: Sequence[int], limit: int) -> int:
        """Positions of `tokens` that the tree could answer, `limit` at most; a multiple of the page
        size. Changes nothing.
        """
        return len(self._match(namespace, tokens, limit)) * self.page_tokens

    def _match(self, namespace: str, tokens: Sequence[int], limit: int) -> list[Node]:
        whole = limit // self.page_tokens if self.prefix else 0
        return self.tree.match(
            page_key(namespace, tokens, index, self.page_tokens) for index in range(whole)
        )

    def lease(
        self, namespace: str, tokens: Sequence[int], limit: int, spare: int = 0
    ) -> Lease | None:
        """Hold pages for all of `tokens`, sharing the longest cached prefix (`limit` positions at
        most).

        None, and nothing changed, unless `spare` pages would be available after it.
        """
        path = self._match(namespace, tokens, limit)
        self.tree.pin(path)  # before anything is evicted for the rest
        missing = -(-len(tokens) // self.page_tokens) - len(path)
        if missing + spare > self.available:
            self.tree.unpin(path)
            return None
        lease = Lease(namespace, [node.page for node in path], len(path) * self.page_tokens, path)
        self._leases.add(lease)
        lease.pages += self._take(missing)
        return lease

    def grow(self, lease: Lease, positions: int) -> bool:
        """Make `lease` hold `positions` positions.

        False, and nothing changed, when the pages are not to be had.
        """
        missing = -(-positions // self.page_tokens) - len(lease.pages)
        if missing <= 0:
            return True
        if missing > self.available:
            return False
        lease.pages += self._take(missing)
        return True

    def _take(self, count: int) -> list[int]:
        if count > self.pool.free:
            self._evict(count - self.pool.free)
        return self.pool.take(count)

    def _evict(self, count: int) -> int:
        dropped = self.tree.evict(count)
        self.pool.give_back([node.page for node in dropped])
        for node in dropped:
            if node.prefix_key is not None:
                self._events.leave(node.prefix_key)
        return len(dropped)

    def commit(self, lease: Lease, tokens: Sequence[int], settled: int) -> None:
        """Enter the full pages among the first `settled` positions into the tree, for others to
        share from now on.

        `tokens` are the sequence's ids from position 0; the device has computed the first
        `settled`.
        """
        known = len(lease.path)
        if not self.prefix or settled // self.page_tokens == known:
            return
        node = lease.path[-1] if lease.path else self.tree.root
        for index in range(known, settled // self.page_tokens):
            node = self.tree.insert(
                node, page_key(lease.namespace, tokens, index, self.page_tokens), lease.pages[index]
            )
            if node.page != lease.pages[index]:
                lease.duplicates.append(lease.pages[index])
            lease.path.append(node)
            if node.prefix_key is None and (index + 1) % self._block_pages == 0:
                self._name(lease, tokens)
        self.tree.pin(lease.path[known:])

    def _name(self, lease: Lease, tokens: Sequence[int]) -> None:
        """Give the last node of the path, where a block ends, its key, and report that."""
        node, end = lease.path[-1], len(lease.path)
        start = end - self._block_pages
        before = lease.path[start - 1].prefix_key if start else namespace_key(lease.namespace)
        assert before is not None  # a block ended there
        block = tokens[start * self.page_tokens : end * self.page_tokens]
        node.prefix_key = next_key(before, block)
        self._events.enter(node.prefix_key)

    def close(self, lease: Lease) -> None:
        """End a lease: what has entered the tree stays there, unpinned; the rest goes back to the
        pool.
        """
        if lease.closed:
            raise ValueError("this lease is closed already")
        lease.closed = True
        self._leases.remove(lease)
        self.tree.unpin(lease.path)
        self.pool.give_back(lease.pages[len(lease.path) :] + lease.duplicates)

    def flush(self) -> int:
        """Give up every cached page that is not in use. Returns how many."""
        return self._evict(self.tree.pages)

    def events(self) -> tuple[list[int], list[int]]:
        """Keys (`backend/prefix_keys.py`) of the prefixes that entered the tree and of those that
        left it since the last call. No key is in both.
        """
        return self._events.drain()

    def check(self) -> None:
        """Account for every page: free, in the tree, or a lease's own, each exactly once.

        Raises AssertionError.
        """
        nodes = list(self.tree.nodes())
        own = [
            page
            for lease in self._leases
            for page in lease.pages[len(lease.path) :] + lease.duplicates
        ]
        books = sorted([*self.pool.ids(), *(node.page for node in nodes), *own])
        assert books == list(range(self.pool.size)), f"pages lost or held twice: {books}"
        assert len(nodes) == self.tree.pages, (
            f"the tree counts {self.tree.pages} pages and has {len(nodes)}"
        )
        pins: dict[Node, int] = {}
        for lease in self._leases:
            for node in lease.path:
                pins[node] = pins.get(node, 0) + 1
        assert all(node.pins == pins.get(node, 0) for node in nodes), (
            "a page is pinned by nobody, or by somebody unknown"
        )
        assert sum(1 for node in nodes if node.pins) == self.tree.pinned, (
            "the count of pinned pages is off"
        )
