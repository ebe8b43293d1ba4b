"""SIGTERM and SIGINT: a training stops at the end of its iteration."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

STOPPING = (signal.SIGTERM, signal.SIGINT)
FORWARDED = 2.0  # seconds in which a launcher may pass on the signal that its whole process group got


class StopSignals:
    """Remembers the first SIGTERM or SIGINT as ``received``; a second one ends the process at once.

    Several processes have to agree on stopping, by a flag on ``device``.
    """

    def __init__(self, distributed: bool = False, device: torch.device | str = "cpu") -> None:
        self.distributed, self.device = distributed, device
        self.received, self.time = 0, 0.0
        self.within = multiprocessing.RawValue("b", 0)  # shared with the data loaders' workers
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.receive) for number in STOPPING}
        self.within.value = 1
        return self

    def __exit__(self, *_: Any) -> None:
        self.within.value = 0
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def receive(self, number: int, _: Any) -> None:
        """Handle a signal."""
        if self.received and not (self.distributed and time.monotonic() - self.time < FORWARDED):
            os._exit(128 + number)
        if not self.received:
            self.received, self.time = number, time.monotonic()
            name = signal.Signals(number).name
            with suppress(OSError):  # print is not for signals: it may have interrupted one
                os.write(2, f"\n{name}: stopping after this iteration; once more stops at once\n".encode())

    def agreed(self) -> int:
        """Return the signal that some process has received, or 0; called by all processes."""
        if not self.distributed:
            return self.received
        flag = torch.tensor(self.received, device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)

    def leave_to_parent(self, init: Callable[[int], None] | None) -> Callable[[int], None]:
        """Return a ``worker_init_fn`` that calls ``init`` and leaves the signals of the process group to us."""
        return partial(_leave_to_parent, init, self.within)


def end_with_parent(init: Callable[[int], None] | None = None, worker: int = 0) -> None:
    """Let a worker end when the process that started it does, however that ends, then call ``init(worker)``."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if init is not None:
        init(worker)


def _leave_to_parent(init: Callable[[int], None] | None, within: Any, worker: int) -> None:
    def receive(number: int, _: Any) -> None:
        if not within.value:  # Python sends SIGTERM to the workers that are left when it ends, and waits for them
            os._exit(128 + number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, receive)
    if init is not None:
        init(worker)
