"""The connector, with a journal of what it does: one file a process in the folder `$KVTIERS_TEST_JOURNAL`, one JSON object a line.

`begun`     the attention backend that is in the namespace
`request`   a request's name and block hashes
`allocated` the blocks that vLLM gave it, and how many tokens are to be loaded
`step`      tokens scheduled of each request
`offers`    how many stores are under way
`staged`    what the service answered to a request's load: chunks, and why it is not more
`opened`    what it answered to a store: the chunks it took, and why not the others
`counts`    the scheduler side's counters, whenever one has changed
`kept`, `filled`   a worker has copied blocks to the arena, from it: their ids, the hashes that the scheduler's side gave
            them, and a checksum of the bytes that the engine's memory holds then

A file `hold-kept` or `hold-filled` in that folder makes the copying threads wait until it is gone; `at-…` says that one waits.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

from kvtiers.integrations.vllm import KvtiersConnector
from kvtiers.integrations.vllm.blocks import Bytes, HostBlocks
from kvtiers.integrations.vllm.messages import LoadJob, StepJobs, StoreJob

_HELD_AT_MOST_S: Final = 60.0


class Journal:
    def __init__(self) -> None:
        self.folder = Path(os.environ["KVTIERS_TEST_JOURNAL"])
        self._file = (self.folder / f"{os.getpid()}.jsonl").open("a")

    def write(self, event: str, **values: Any) -> None:
        self._file.write(json.dumps({"event": event, "at": time.monotonic(), **values}) + "\n")
        self._file.flush()

    def hold(self, what: str) -> None:
        gate = self.folder / f"hold-{what}"
        deadline = time.monotonic() + _HELD_AT_MOST_S
        while gate.exists() and time.monotonic() < deadline:
            (self.folder / f"at-{what}").touch()
            time.sleep(0.01)


class RecordedBlocks:
    """A worker's blocks; `hash_of` is told with each step, as the worker knows of ids only."""

    def __init__(self, blocks: HostBlocks, rank: int, journal: Journal) -> None:
        self._blocks = blocks
        self._rank = rank
        self._journal = journal
        self.hash_of: dict[int, str] = {}
        self.request = ""

    def fence(self) -> Any:
        return self._blocks.fence()

    def read(self, ids: Sequence[int], part: Bytes, first: int, fence: Any = None) -> None:
        self._journal.hold("kept")
        self._blocks.read(ids, part, first, fence)
        self._note("kept", ids)

    def write(self, part: Bytes, first: int, ids: Sequence[int]) -> None:
        self._journal.hold("filled")
        self._blocks.write(part, first, ids)
        self._note("filled", ids, request=self.request)

    def _note(self, event: str, ids: Sequence[int], **more: Any) -> None:
        sums = [self._checksum(block) for block in ids]
        hashes = [self.hash_of.get(block, "") for block in ids]
        self._journal.write(event, rank=self._rank, blocks=list(ids), hashes=hashes, sums=sums, **more)

    def _checksum(self, block: int) -> str:
        digest = hashlib.sha1()
        for region in self._blocks._regions:
            digest.update(region[block])
        return digest.hexdigest()


class RecordingConnector(KvtiersConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._journal = Journal()
        self._hash_of: dict[int, str] = {}

    def set_xfer_handshake_metadata(self, metadata: Any) -> None:
        super().set_xfer_handshake_metadata(metadata)
        if self._scheduler is not None:
            self._journal.write("begun", backend=self._scheduler._plan.namespace.attention_backend)
            offer = self._scheduler._offer

            def recorded(state: Any, blocks: Sequence[int]) -> None:
                self._name(state.request, blocks)
                offer(state, blocks)
                self._note_offers()

            self._scheduler._offer = recorded  # type: ignore[method-assign]
            self._answered: set[int] = set()
            self._counts: dict[str, float] = {}
            take_jobs = self._scheduler.stores.take_jobs

            def noted() -> list[StoreJob]:
                self._note_answers()  # before those that were refused are forgotten
                return take_jobs()

            self._scheduler.stores.take_jobs = noted  # type: ignore[method-assign]

    def _name(self, request: Any, blocks: Sequence[int]) -> None:
        for block, block_hash in zip(blocks, request.block_hashes, strict=False):
            self._hash_of[block] = block_hash.hex()

    def _note_offers(self) -> None:
        if self._scheduler is not None:
            self._journal.write("offers", count=len(self._scheduler.stores._offers))

    def _note_answers(self) -> None:
        """What stores were answered with, and what was counted: for whoever reads of a test that failed."""
        side, client = self._scheduler, self._client
        if side is None or client is None:
            return
        for offer in side.stores._offers.values():
            if offer.store.done and offer.number not in self._answered:
                self._answered.add(offer.number)
                refused = [[first, count, str(why)] for first, count, why in offer.store.refused]
                self._journal.write("opened", taken=list(offer.store.indices), refused=refused)
        counts: dict[str, float] = {**side.counts.total, **side.stores.counters, **client.counters}
        for often in ("sent", "answers"):
            del counts[often]
        if counts != self._counts:
            self._counts = counts
            self._journal.write("counts", **counts)

    # --- scheduler ---

    def on_new_request(self, request: Any) -> None:
        hashes = [one.hex() for one in request.block_hashes]
        self._journal.write("request", request=request.request_id, hashes=hashes)
        super().on_new_request(request)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        state = self._scheduler._states.get(request.request_id) if self._scheduler is not None else None
        if state is not None and state.load is not None:
            why, chunks = state.load.stopped_by, state.load.num_chunks
            self._journal.write("staged", request=request.request_id, chunks=chunks, stopped_by=why)
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if self._scheduler is not None:
            ids = list(self._ids(blocks.get_block_ids()))
            self._name(request, ids)
            self._journal.write(
                "allocated", request=request.request_id, blocks=ids, tokens=num_external_tokens
            )

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        meta = super().build_connector_meta(scheduler_output)
        if scheduler_output.num_scheduled_tokens:
            self._journal.write("step", tokens=dict(scheduler_output.num_scheduled_tokens))
        jobs: StepJobs = meta.jobs
        meta.hash_of = {
            block: self._hash_of.get(block, "")
            for chunks in [job.chunks for job in jobs.loads] + [job.chunks for job in jobs.stores]
            for chunk in chunks
            for block in chunk.blocks
        }
        self._note_offers()
        return meta

    def update_connector_output(self, connector_output: Any) -> None:
        super().update_connector_output(connector_output)
        self._note_offers()

    # --- worker ---

    def register_kv_caches(self, kv_caches: Any) -> None:
        super().register_kv_caches(kv_caches)
        if self._worker is None:
            return
        self._recorded = RecordedBlocks(cast("HostBlocks", self._worker._blocks), self._rank, self._journal)
        self._worker._blocks = self._recorded
        load = self._worker._load

        def recorded(job: LoadJob) -> None:
            self._recorded.request = job.request_id
            load(job)

        self._worker._load = recorded  # type: ignore[method-assign]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._recorded.hash_of.update(getattr(self._connector_metadata, "hash_of", {}))
        super().start_load_kv(forward_context, **kwargs)
