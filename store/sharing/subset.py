"""A part of a store that is a store: some sites, steps and images of it, with or without what the prompts say.

Chunks are copied as they are, under the numbers that they have in the new store; its metadata, commits and seal are its
own, and name the store that it was taken from.  Traces of the chosen images and steps come along, unless layers or streams
stay behind whose activations they need.  Equal selections of equal stores give equal bytes.  The selection of
everything is the store itself, with its seal.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy

from store import layout
from store.card import has_prompts
from store.errors import DamagedError
from store.files import json_bytes, parse_self_checked, self_checked, sha256_bytes
from store.format import StoreMeta, chunk_file, metadata_files, numbered_files, part_name
from store.metadata import documents
from store.reader import Store
from store.sharing.cargo import Batch, Cargo, File
from store.sharing.selection import Selection
from store.sites import POINTS
from store.strata import OPTIONAL_COLUMNS
from store.tables import table_bytes
from store.traces import TRACE_STREAMS, in_activations, parse_trace_file, trace_file, trace_files

KEPT_WITHOUT_PROMPTS = ("image", "seed", "split", "text_length", "sigma", "scheduler_sigma")
"""columns of the prompt table that say nothing of what was asked for"""


class Subset(Cargo):
    """A store, or a part of it, as files to be copied: batch 0 is its metadata, batch p + 1 its part p."""

    replaces = True

    def __init__(self, store: Store, selection: Selection) -> None:
        self.store, self.selection, self.source = store, selection, store.place
        prompts = selection.prompts or not (has_prompts(store.meta) or store.meta.pictures != "none")
        self.whole = (selection.sites, selection.steps, selection.images) == (
            store.sites, store.steps, range(store.n_images)
        ) and prompts  # fmt: skip
        self.meta = store.meta if self.whole else _meta(store, selection)
        self.name = f"store {store.id}" if self.whole else f"a part of store {store.id}"
        self.n_batches = 1 + self.meta.n_parts
        self._first_part = selection.images.start // store.chunk_images
        self._commits: dict[str, str] = {}
        self._created = self._creation()

    @property
    def traces_left(self) -> str | None:
        """What is traced at the source and does not come along at all, in words; None where some or all of it does, or nothing is."""
        traced = self.store.traced
        return traced.text() if traced is not None and self.meta.traced is None else None

    def batch(self, batch: int) -> Batch:
        """Metadata and weights with `commits/store.json`, or the files of a part with its commit."""
        if batch == 0:
            return self._created
        part = batch - 1
        commit = self.store.commit(self._first_part + part)
        if self.whole:
            files = [File(name, entry["bytes"], entry["sha256"], name) for name, entry in commit["files"].items()]
            content = commit
        else:
            files = [self._file(name, source, commit) for name, source in self._names(part).items()]
            content = self._commit(part, commit, files)
        closing = File.of(layout.part_commit(part), json_bytes(content))
        self._commits[part_name(part)] = closing.sha256
        return Batch(tuple(files), closing)

    def sizes(self, batch: int) -> tuple[int, int]:
        """Bytes and files of a batch; those of tables as they are at the source."""
        if batch == 0:
            return sum(file.length for file in self._created.all), len(self._created.all)
        commit = self.store.commit(self._first_part + batch - 1)
        sources = list(commit["files"] if self.whole else self._names(batch - 1).values())
        closing = len(json_bytes(commit)) * len(sources) // len(commit["files"])
        return sum(commit["files"][name]["bytes"] for name in sources) + closing, len(sources) + 1

    def first(self) -> File:
        """`zarr.json`: whatever else says of itself that it is another store."""
        return next(file for file in self._created.files if file.name == layout.ROOT)

    def last(self) -> tuple[File, ...]:
        """The seal."""
        assert self._created.closing is not None
        for batch in range(1, self.n_batches):
            if part_name(batch - 1) not in self._commits:
                self.batch(batch)
        seal = self_checked({"commits": {"store": self._created.closing.sha256, **self._commits}})
        self.name = f"store sha256-{seal['sha256']}"
        return (File.of(layout.SEAL, json_bytes(seal)),)

    def _creation(self) -> Batch:
        record = self._record()
        if self.whole:
            files = [File(name, entry["bytes"], entry["sha256"], name) for name, entry in record["files"].items()]
            return Batch(tuple(files), File.of(layout.STORE_COMMIT, json_bytes(record)))
        files = [File.of(name, content) for name, content in documents(self.meta).items()]
        names = [f"weights/{name}" for name in self.meta.weights_held]
        files += [File(name, record["files"][name]["bytes"], record["files"][name]["sha256"], name) for name in names]
        entries = {file.name: {"bytes": file.length, "sha256": file.sha256} for file in files}
        content = {"files": dict(sorted(entries.items())), "origin": self.meta.origin, "parts": self.meta.n_parts}
        return Batch(tuple(files), File.of(layout.STORE_COMMIT, json_bytes(self_checked(content))))

    def _record(self) -> dict[str, Any]:
        """The source's record of its creation, which opening has checked against the seal.

        `DamagedError` when it names anything but what a store has: a name from elsewhere must not lead out of the target.
        """
        where, meta = self.source.where(layout.STORE_COMMIT), self.store.meta
        record = parse_self_checked(self.source.read(layout.STORE_COMMIT), where)
        weights = set(meta.weights_held)
        odd = set(record["files"]) ^ {*metadata_files(meta), *(f"weights/{name}" for name in weights)}
        odd |= {name for name in weights if not re.fullmatch(r"sha256-[0-9a-z-]+\.safetensors", name)}
        if odd:
            raise DamagedError(f"{where} does not list the files of such a store: missing or unknown: {sorted(odd)}")
        return record

    def _names(self, part: int) -> dict[str, str]:
        """The files of a part of the new store, and which ones of the source they come from."""
        there, images = self._first_part + part, self.meta.part_images(part)
        names = {name: _renumbered(name, part, there) for name in numbered_files(self.meta, part)}
        for name in trace_files(self.meta, images):
            image, step, block = parse_trace_file(name) or (0, 0, 0)
            names[name] = trace_file(image + self.selection.images.start, step, block)
        return names

    def _file(self, name: str, source: str, commit: Mapping[str, Any]) -> File:
        """A file of a part: copied as it is, but for tables that name other images or columns, and for statistics."""
        entry, folder = commit["files"][source], name.split("/")[0]
        renumbered = self.selection.images.start > 0
        if folder == "prompts" and (renumbered or not self.selection.prompts):
            return File.of(name, table_bytes(self._prompts(self._table(source, entry))))
        if folder == "images" and renumbered:
            return File.of(name, table_bytes(self._pictures(self._table(source, entry))))
        if folder == "statistics" and (self.meta.sites, self.meta.steps) != (
            self.store.meta.sites,
            self.store.meta.steps,
        ):
            tensors = safetensors.numpy.load(self._read(source, entry))
            wanted = {f"{site}/step.{step}" for site in self.meta.sites for step in self.meta.steps}
            return File.of(
                name, safetensors.numpy.save({k: v for k, v in tensors.items() if k.rsplit("/", 2)[0] in wanted})
            )
        return File(name, entry["bytes"], entry["sha256"], source)

    def _commit(self, part: int, commit: Mapping[str, Any], files: list[File]) -> dict[str, Any]:
        """The commit of a part of the new store, in the words of the source's."""
        images = self.meta.part_images(part)
        figures = {
            site: {str(step): commit["statistics"][site][str(step)] for step in self.meta.steps}
            for site in self.meta.sites
        }
        entries = {
            file.name: dict(commit["files"][file.source])
            if isinstance(file.source, str)
            else {"bytes": file.length, "sha256": file.sha256}
            for file in files
        }
        own = {"part": part, "images": [images.start, images.stop], "origin": self.meta.origin}
        return self_checked({**commit, **own, "files": entries, "statistics": figures})

    def _prompts(self, table: pa.Table) -> pa.Table:
        if not self.selection.prompts:
            kept = {*KEPT_WITHOUT_PROMPTS, *OPTIONAL_COLUMNS}
            table = table.select([name for name in table.column_names if name in kept])
        return self._shifted(table, "image")

    def _pictures(self, table: pa.Table) -> pa.Table:
        table = self._shifted(table, "id")
        ids, field = table.column("id").to_pylist(), table.schema.field("image")
        rows = [
            {**row, "path": f"{i:06d}.{self.meta.pictures}"}
            for i, row in zip(ids, table.column("image").to_pylist(), strict=True)
        ]
        return table.set_column(table.schema.get_field_index("image"), field, pa.array(rows, field.type))

    def _shifted(self, table: pa.Table, column: str) -> pa.Table:
        """The table with its images counted from the first that was selected."""
        index = table.schema.get_field_index(column)
        numbers = [number - self.selection.images.start for number in table.column(column).to_pylist()]
        return table.set_column(index, table.schema.field(column), pa.array(numbers, pa.int64()))

    def _table(self, name: str, entry: Mapping[str, Any]) -> pa.Table:
        data = pa.BufferReader(self._read(name, entry))  # not read_table: its threads can abort an ending process
        return pq.ParquetFile(data, pre_buffer=False).read(use_threads=False)

    def _read(self, name: str, entry: Mapping[str, Any]) -> bytes:
        data = self.source.read(name)
        if len(data) != entry["bytes"] or sha256_bytes(data) != entry["sha256"]:
            raise DamagedError(
                f"{self.source.where(name)} differs from its committed checksum: python -m store verify {self.source}"
            )
        return data


