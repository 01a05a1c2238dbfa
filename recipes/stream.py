"""Documents to packed blocks, one after another, in an order that a resumed run meets again exactly.

A data set's own shuffle buffer is lost when a run stops. Here blocks are shuffled inside windows, each by a seed
of its own, and for every window a line says where its documents begin. So a resumed run reads one window again
at most, whatever had been read before.
"""

import copy
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import get_worker_info

from framing import Framing, Tokens

_DOCUMENTS_AT_ONCE = 64


class PackedStream(torch.utils.data.IterableDataset):
    """Endless blocks of a stream of documents.

    Args:
        documents: A stream with the column `text`; read again from its start when it ends.
        framing: Makes tokens of documents and blocks of tokens.
        batch_size: Blocks in a batch.
        window: Blocks in a window.
        seed: Of the order inside the windows.
        places: Folder for the lines that say where windows begin; none are kept if None.
    """

    def __init__(
        self,
        documents: datasets.IterableDataset,
        framing: Framing,
        *,
        batch_size: int,
        window: int,
        seed: int,
        places: Path | None = None,
    ) -> None:
        self.documents = documents
        self.framing = framing
        self.batch_size = batch_size
        self.window = window
        self.seed = seed
        self.places = places
        self.start = 0

    def resume(self, num_batches: int) -> None:
        """Begin behind the first `num_batches` batches, of all workers together."""
        self.start = num_batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers, worker = (1, 0) if info is None else (info.num_workers, info.id)
        # Batch i is of worker i mod workers, but a loader asks its worker 0 first, whatever the first batch is.
        worker = (worker + self.start) % workers
        taken = len(range(worker, self.start, workers)) * self.batch_size
        first, skipped = divmod(taken, self.window)
        place = self._find(first, worker, workers) if first else None
        reader = _Reader(self.documents, self.framing, place, worker, workers)
        for number in itertools.count(first):
            ahead = number * self.window - reader.count
            for _ in range(ahead):  # of the window before, from the same documents
                next(reader)
            blocks = [next(reader)]
            if number > first or place is None:
                self._note(number, worker, workers, reader.place)
            blocks += itertools.islice(reader, self.window - 1)
            for position, block in enumerate(blocks):
                block["block"] = (number * self.window + position) * workers + worker
            order = torch.Generator().manual_seed((self.seed * 1_000_003 + worker) * 1_000_003 + number)
            for i in torch.randperm(self.window, generator=order)[skipped:].tolist():
                yield blocks[i]
            skipped = 0

    def _path(self, worker: int) -> Path:
        assert self.places is not None
        return self.places / f"worker-{worker}.jsonl"

    def _note(self, number: int, worker: int, workers: int, place: dict[str, Any]) -> None:
        if self.places is not None:
            self.places.mkdir(parents=True, exist_ok=True)
            with self._path(worker).open("a") as file:
                file.write(json.dumps({"number": number, "size": self.window, "workers": workers, **place}) + "\n")

    def _find(self, number: int, worker: int, workers: int) -> dict[str, Any]:
        if self.places is None or not self._path(worker).exists():
            raise ValueError(f"a stream can only be resumed with the folder of its places, got {self.places}")
        for line in reversed(self._path(worker).read_text().splitlines()):
            try:
                place = json.loads(line)
            except ValueError:
                continue  # the run was killed while it wrote
            for option, now in (("shuffle_blocks", self.window), ("dataloader_num_workers", workers)):
                was = place["size" if option == "shuffle_blocks" else "workers"]
                if was != now:
                    raise ValueError(f"{option} must be {was} as in the run that is resumed, got {now}")
            if place["number"] == number:
                return place
        raise ValueError(f"the place of window {number} is not in {self._path(worker)}: was the run of this folder?")


def _all_rows(documents: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    """All rows, also inside a worker, where `datasets` would give each worker files of its own and some none.

    It looks for a worker when the first row is asked for.
    """
    rows, look = iter(documents), torch.utils.data.get_worker_info
    torch.utils.data.get_worker_info = lambda: None
    try:
        first = list(itertools.islice(rows, 1))
    finally:
        torch.utils.data.get_worker_info = look
    return itertools.chain(first, rows)


class _Reader:
    """Blocks in the order of their documents; `place` says how to come to those that are read next.

    Of several workers each tokenizes every so-manieth document.
    """

    def __init__(
        self,
        documents: datasets.IterableDataset,
        framing: Framing,
        place: dict[str, Any] | None,
        worker: int,
        workers: int,
    ) -> None:
        begin = {"documents": None, "document": 0, "count": 0, "rest": asdict(Tokens())}
        self.place = begin if place is None else {name: place[name] for name in begin}
        self.count = self.place["count"]  # blocks read so far
        self._blocks = self._read(documents, framing, worker, workers)

    def __iter__(self) -> "_Reader":
        return self

    def __next__(self) -> dict[str, Any]:
        block = next(self._blocks)
        self.count += 1
        return block

    def _read(
        self, documents: datasets.IterableDataset, framing: Framing, worker: int, workers: int
    ) -> Iterator[dict[str, Any]]:
        state, number, rest = self.place["documents"], self.place["document"], Tokens(**self.place["rest"])
        while True:  # one pass after another
            stream = copy.deepcopy(documents)  # a state, once loaded, is where all passes would begin
            if state is not None:
                stream.load_state_dict(state)
            rows, empty = _all_rows(stream), state is None
            while batch := list(itertools.islice(rows, _DOCUMENTS_AT_ONCE * workers)):
                empty = False
                self.place = {"documents": state, "document": number, "count": self.count, "rest": asdict(rest)}
                mine = [row["text"] for i, row in enumerate(batch, number) if i % workers == worker]
                blocks, rest = framing.blocks(rest + framing.encode(mine))
                state, number = stream.state_dict(), number + len(batch)
                yield from blocks
            if empty:
                raise ValueError("the text holds no documents to train on")
            state = None
