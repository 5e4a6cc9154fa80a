"""A radix tree over whole pages of tokens: which computed pages begin which prompts.

Life of a prompt's pages:

1. `match` finds the longest cached prefix, in whole pages; `lock` keeps it from eviction while in use.
2. The request computes the rest into private pages of its own.
3. `insert` hands finished whole pages over to the tree: private(owner) → shared. Where another request was
   faster, the tree keeps the page it has, and the caller's duplicate stays private to the caller.
4. `unlock`, and later `evict` frees the tail of the least recently used unlocked leaf that is not pinned.

The tree is one reader of each of its pages (see page_allocator). A node is a run of pages (path compression)
and is split where a match or an insertion parts from it. A lock counts on every node up to the root, so
whatever a locked node needs is locked too. So does a pin, which keeps pages that nobody reads: they are there
for who asks, once they are unpinned. Prefixes are kept apart by `namespace`: a client's salt, and whatever
else is to keep requests of equal tokens from sharing pages.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from .page_allocator import PageAllocator, PageStateError


@dataclass(slots=True, eq=False)
class CacheNode:
    """A run of pages in the tree. Callers hold it inside a PrefixMatch and look at nothing in it."""

    tokens: tuple[int, ...]  # page_size × len(pages); empty in a root
    pages: list[int]
    parent: CacheNode | None  # None: a root, or evicted
    end: int  # pages from the root to the end of this node
    last_access: int
    num_locks: int = 0  # at this node or below
    num_pins: int = 0  # likewise
    children: dict[tuple[int, ...], CacheNode] = field(default_factory=dict)  # by their first page's tokens
    is_candidate: bool = False  # has an entry in the eviction heap


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """A cached prefix: its pages in order and their tokens. Lock it before anything can be evicted."""

    pages: list[int]
    num_tokens: int  # len(pages) × page_size
    node: CacheNode = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class InsertResult:
    """What `insert` did. ``num_new_pages + len(duplicate_pages)`` plus those the tree had from us before
    is the number of whole pages."""

    num_new_pages: int  # now shared, owned by the tree
    duplicate_pages: list[int]  # the caller's pages at places where the tree has another; still the caller's
    match: PrefixMatch  # the tree's pages for all these tokens, not locked


class PrefixCache:
    """The radix tree of one KV pool. Recency is a counter of accesses, so no clock is needed.

    All costs are linear in the tokens looked at; eviction takes O(log leaves) a leaf.
    """

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        self.page_size = page_size
        self.generation = 0  # grows when pages join or leave: a match made before may not be the longest now
        self._allocator = allocator
        self._roots: dict[str, CacheNode] = {}  # namespace -> root
        self._in_tree: set[int] = set()  # pages
        self._num_locked = 0
        self._num_pinned = 0
        self._access = 0
        # (last access, tie break, node), possibly outdated; every unlocked leaf has an entry.
        self._candidates: list[tuple[int, int, CacheNode]] = []
        self._num_pushed = 0

    @property
    def num_pages(self) -> int:
        return len(self._in_tree)

    @property
    def num_locked(self) -> int:
        """Pages that a lock protects."""
        return self._num_locked

    @property
    def num_evictable(self) -> int:
        """Pages that `evict` would take from the tree if none was pinned. (One that somebody reads without a
        lock, as forked choices do, becomes free only with its last reader.)"""
        return len(self._in_tree) - self._num_locked

    @property
    def num_pinned(self) -> int:
        """Pages that a pin keeps from eviction, locked ones among them."""
        return self._num_pinned

    def pages(self) -> list[int]:
        """Every page of the tree, in no particular order."""
        return list(self._in_tree)

    # ---- use ----------------------------------------------------------------------------------------

    def match(
        self, token_ids: Sequence[int], max_tokens: int | None = None, namespace: str = ""
    ) -> PrefixMatch:
        """The longest cached prefix of `token_ids[:max_tokens]` in whole pages; possibly empty.

        A prompt whose next token is wanted passes ``max_tokens=len(token_ids) - 1``: one token at least must
        be computed, for its logits. Marks the prefix as used just now.
        """
        limit = len(token_ids) if max_tokens is None else min(max_tokens, len(token_ids))
        tokens = self._whole_pages(token_ids, limit)
        root = self._roots.get(namespace)
        if root is None:
            return PrefixMatch([], 0, CacheNode((), [], None, 0, 0))
        return self._descend(root, tokens)

    def num_unlocked(self, match: PrefixMatch) -> int:
        """Pages of a match that no lock protects yet: so many fewer are evictable once it is locked."""
        return sum(len(node.pages) for node in self._path(match.node) if not node.num_locks)

    def lock(self, match: PrefixMatch) -> None:
        """Protect the match's pages from eviction until `unlock`. May be called several times.

        Raises PageStateError if part of the match has been evicted since it was made.
        """
        for held in self._checked_path(match):
            held.num_locks += 1
            if held.num_locks == 1:
                self._num_locked += len(held.pages)

    def unlock(self, match: PrefixMatch) -> None:
        """Undo one `lock` of this match. Raises PageStateError if it holds none."""
        for held in self._path(match.node):
            if held.num_locks == 0:
                raise PageStateError("unlock without lock")
            held.num_locks -= 1
            if held.num_locks == 0:
                self._num_locked -= len(held.pages)
                self._add_candidate(held)

    def pin(self, match: PrefixMatch) -> None:
        """Keep the match's pages from eviction until `unpin`, or until `reset` drops all. They stay evictable
        in the sense of `num_evictable`: who needs pages unpins. Raises as `lock` does."""
        for held in self._checked_path(match):
            held.num_pins += 1
            if held.num_pins == 1:
                self._num_pinned += len(held.pages)

    def unpin(self, match: PrefixMatch) -> None:
        """Undo one `pin` of this match. Raises PageStateError if there is none."""
        for held in self._path(match.node):
            if held.num_pins == 0:
                raise PageStateError("unpin without pin")
            held.num_pins -= 1
            if held.num_pins == 0:
                self._num_pinned -= len(held.pages)
                self._add_candidate(held)

    def insert(
        self, token_ids: Sequence[int], pages: Sequence[int], owner: Hashable, namespace: str = ""
    ) -> InsertResult:
        """Hand the whole pages of `token_ids` over to the tree.

        `pages[i]` holds the KV of tokens ``[i × page_size, (i + 1) × page_size)``; a last, partial page may
        be given and is left alone. Where the tree has no page yet, the owner's private page becomes shared
        and the tree's (one that is shared already, by forked choices, gets the tree as one more reader).
        They can be evicted from here on: a request that goes on reading them locks the result's match.
        Raises PageStateError, and hands over nothing, if a page is neither.
        """
        tokens = self._whole_pages(token_ids, len(token_ids))
        num_whole = len(tokens) // self.page_size
        if len(pages) < num_whole:
            raise ValueError(f"{num_whole} whole pages of tokens, but only {len(pages)} pages")
        root = self._roots.get(namespace) or CacheNode((), [], None, 0, 0)
        known = self._descend(root, tokens)
        num_known = len(known.pages)
        duplicates = [
            ours for ours, theirs in zip(pages[:num_known], known.pages, strict=True) if ours != theirs
        ]
        new_pages = list(pages[num_known:num_whole])
        if not new_pages:
            return InsertResult(num_new_pages=0, duplicate_pages=duplicates, match=known)

        self._adopt(new_pages, owner)
        self.generation += 1
        self._roots[namespace] = root
        leaf = CacheNode(
            tokens[num_known * self.page_size :], new_pages, known.node, num_whole, last_access=self._access
        )
        known.node.children[leaf.tokens[: self.page_size]] = leaf
        self._add_candidate(leaf)
        match = PrefixMatch(known.pages + new_pages, len(tokens), leaf)
        return InsertResult(num_new_pages=len(new_pages), duplicate_pages=duplicates, match=match)

    def evict(self, num_pages: int) -> int:
        """Free `num_pages` pages if that many can be: from the tail of the least recently used leaf that is
        neither locked nor pinned, then the next. Returns how many became free."""
        num_freed = 0
        while num_freed < num_pages and (leaf := self._pop_candidate()) is not None:
            num_freed += self._trim(leaf, max(0, len(leaf.pages) - (num_pages - num_freed)))
        return num_freed

    def reset(self) -> bool:
        """Drop every page, pinned ones too. False, and nothing done, if any is locked."""
        if self._num_locked:
            return False
        self.generation += 1
        self._num_pinned = 0
        self._allocator.drop_reader(list(self._in_tree))
        for node in list(self._nodes()):
            node.parent = None
        self._roots.clear()
        self._candidates.clear()
        self._in_tree.clear()
        return True

    # ---- checks -------------------------------------------------------------------------------------

    def violations(self) -> list[str]:
        """What is wrong in the tree, and between it and the allocator. O(pages); for idle times and tests."""
        found: list[str] = []
        in_heap = {id(node) for _, _, node in self._candidates}
        pages: list[int] = []
        num_locked = num_pinned = 0
        for node in self._nodes():
            name = f"node of pages {node.pages}"
            parent = node.parent
            if parent is None:
                found.append(f"{name}: has no parent")
                continue
            if not node.pages or len(node.tokens) != len(node.pages) * self.page_size:
                found.append(f"{name}: {len(node.tokens)} tokens")
            if parent.children.get(node.tokens[: self.page_size]) is not node:
                found.append(f"{name}: its parent does not know it")
            if node.end != parent.end + len(node.pages):
                found.append(f"{name}: ends at {node.end}, its parent at {parent.end}")
            if node.last_access > parent.last_access:
                found.append(f"{name}: used later than its parent")
            if node.num_locks < sum(child.num_locks for child in node.children.values()):
                found.append(f"{name}: {node.num_locks} locks, fewer than below it")
            if node.num_pins < sum(child.num_pins for child in node.children.values()):
                found.append(f"{name}: {node.num_pins} pins, fewer than below it")
            if not (node.children or node.num_locks or node.num_pins or id(node) in in_heap):
                found.append(f"{name}: an unlocked leaf that eviction cannot find")
            pages += node.pages
            num_locked += len(node.pages) if node.num_locks else 0
            num_pinned += len(node.pages) if node.num_pins else 0
        if sorted(pages) != sorted(self._in_tree):
            found.append("the nodes' pages differ from the set of pages in the tree, or one is there twice")
        found += [
            f"page {page} is in the tree, but {self._allocator.describe(page)}"
            for page in pages
            if not self._allocator.num_readers(page)
        ]
        if num_locked != self._num_locked:
            found.append(f"num_locked is {self._num_locked}, the tree holds {num_locked}")
        if num_pinned != self._num_pinned:
            found.append(f"num_pinned is {self._num_pinned}, the tree holds {num_pinned}")
        return found

    def check(self) -> None:
        """Raise PageStateError, listing every violation, if there is any."""
        if found := self.violations():
            raise PageStateError("; ".join(found))

    # ---- the tree -----------------------------------------------------------------------------------

    def _whole_pages(self, token_ids: Sequence[int], limit: int) -> tuple[int, ...]:
        return tuple(token_ids[: max(0, limit) // self.page_size * self.page_size])

    def _descend(self, root: CacheNode, tokens: tuple[int, ...]) -> PrefixMatch:
        """Follow `tokens` (whole pages) as far as the tree goes; a node that they end inside of is split."""
        self._access += 1
        root.last_access = self._access
        node = root
        pages: list[int] = []
        at = 0
        while (child := node.children.get(tokens[at : at + self.page_size])) is not None:
            num_common = self._num_common_pages(child, tokens, at)
            if num_common < len(child.pages):
                child = self._split(child, num_common)
            child.last_access = self._access
            pages += child.pages
            at += len(child.tokens)
            node = child
        return PrefixMatch(pages, at, node)

    def _num_common_pages(self, node: CacheNode, tokens: tuple[int, ...], at: int) -> int:
        """Leading pages of `node` that equal `tokens[at:]`; at least 1, the first one was looked up."""
        if tokens[at : at + len(node.tokens)] == node.tokens:
            return len(node.pages)
        size = self.page_size
        num = 1
        while tokens[at + num * size : at + (num + 1) * size] == node.tokens[num * size : (num + 1) * size]:
            num += 1
        return num

    def _split(self, node: CacheNode, num_pages: int) -> CacheNode:
        """Put the first pages of `node` into a new node above it and return that.

        `node` keeps its end: matches that were handed out name the end of their prefix.
        """
        parent = node.parent
        assert parent is not None
        at = num_pages * self.page_size
        upper = CacheNode(
            node.tokens[:at],
            node.pages[:num_pages],
            parent,
            parent.end + num_pages,
            last_access=node.last_access,
            num_locks=node.num_locks,
            num_pins=node.num_pins,
        )
        parent.children[upper.tokens[: self.page_size]] = upper
        node.tokens, node.pages, node.parent = node.tokens[at:], node.pages[num_pages:], upper
        upper.children[node.tokens[: self.page_size]] = node
        return upper

    def _adopt(self, pages: list[int], owner: Hashable) -> None:
        """Become a reader of these pages, or raise PageStateError before anything changes."""
        if len(set(pages)) != len(pages) or not self._in_tree.isdisjoint(pages):
            raise PageStateError(f"of pages {pages} one is named twice, or cached under other tokens")
        shared = [page for page in pages if self._allocator.num_readers(page)]
        private = [page for page in pages if not self._allocator.num_readers(page)]
        self._allocator.share(private, owner)
        self._allocator.add_reader(shared)
        self._in_tree.update(pages)

    def _trim(self, leaf: CacheNode, num_kept: int) -> int:
        """Take the pages behind the first `num_kept` from a leaf; an emptied leaf leaves the tree. Returns
        how many pages became free."""
        self.generation += 1
        dropped = leaf.pages[num_kept:]
        self._in_tree.difference_update(dropped)
        num_freed = len(self._allocator.drop_reader(dropped))
        leaf.end -= len(dropped)
        if num_kept:
            leaf.tokens, leaf.pages = leaf.tokens[: num_kept * self.page_size], leaf.pages[:num_kept]
            self._add_candidate(leaf)
            return num_freed
        parent = leaf.parent
        assert parent is not None
        del parent.children[leaf.tokens[: self.page_size]]
        leaf.parent = None
        if parent.parent is not None:
            self._add_candidate(parent)
        elif not parent.children:
            self._roots = {name: root for name, root in self._roots.items() if root is not parent}
        return num_freed

    def _add_candidate(self, node: CacheNode) -> None:
        """Let eviction know of a node that is, or may be, an unlocked leaf now."""
        if node.children or node.num_locks or node.num_pins or node.is_candidate:
            return
        node.is_candidate = True
        self._num_pushed += 1
        heapq.heappush(self._candidates, (node.last_access, self._num_pushed, node))

    def _pop_candidate(self) -> CacheNode | None:
        """The least recently used unlocked leaf. Entries age: they are put right here, not at each access."""
        while self._candidates:
            last_access, _, node = heapq.heappop(self._candidates)
            node.is_candidate = False
            if last_access != node.last_access:
                self._add_candidate(node)
            elif not (node.children or node.num_locks or node.num_pins):
                return node
        return None

    def _checked_path(self, match: PrefixMatch) -> Iterator[CacheNode]:
        node = match.node
        if node.end != len(match.pages) or (node.pages and node.parent is None):
            raise PageStateError("the match has been evicted: match again, then hold it")
        return self._path(node)

    @staticmethod
    def _path(node: CacheNode) -> Iterator[CacheNode]:
        """The node and those above it, without the root."""
        while node.parent is not None:
            yield node
            node = node.parent

    def _nodes(self) -> Iterator[CacheNode]:
        """Every node of the tree, without the roots."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()
