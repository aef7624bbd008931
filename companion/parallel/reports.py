"""The report of a training by many ranks: one line of JSON for each start, each step and the end.

A restart adds to it, so it tells at which step each start went on and which steps were done twice.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import torch.distributed as dist
from torch.distributed import ProcessGroup

from companion.parallel.checkpoints import Resumed, together


class Report:
    """Lines that rank 0 adds to a file; the other ranks call the same methods and write nothing."""

    def __init__(self, path: Path, group: ProcessGroup) -> None:
        self.path, self.group, self.first = path, group, dist.get_rank(group) == 0

    def start(self, found: Resumed) -> None:
        """Who is here, in the order of the ranks, and at which step they start."""
        members = together(_place, self.group)
        passed_over = list(found.passed_over)
        self.write(event="start", step=found.step, members=members, passed_over=passed_over)

    def write(self, **line: object) -> None:
        """Add a line, with the time in seconds since 1970."""
        if self.first:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3), **line}) + "\n")


def _place() -> dict[str, int | str]:
    """Where this rank is: its node and its local rank, as the launcher counts, and its process."""
    node, local = (int(os.environ.get(name, 0)) for name in ("GROUP_RANK", "LOCAL_RANK"))
    return {"node": node, "local_rank": local, "host": socket.gethostname(), "pid": os.getpid()}
