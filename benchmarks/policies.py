"""Who leaves memory, simulated: what a policy is worth, apart from what its code costs.

SIEVE: Zhang et al. 2024. S3-FIFO: Yang et al. 2023. Sizes are in bytes; no value is larger than
the budget.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict, deque


class Policy(ABC):
    """Which keys are in memory: a key is in `sizes` as long as it is."""

    def __init__(self, budget):
        self.budget = budget
        self.sizes = {}
        self.total = 0

    def use(self, key, size):
        """Get or set a key; return what had to leave for it."""
        if key in self.sizes:
            self.hit(key)
            return []
        gone = []
        while self.total + size > self.budget:
            left = self.evict()
            if left is not None:
                gone.append(left)
                self.total -= self.sizes.pop(left)
        self.sizes[key] = size
        self.total += size
        self.enter(key)
        return gone

    @abstractmethod
    def hit(self, key): ...

    @abstractmethod
    def enter(self, key): ...

    @abstractmethod
    def evict(self):
        """Return a key that leaves, or None for another try."""


class LRU(Policy):
    def __init__(self, budget):
        super().__init__(budget)
        self.order = OrderedDict()

    def enter(self, key):
        self.order[key] = None

    def hit(self, key):
        self.order.move_to_end(key)

    def evict(self):
        return self.order.popitem(last=False)[0]


class Sieve(Policy):
    def __init__(self, budget):
        super().__init__(budget)
        self.queue = []  # the oldest first
        self.hand = 0
        self.used = set()

    def enter(self, key):
        self.queue.append(key)

    def hit(self, key):
        self.used.add(key)

    def evict(self):
        if self.hand >= len(self.queue):
            self.hand = 0
        key = self.queue[self.hand]
        if key in self.used:
            self.used.discard(key)
            self.hand += 1
            return None
        return self.queue.pop(self.hand)


class S3Fifo(Policy):
    def __init__(self, budget):
        super().__init__(budget)
        self.small, self.main = deque(), deque()
        self.small_total = 0
        self.uses = {}
        self.ghosts = OrderedDict()  # key -> size, up to the bytes of the main queue
        self.ghosts_total = 0

    def enter(self, key):
        self.uses[key] = 0
        if key in self.ghosts:
            self.ghosts_total -= self.ghosts.pop(key)
            self.main.append(key)
        else:
            self.small.append(key)
            self.small_total += self.sizes[key]

    def hit(self, key):
        self.uses[key] = min(self.uses[key] + 1, 3)

    def evict(self):
        if self.small_total >= self.budget / 10 or not self.main:
            return self.evict_small()
        key = self.main.popleft()
        if self.uses[key]:
            self.uses[key] -= 1
            self.main.append(key)
            return None
        return key

    def evict_small(self):
        key = self.small.popleft()
        self.small_total -= self.sizes[key]
        if self.uses[key] > 1:
            self.uses[key] = 0
            self.main.append(key)
            return None
        self.ghosts[key] = self.sizes[key]
        self.ghosts_total += self.sizes[key]
        while self.ghosts_total > self.budget * 9 / 10:
            self.ghosts_total -= self.ghosts.popitem(last=False)[1]
        return key


POLICIES = {"lru": LRU, "sieve": Sieve, "s3-fifo": S3Fifo}
