"""Tokens written ahead to a file, read where they lie, and prepared while the last step still runs.

A step should not wait for its data. Text is tokenized once, not once an epoch. The ids go to one
file of 2 or 4 bytes each, which is mapped into memory: the system reads the pages that a batch
touches, and a file larger than memory is no trouble. A thread prepares the next batches meanwhile.

The file: 8 bytes that name the format, vocabulary and count as 8 bytes each, then the ids; all
whole numbers lowest byte first. Ids of a vocabulary of up to 65,536 take 2 bytes, others 4.
"""

from __future__ import annotations

import queue
import struct
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from companion.checks import require, require_whole
from companion.data import Batches
from companion.storage import write_whole
from companion.training import Batched

MAGIC = b"TOKENS1\n"
HEADER = struct.Struct("<8sQQ")  # magic, vocabulary, count
LARGEST = 2**32  # ids of 4 bytes
WAIT = 0.05  # seconds after which a worker that cannot go on looks whether it should stop


def id_type(vocab: int) -> np.dtype:
    """The smallest type that holds every id: 2 bytes up to 65,536 ids, else 4."""
    require_whole("vocab", vocab)
    require(vocab <= LARGEST, f"vocab is {vocab}; ids of 4 bytes number {LARGEST} at most")
    return np.dtype("<u2" if vocab <= 2**16 else "<u4")


def write_tokens(path: str | Path, lines: Iterable[Tensor], vocab: int) -> Path:
    """Write lines of token ids, each (tokens,), one after another. Returns `path`.

    Lines are taken one at a time, so all of them need not fit in memory. The file is whole or
    absent. Raises ValueError for ids outside the vocabulary, other shapes, and no tokens at all.
    """
    kind = id_type(vocab)

    def write(temporary: Path) -> None:
        count = 0
        with open(temporary, "wb") as file:
            file.write(bytes(HEADER.size))  # filled in at the end, when the count is known
            for line in lines:
                file.write(_checked(line, vocab).astype(kind).tobytes())
                count += len(line)
            require(count > 0, "there are 0 tokens; at least one is needed")
            file.seek(0)
            file.write(HEADER.pack(MAGIC, vocab, count))

    return write_whole(path, write)


def _checked(line: Tensor, vocab: int) -> np.ndarray:
    text = f"a line is {line.dtype} of shape {tuple(line.shape)}; a line of whole ids is expected"
    require(line.ndim == 1 and not line.is_floating_point(), text)
    if len(line) > 0:
        low, high = int(line.min()), int(line.max())
        text = f"ids run from {low} to {high}; with this vocabulary they must be 0 to {vocab - 1}"
        require(low >= 0 and high < vocab, text)
    return line.cpu().numpy()


class MappedTokens:
    """A line of token ids in a file: `tokens[positions]` is int64 and of the positions' shape.

    Stands in for the line of tokens that `companion.data.Batches` reads. Raises FileNotFoundError,
    and ValueError for a file of another format, vocabulary or length than it says.
    """

    ndim = 1

    def __init__(self, path: str | Path, *, vocab: int) -> None:
        kind, self.path = id_type(vocab), Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path} is missing; write it with write_tokens")
        with open(self.path, "rb") as file:
            start = file.read(HEADER.size)
        named = len(start) == HEADER.size and start.startswith(MAGIC)
        require(named, f"{path} is no file of tokens; write it with write_tokens")
        _, found, count = HEADER.unpack(start)
        require(found == vocab, f"{path} has a vocabulary of {found}, not {vocab}")
        size, right = self.path.stat().st_size, HEADER.size + count * kind.itemsize
        require(size == right, f"{path} has {size} bytes, not {right}: it is truncated or altered")
        self._ids = np.memmap(self.path, kind, "r", HEADER.size, (count,))

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __getitem__(self, positions: Tensor) -> Tensor:
        return torch.from_numpy(self._ids[positions.numpy()].astype(np.int64))


def mapped_batches(
    path: str | Path, *, vocab: int, batch: int, context: int, seed: int = 0
) -> Batches:
    """`companion.data.Batches` of a file that `write_tokens` made: the same windows, bit for bit.

    Raises what `MappedTokens` and `Batches` raise.
    """
    return Batches(MappedTokens(path, vocab=vocab), batch=batch, context=context, seed=seed)


class Clocked:
    """The same batches; `seconds` holds how long each of them was waited for."""

    def __init__(self, batches: Batched) -> None:
        self.batches, self.seconds = batches, []

    def __getitem__(self, step: int) -> Tensor:
        start = time.perf_counter()
        batch = self.batches[step]
        self.seconds.append(time.perf_counter() - start)
        return batch


class Ahead:
    """`with Ahead(batches, steps=n) as ready:` a thread prepares `ready[0]`, `ready[1]`, ... ahead.

    At most `depth` batches wait to be taken, in their order, from `start` to `steps - 1`. The
    thread has ended when the block is left, however it is left. What goes wrong in it is raised
    where the batch is asked for.
    """

    def __init__(self, batches: Batched, *, steps: int, start: int = 0, depth: int = 2) -> None:
        require_whole("steps", steps)
        require_whole("start", start, least=0)
        require(start < steps, f"start {start} must be below the {steps} steps")
        require_whole("depth", depth)
        self.batches, self.steps, self.next = batches, steps, start
        self._ready: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._worker = threading.Thread(target=self._work, args=(start,), daemon=True)

    def __enter__(self) -> Ahead:
        self._worker.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._worker.join()

    def __getitem__(self, step: int) -> Tensor:
        text = f"step {step!r} is asked for; batches are prepared in order, next is {self.next}"
        require(step == self.next and step < self.steps, text)
        require(self._worker.is_alive() or not self._ready.empty(), "no worker; use `with Ahead`")
        batch, error = self._ready.get()
        if error is not None:
            self.next = self.steps  # nothing more will come
            raise error
        self.next += 1
        return batch

    def _work(self, start: int) -> None:
        for step in range(start, self.steps):
            try:
                item = (self.batches[step], None)
            except Exception as error:  # raised again in the thread that trains
                item = (None, error)
            if not self._put(item) or item[1] is not None:
                return

    def _put(self, item: tuple) -> bool:
        """Wait for a free place; False if the block is left first."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=WAIT)
                return True
            except queue.Full:
                continue
        return False
