"""Machines with a real Post each, in one process, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.post.door import listen
from thinwire.comm.gossip.post.post import Post, drive
from thinwire.comm.meter import TrafficMeter

T = TypeVar("T")
SECRET = b"a secret that all know"


class Place:
    """The addresses of a few machines, each of which may be filled, left and filled again."""

    def __init__(self, size: int, **options: Any) -> None:
        self.size = size
        self._options = options
        first = [listen("127.0.0.1", 0) for _ in range(size)]
        self._listeners: dict[int, socket.socket] = dict(enumerate(first))
        self.addresses = [(str(s.getsockname()[0]), int(s.getsockname()[1])) for s in first]
        self.posts: list[Post] = []

    def enter(self, rank: int, **options: Any) -> Post:
        """A new machine in this place."""
        listener = self._listeners.pop(rank, None) or listen(*self.addresses[rank])
        levels = ["self" if other == rank else "world" for other in range(self.size)]
        options = {"secret": SECRET, "grace_s": 60.0, **self._options, **options}
        post = Post(rank, self.addresses, listener=listener, meter=TrafficMeter(levels), **options)
        self.posts.append(post)
        return post

    def enter_all(self) -> list[Post]:
        posts = [self.enter(rank) for rank in range(self.size)]
        for post in posts:
            post.wait_for_others(self.size - 1, 30.0)
        return posts

    def close(self) -> None:
        for post in self.posts:
            post.close(linger_s=0.0)
        for listener in self._listeners.values():
            listener.close()


@contextlib.contextmanager
def place_for(size: int, **options: Any) -> Iterator[Place]:
    place = Place(size, **options)
    try:
        yield place
    finally:
        place.close()


def run_scripts(posts: Sequence[Post], scripts: Sequence[Script[T]], timeout_s: float = 60.0) -> list[T]:
    """Drive a script per machine, each in a thread; the first that fails raises."""
    return run_together([partial(drive, script, post) for post, script in zip(posts, scripts, strict=True)], timeout_s)


def run_together(works: Sequence[Callable[[], T]], timeout_s: float = 60.0) -> list[T]:
    """Run a few things, each in a thread."""
    outcomes: list[Any] = [TimeoutError(f"number {number} did not end") for number in range(len(works))]

    def body(number: int) -> None:
        try:
            outcomes[number] = works[number]()
        except BaseException as error:
            outcomes[number] = error

    threads = [threading.Thread(target=body, args=(number,), daemon=True) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes
