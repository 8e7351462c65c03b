"""What a store, its packs and its dictionaries take of disk and memory, in bytes and from formulas; no number is measured here."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from harvest.planning.estimate import volume_of
from harvest.planning.plan import Outline
from harvest.planning.volume import Volume, part_bytes, pinned_bytes
from harvest.staging import batch_of, slot_bytes, slots_of, stored_in
from store.format import StoreMeta, array_specs
from store.packing.budget import COMMIT_ENTRY
from store.packing.shard import row_bytes
from store.reader import COMMITS_KEPT
from store.sites import Site

EXPANSION, TIME_EMBEDDING, BATCH = 16, 256, 4096
"""of the recipe of record: features for each channel, width of the embedding of sigma, rows a step"""
TRAIN_SHARE = 0.95
"""of the prompts; the others are val"""
PACK_MEMORY = 2 * 10**9
"""`store pack --memory`, by default"""
STEP_ENTRY, STEP_CHANNEL = 4.2, 56
"""bytes for each entry of the (row, feature) matrix and for each channel of a row while a relu dictionary takes a step
(measured: `train.memory`)"""


@dataclass(frozen=True)
class Reserve:
    """A harvest of so many prompts, and what follows from it."""

    outline: Outline
    prompts: int

    @cached_property
    def meta(self) -> StoreMeta:
        """Of a store of so many prompts."""
        return replace(self.outline.meta, n_images=self.prompts * self.outline.meta.seeds_per_prompt)

    @cached_property
    def volume(self) -> Volume:
        """The files of the store."""
        return volume_of(replace(self.outline, meta=self.meta))

    @cached_property
    def by_kind(self) -> dict[str, int]:
        """Bytes of the store by kind."""
        return {str(kind): size for kind, size in self.volume.by_kind(self.meta.n_parts, True).items()}

    @property
    def store(self) -> int:
        """Bytes of the store."""
        return sum(self.by_kind.values())

    @property
    def inodes(self) -> int:
        """Files and folders of the store."""
        parts = self.meta.n_parts
        return self.volume.files(parts, True) + self.volume.folders + self.volume.trace_folders(parts)

    def site_pack(self, site: Site) -> int:
        """Bytes of a site in the packs of both splits."""
        rows = self.meta.n_images * len(self.meta.steps) * self.meta.tokens[site.stream].kept
        return rows * row_bytes(site.stream, self.meta.points, self.meta.d_model, self.meta.carrier.logical)

    @property
    def packs(self) -> int:
        """Bytes of the packs of both splits."""
        return sum(map(self.site_pack, self.meta.site_objects))

    @property
    def scratch(self) -> int:
        """Bytes of the scratch files of one site, while it is packed; 0 where the largest site fits into the pack's memory."""
        largest = round(TRAIN_SHARE * max(map(self.site_pack, self.meta.site_objects)))
        return 0 if largest <= PACK_MEMORY else largest

    @property
    def dictionaries(self) -> int:
        """Bytes of one dictionary a site, and of the state of one that is trained, twice: it is replaced when the next is written."""
        parameters = parameters_of(self.meta.d_model)
        return 4 * parameters * len(self.meta.sites) + 2 * 12 * parameters

    @property
    def pack_knows(self) -> int:
        """Bytes that a pack holds of rows and commits, beside what it moves: it grows with the images."""
        meta, arrays = self.meta, sum(1 for _ in array_specs(self.meta))
        an_image = 0
        for stream in meta.streams:
            counted = stream != "img" and meta.tokens[stream].policy != "all"
            kinds = {"img": 0, "txt": 2, "joint": 3}[stream]
            an_image += 8 + len(meta.steps) * (4 + 4 * kinds + 8 * counted) + 8 * len(meta.steps) // meta.chunk_images
        commits = min(COMMITS_KEPT, meta.n_parts) * arrays * COMMIT_ENTRY + meta.n_parts * arrays * 4
        return round(TRAIN_SHARE * meta.n_images * an_image) + commits

    @property
    def text_places(self) -> int:
        """Places of text that the transformer is given."""
        return self.outline.geometry.family.text_before + self.meta.max_sequence_length

    def embeddings(self, width: int, pooled: int) -> int:
        """Bytes of the text embeddings of all prompts (`--text-encoders first`)."""
        return self.prompts * (self.text_places * width + pooled) * np.dtype(_carried(self.meta.dtype)).itemsize


def _carried(dtype: str) -> str:
    return {"bfloat16": "uint16"}.get(dtype, dtype)


def parameters_of(d_model: int) -> int:
    """Parameters of a transcoder of the recipe of record: encoder and decoder, and what conditions it on sigma."""
    features, width = EXPANSION * d_model, TIME_EMBEDDING
    return 2 * features * d_model + features + d_model + 2 * (width * width + width) + 2 * d_model * (width + 1)


def training_bytes(d_model: int) -> int:
    """Bytes that a device holds while one such dictionary takes a step of 4,096 rows."""
    parameters, features = parameters_of(d_model), EXPANSION * d_model
    changing = 4 * parameters + 4 * d_model * features
    return 12 * parameters + changing + round(STEP_ENTRY * BATCH * features) + STEP_CHANNEL * BATCH * d_model


def host_parts(meta: StoreMeta) -> int:
    """Bytes of two parts: one that is drawn, one that is written."""
    return 2 * part_bytes(meta)


def staging_on_device(meta: StoreMeta) -> int:
    """Bytes of the slots of staging on a CUDA device: in the dtype that is computed in, and converted where the store's differs."""
    slot, narrow = slot_bytes(meta), _stored(meta)
    return slots_of(meta) * (slot + (narrow if _converts(meta) else 0))


def staging_on_host(meta: StoreMeta, cuda: bool) -> int:
    """Bytes on the host: for CUDA the slots, pinned, in the store's dtype; on a CPU rows of one site that are chosen and converted."""
    return pinned_bytes(meta) if cuda else converting_bytes(meta)


def converting_bytes(meta: StoreMeta) -> int:
    """Bytes that a hook holds on a CPU: the kept rows of the largest site, as computed, and in float32 for the rounding errors."""
    rows = max(meta.tokens[site.stream].kept for site in meta.site_objects) * batch_of(meta)
    return rows * meta.d_model * (np.dtype(_carried(meta.dtype)).itemsize + 4)


def _converts(meta: StoreMeta) -> bool:
    return str(stored_in(meta)).removeprefix("torch.") != meta.dtype


def _stored(meta: StoreMeta) -> int:
    """A slot in the dtype that values are handed to the store in."""
    computed = np.dtype(_carried(meta.dtype)).itemsize
    return slot_bytes(meta) * stored_in(meta).itemsize // computed
