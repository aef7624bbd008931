"""Stops every process of one set of ranks, however the process that started them ends.

A notebook that is killed cannot clean up, and what ipyparallel started for it would stay for good.
So a small process stands beside each set of ranks. It sleeps until a byte arrives (`Guard.close`)
or the pipe breaks (the notebook is gone), then kills all that carries its mark: an environment
variable, which whatever the ranks start inherits. It is run by path and imports nothing of
`companion`, to start at once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid

import psutil

MARK = "COMPANION_RANKS"  # the environment variable that holds the mark


class Guard:
    """The side of the notebook: a mark for processes, a folder for their files, and their end."""

    def __init__(self) -> None:
        self.mark, self.folder = uuid.uuid4().hex, tempfile.mkdtemp(prefix="ranks-")
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, self.mark, self.folder],
            stdin=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name != MARK},
            start_new_session=True,  # Ctrl-C in a terminal reaches the notebook alone
        )

    def close(self) -> None:
        """Return when all marked processes are dead and the folder is gone."""
        if os.getpid() != self._owner:  # a forked child drops its copy; the ranks are not its own
            return
        with contextlib.suppress(OSError), self._process.stdin as pipe:
            pipe.write(b".")
        if self._process.wait() != 0:  # somebody killed the guard
            clear(self.mark, self.folder)


def clear(mark: str, folder: str, seconds: float = 10.0) -> None:
    """Kill what is marked until two looks in a row find nothing, then remove the folder."""
    deadline, empty = time.monotonic() + seconds, 0
    while empty < 2 and time.monotonic() < deadline:
        found = marked(mark)
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        empty = 0 if found else empty + 1
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def marked(mark: str) -> list[psutil.Process]:
    """The living processes that carry the mark; those of other users cannot be read."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found


if __name__ == "__main__":
    os.read(sys.stdin.fileno(), 1)
    clear(*sys.argv[1:])