def _renumbered(name: str, part: int, there: int) -> str:
    """The name of a part's file, with the number of another part."""
    folder, _, last = name.rpartition("/")
    if last.startswith("c."):
        return chunk_file(folder, there)
    return f"{folder}/{last.replace(part_name(part), part_name(there))}"


def _meta(store: Store, selection: Selection) -> StoreMeta:
    """What the new store says about itself."""
    meta, images = store.meta, selection.images
    sites = tuple(map(str, selection.sites))
    weights = dict(meta.weights)
    if "files" in weights:
        weights["files"] = {site: file for site, file in weights["files"].items() if site in sites}
    parent = {
        "store": store.id,
        "origin": store.origin,
        "images": [images.start, images.stop],
        "prompts": selection.prompts and has_prompts(meta),
    }
    if meta.parent is not None:
        parent["parent"] = meta.parent
    streams = {site.stream for site in selection.sites}
    chosen = replace(
        meta,
        traces=None,
        n_images=len(images),
        sites=sites,
        steps=selection.steps,
        tokens={stream: tokens for stream, tokens in meta.tokens.items() if stream in streams},
        pictures=meta.pictures if selection.prompts else "none",
        weights=weights,
        parent=parent,
    )
    chosen = replace(chosen, traces=_traces(meta, chosen, images))
    return StoreMeta.from_attributes(json.loads(json_bytes(chosen.attributes())), store.path)


def _traces(meta: StoreMeta, chosen: StoreMeta, images: range) -> dict[str, Any] | None:
    """The traces of the chosen images and steps; None where there are none, or where what they need of the activations stays behind."""
    if meta.traced is None:
        return None
    here = tuple(image - images.start for image in meta.traced.images if image in images)
    steps = tuple(step for step in meta.traced.steps if step in chosen.steps)
    if not here or not steps:
        return None
    traces = replace(meta.traced, images=here, steps=steps).attributes()
    found = replace(chosen, traces=traces)
    needed = ((block, stream, point) for block in meta.traced.blocks for stream in TRACE_STREAMS for point in POINTS)
    return traces if all(in_activations(found, *each) == in_activations(meta, *each) for each in needed) else None
