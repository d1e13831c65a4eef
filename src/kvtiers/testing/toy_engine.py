"""A toy engine of two processes that uses the node's cache as a serving engine's connector would.

The scheduler (this class) has the prompts, the table of blocks and the client that is given slots. The worker, a process of its
own, holds the "GPU": paged blocks in shared memory. It maps the arena through a client of its own and copies whole blocks between
slots and blocks when told to. A prompt goes the way of a real one:

    stage → allocate blocks → worker: slots → blocks → release → worker: compute what is missing → open_store
    → worker: blocks → slots → commit → check every byte of every block → free the blocks

The KV of a chunk is drawn from its key, so whoever computes it gets the same bytes and each of them can be checked. Whatever
happens to the service, a prompt ends right: what can't be loaded is computed. A worker that dies ends the engine.

    python -m kvtiers.testing.toy_engine SOCKET SEED PROMPTS        one engine by itself; says `done …` for each prompt
"""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvtiers.memory import syscalls
from kvtiers.model.errors import DeadlineExceeded, KvtiersError
from kvtiers.model.keys import ChunkKey
from kvtiers.node.client import NodeClient
from kvtiers.node.handles import Granted, Load
from kvtiers.node.idle import watch_while_idle
from kvtiers.testing.cache_oracle import SMALL_CHUNK, SMALL_LAYOUT, WrongKV
from kvtiers.testing.direct_engine import DirectEngine

Bytes = npt.NDArray[np.uint8]

_MODULE: Final = "kvtiers.testing.toy_engine"  # `__name__` is another one when it is run

BLOCKS_PER_CHUNK: Final = 2
BLOCK_BYTES: Final = SMALL_LAYOUT.nbytes(SMALL_CHUNK) // BLOCKS_PER_CHUNK
NUM_BLOCKS: Final = 64
STAGE_S: Final = 1.0
WORKER_S: Final = 60.0
LONGEST_PROMPT: Final = 10
DOCUMENTS: Final = 30


class WorkerLost(KvtiersError):
    """The worker process has ended; so has the engine."""


class Outcome(NamedTuple):
    """How a prompt went."""

    chunks: int
    loaded: int
    """Chunks whose KV came from the cache."""
    stored: int
    """Chunks that were copied to slots and committed."""


