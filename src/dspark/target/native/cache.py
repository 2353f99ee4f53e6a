"""Keys and values in pages of 32 tokens. A cache grows page by page, forks share their whole pages, and a page that nobody holds
is there for the next request.

Pages are cut from large blocks, which the system gets back when none of their pages is in use, but for one: memory that is written
for the first time is dear (bench/log.md), and the next request would pay for it again. Memory of many sizes, long-lived and
short-lived, would leave holes in glibc's heap that held as much as what was in use (bench/log.md)."""

import threading
from array import array

import torch

from dspark.target.native.pages import huge_block

PAGE_TOKENS = 32  # stack.cpp's
SLAB_BYTES = 2**25  # of a block; Linux gives such memory as it is first written to
LINE = 64  # torch's own blocks begin at a line too


class Page:
    """Memory of one page, as bytes; it goes back to its pool with the last cache that holds it.

    `shared`: several caches may hold it, and none may write to it."""

    __slots__ = ("memory", "number", "shared", "slab")

    def __init__(self, slab: "Slab", number: int, memory: torch.Tensor):
        self.slab, self.number, self.memory, self.shared = slab, number, memory, False

    def __del__(self) -> None:
        self.slab.pool.give_back(self.slab, self.number)


class Slab:
    """A block of memory and which of its pages are free. `fresh` pages were never written to: they are zero."""

    def __init__(self, pool: "Pool"):
        self.pool, self.num_pages = pool, max(1, SLAB_BYTES // pool.page_bytes)
        size = self.num_pages * pool.page_bytes
        with torch.inference_mode(False):  # which is not to bind later writers
            block = huge_block(size) if pool.device.type == "cpu" else None
            self.memory = torch.zeros(size, dtype=torch.uint8, device=pool.device) if block is None else block
        self.free = list(range(self.num_pages))[::-1]
        self.fresh = set(self.free)


class Pool:
    """Pages of one size on one device. Any thread may take and give back."""

    def __init__(self, page_bytes: int, device: torch.device | str = "cpu"):
        self.page_bytes, self.device = -(-page_bytes // LINE) * LINE, torch.device(device)
        self.slabs: list[Slab] = []
        self.num_used = 0
        self.lock = threading.RLock()  # a page may be given back while one is taken, by the garbage collector

    @property
    def used_bytes(self) -> int:
        """Of pages that somebody holds, each counted once."""
        return self.num_used * self.page_bytes

    def take(self) -> Page:
        """A page of zeros."""
        with self.lock:
            slab = next((slab for slab in self.slabs if slab.free), None)
            if slab is None:
                slab = Slab(self)
                self.slabs.append(slab)
            number = slab.free.pop()
            fresh = number in slab.fresh
            slab.fresh.discard(number)
            self.num_used += 1
        page = Page(slab, number, slab.memory[number * self.page_bytes : (number + 1) * self.page_bytes])
        if not fresh:  # what its last holder left may be no numbers
            page.memory.zero_()
        return page

    def copy(self, page: Page) -> Page:
        new = self.take()
        new.memory.copy_(page.memory)
        return new

    def give_back(self, slab: Slab, number: int) -> None:
        with self.lock:
            slab.free.append(number)
            self.num_used -= 1
            unused = [each for each in self.slabs if len(each.free) == each.num_pages]
            if len(unused) > 1:  # the one that has been unused for longer is kept: its pages were written to
                self.slabs.remove(slab)


def pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_TOKENS)


class Cache:
    """Keys and values of one request: `pages` in order, and where each lies, for stack.cpp. The caller counts its tokens."""

    def __init__(self, pool: Pool, pages: list[Page] | None = None):
        self.pool, self.pages = pool, pages or []
        self.addresses = array("Q", [page.memory.data_ptr() for page in self.pages])

    def reserve(self, past: int, num_tokens: int) -> None:
        """Make room for tokens `past` to `num_tokens` - 1, in pages of its own."""
        for i in range(past // PAGE_TOKENS, min(len(self.pages), pages_for(num_tokens))):
            if self.pages[i].shared:
                self.pages[i] = self.pool.copy(self.pages[i])
                self.addresses[i] = self.pages[i].memory.data_ptr()
        while len(self.pages) < pages_for(num_tokens):
            self.pages.append(self.pool.take())
            self.addresses.append(self.pages[-1].memory.data_ptr())

    def growth(self, past: int, num_tokens: int) -> int:
        """Bytes that `reserve` would take."""
        held = self.pages[past // PAGE_TOKENS : pages_for(num_tokens)]
        return self.pool.page_bytes * (max(0, pages_for(num_tokens) - len(self.pages)) + sum(page.shared for page in held))

    def fork(self, num_tokens: int) -> "Cache":
        """Its first tokens for another request: whole pages are shared from now on, a page begun is copied."""
        whole = self.pages[: num_tokens // PAGE_TOKENS]
        for page in whole:
            page.shared = True
        begun = self.pages[len(whole) : pages_for(num_tokens)]
        return Cache(self.pool, [*whole, *map(self.pool.copy, begun)])