class ToyEngine:
    """The scheduler, with its worker. `run` serves one prompt at a time; `close` ends both."""

    def __init__(self, socket: Path, model: str = "a-model") -> None:
        token = os.urandom(16)
        self._engine = DirectEngine(socket, model, engine=token)
        self.client = self._engine.client
        watch_while_idle(self.client)
        self._memory = os.memfd_create("toy-blocks", os.MFD_CLOEXEC)
        os.ftruncate(self._memory, NUM_BLOCKS * BLOCK_BYTES)
        self._blocks = _map_blocks(self._memory)
        self._free = list(range(NUM_BLOCKS))
        self._worker = subprocess.Popen(  # noqa: S603 - ourselves
            [sys.executable, "-m", _MODULE, "--worker", str(socket), token.hex(), str(self._memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._memory],
        )

    @property
    def worker_pid(self) -> int:
        """For tests that end or stop it."""
        return self._worker.pid

    def tokens(self, document: int, chunks: int) -> list[int]:
        """A prompt of so many chunks; prompts of one document begin alike."""
        return self._engine.tokens(document, chunks)

    def run(self, tokens: Sequence[int]) -> Outcome:
        """One prompt from arrival to end. Raises WrongKV, WorkerLost, DeadlineExceeded."""
        keys = self._engine.oracle.keys(tokens)
        load = self._stage(keys)
        blocks = [self._free.pop() for _ in range(BLOCKS_PER_CHUNK * len(keys))]
        loaded = load.num_chunks
        if loaded and not self._copy("load", load, range(loaded), blocks):
            loaded = 0  # the arena it was promised in is gone: compute it
        self.client.release(load)
        self._tell(
            "compute", keys=[key.hex() for key in keys[loaded:]], blocks=blocks[BLOCKS_PER_CHUNK * loaded :]
        )
        stored = self._store(keys, blocks)
        self._check(keys, blocks)
        self._free += blocks
        self.client.step()
        return Outcome(len(keys), loaded, stored)

    def close(self) -> None:
        """Say goodbye and end the worker; kills it if it does not end."""
        for stream in (self._worker.stdin, self._worker.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass
        try:
            self._worker.wait(5)
        except subprocess.TimeoutExpired:
            self._worker.kill()
            self._worker.wait(5)
        self.client.close()
        os.close(self._memory)

    # --- inside ---

    def _stage(self, keys: list[ChunkKey]) -> Load:
        """Ask, and go on stepping until the answer is there: at the deadline at the latest."""
        deadline = time.monotonic() + STAGE_S
        load = self.client.stage(self._engine.space, keys, deadline=deadline)
        while not load.done:
            self.client.step()
            time.sleep(0.001)
        self.client.step()
        return load

    def _store(self, keys: list[ChunkKey], blocks: list[int]) -> int:
        store = self.client.open_store(self._engine.space, self._engine.root, keys)
        while not store.done:
            self.client.step()
            time.sleep(0.001)
        if not store.indices:
            return 0
        if self._copy("save", store, store.indices, blocks):
            self.client.commit(store)
        else:
            self.client.abort(store)
        self.client.step()
        return len(store.indices)

    def _copy(self, what: str, handle: Granted, chunks: Sequence[int], blocks: list[int]) -> bool:
        """Have the worker copy; False if it does not map that arena (any more)."""
        pages = [blocks[BLOCKS_PER_CHUNK * chunk : BLOCKS_PER_CHUNK * (chunk + 1)] for chunk in chunks]
        offsets = [int(row[0]) for row in handle.offsets]
        return self._tell(what, arena=handle.arena.hex(), offsets=offsets, blocks=pages)

    def _tell(self, what: str, **details: Any) -> bool:
        """One order to the worker, and its answer. The client is stepped meanwhile, as an engine's steps go on."""
        stdin, stdout = self._worker.stdin, self._worker.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps({"what": what, **details}).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise WorkerLost("the worker has ended") from None
        deadline = time.monotonic() + WORKER_S
        while not select.select([stdout], [], [], 0.002)[0]:
            self.client.step()
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"the worker did not {what} within {WORKER_S} s")
        answer = stdout.readline()
        if not answer:
            raise WorkerLost("the worker has ended")
        return bool(json.loads(answer))

    def _check(self, keys: list[ChunkKey], blocks: list[int]) -> None:
        for index, key in enumerate(keys):
            mine = blocks[BLOCKS_PER_CHUNK * index : BLOCKS_PER_CHUNK * (index + 1)]
            if not np.array_equal(self._blocks[mine].reshape(-1), self._engine.kv(key)):
                raise WrongKV(f"chunk {index} of {len(keys)} has bytes of something else")


# --- the worker ------------------------------------------------------------------------------------------------------


class Worker:
    """Copies between the arena and its blocks, as told on stdin, until that ends."""

    def __init__(self, socket: Path, token: bytes, memory: int) -> None:
        self._client = NodeClient(socket, name="toy worker", engine=token)
        watch_while_idle(self._client)
        self._blocks = _map_blocks(memory)
        self._engine = DirectEngine(socket)  # never connected: only for what it computes

    def run(self) -> None:
        """Every order gets one answer: whether it was done."""
        while select.select([sys.stdin], [], [], 0.05)[0] or self._idle():
            line = sys.stdin.readline()
            if not line:
                break
            self._client.step()
            print(json.dumps(self._obey(json.loads(line))), flush=True)  # noqa: T201 - the answer
        self._client.close()

    def _idle(self) -> bool:
        """A step, so that a lost service is noticed and a new one's arena mapped."""
        while not select.select([sys.stdin], [], [], 0.005)[0]:
            self._client.step()
        return True

    def _obey(self, order: dict[str, Any]) -> bool:
        if order["what"] == "compute":
            for index, key in enumerate(order["keys"]):
                mine = order["blocks"][BLOCKS_PER_CHUNK * index : BLOCKS_PER_CHUNK * (index + 1)]
                kv = self._engine.kv(ChunkKey(bytes.fromhex(key)))
                self._blocks[mine] = kv.reshape(BLOCKS_PER_CHUNK, BLOCK_BYTES)
            return True
        for offset, mine in zip(order["offsets"], order["blocks"], strict=True):
            slot = self._client.view(bytes.fromhex(order["arena"]), offset, BLOCKS_PER_CHUNK * BLOCK_BYTES)
            if slot is None:
                return False
            pages = slot.reshape(BLOCKS_PER_CHUNK, BLOCK_BYTES)
            if order["what"] == "load":
                self._blocks[mine] = pages
            else:
                pages[:] = self._blocks[mine]
        return True


def _map_blocks(fd: int) -> Bytes:
    nbytes = NUM_BLOCKS * BLOCK_BYTES
    pages = -(-nbytes // 4096) * 4096
    return np.asarray(_Range(syscalls.map_shared(fd, pages), nbytes)).reshape(NUM_BLOCKS, BLOCK_BYTES)


class _Range:
    """Mapped until the process ends."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
        }


def main() -> None:
    """A worker, or an engine that serves random prompts."""
    if sys.argv[1] == "--worker":
        _, _, socket, token, memory = sys.argv
        Worker(Path(socket), bytes.fromhex(token), int(memory)).run()
        return
    _, socket, seed, prompts = sys.argv
    rng = random.Random(int(seed))
    engine = ToyEngine(Path(socket))
    print("worker", engine.worker_pid, flush=True)  # noqa: T201 - read by whoever started it
    try:
        for _ in range(int(prompts)):
            tokens = engine.tokens(rng.randrange(DOCUMENTS), rng.randrange(1, LONGEST_PROMPT + 1))
            print("done", *engine.run(tokens), flush=True)  # noqa: T201 - the same
    except WrongKV as error:
        print("wrong", error, flush=True)  # noqa: T201 - the same
        raise
    finally:
        engine.close()


if __name__ == "__main__":
    main()
