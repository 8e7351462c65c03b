"""Which features of two dictionaries or steps belong together: by decoder cosine, and by the images on which they fire.

1. Both sides share their images.  Only features that are alive are compared.
2. A block of features of one side is held against one block after another of the other side; a tile of the three measures is a
   product of two matrices each:
       cosine        of the decoder directions
       correlation   Pearson's, of the scores S over the images
       jaccard       images on which both are active, over images on which at least one is
3. Of each tile the best `most` columns of each row are kept for each measure, with the other two measures of the same pairs, and for
   each column its best row.

Beside the two decoders, what is held is bounded by `memory`; 49,152 x 49,152 features over 10,000 images are 110 TFLOP.

The best of thousands of matches is high by chance alone, most of all among features that fire on few images or on nearly all.
`best_by_chance` says how high: it matches once more, after the images of one side were put in another order.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from analyze.compare.directions import chance_cosine, device_of_work, unit_directions
from analyze.compare.ranked import BELOW, NOTHING, best_first, columns_of, packed, rounded, values_of
from analyze.inputs import Subject
from analyze.scoring.matrices import ScoreMatrix
from store.errors import UsageError
from store.sites import Stream
from store.sizes import human_size
from store.strata import Group

Measure = Literal["cosine", "correlation", "jaccard"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
LARGEST = (4096, 1024)
"""features of the one and the other side at once, at most"""
LEAST = 16
"""and at least: smaller products would take for ever"""
COLUMN_BYTES = 16
"""a score in memory: as read, standardised, active, and once more while it is made"""
TILE_BYTES = 60
"""an entry of a tile: three measures in float32, their stack, and the keys of one while they are ranked"""
READ = 2048
"""features that one read of a matrix takes at once"""
KIND_NAMES: dict[Group, str] = {"image": "image tokens", "real": "text tokens", "padding": "text tokens"}
CHANCE_FEATURES = 512
"""of each side that chance is measured with, at most: their median is good to about a twentieth of their spread"""


@dataclass(frozen=True)
class Side:
    """A dictionary at a step, as it is compared: its scores and the features that are alive."""

    subject: Subject
    step: int
    matrix: ScoreMatrix
    features: Int[np.ndarray, " alive"]
    kinds: tuple[Group, ...] = ("all",)
    """the tokens that count: of a joint site that is held against img those of the image, against txt those of the text"""

    def scores(self, features: slice | int) -> Float[np.ndarray, "..."]:
        """The largest activations of features over the tokens that count: (image, feature), or (image,) for one feature."""
        found = [self.matrix.scores(features, kind) for kind in self.kinds]
        return np.asarray(np.maximum.reduce(found))

    def beside(self, other: "Side") -> "Side":
        """This side as it is held against another: over the same tokens, as far as both sites have them."""
        streams = (self.subject.site.stream, other.subject.site.stream)
        wanted: tuple[Group, ...] = {"img": ("image",), "txt": ("real", "padding")}.get(streams[1], ())  # type: ignore[assignment]
        kinds = tuple(kind for kind in wanted if kind in self.matrix.kinds)
        if streams[0] != "joint" or not kinds:
            return self
        table = self.matrix.features()
        active = np.sum([table[f"images_active_{kind}"].to_numpy() for kind in kinds], axis=0)[self.features]
        return replace(self, features=self.features[active > 0], kinds=kinds)

    @property
    def stream(self) -> Stream:
        """The stream whose tokens count: of a joint site that is held against img or txt, that one."""
        if self.kinds == ("all",):
            return self.subject.site.stream
        return "img" if self.kinds == ("image",) else "txt"

    @property
    def note(self) -> str | None:
        """By which of its tokens it is compared, where not by all."""
        if self.kinds == ("all",):
            return None
        return f"{self.name} is compared by its {KIND_NAMES[self.kinds[0]]}, which both sites have"

    @property
    def name(self) -> str:
        """`img_3@1`"""
        return f"{self.subject.name}@{self.step}"

    @property
    def d_model(self) -> int:
        """The width of what its features write."""
        return int(self.subject.outline.config.d_model)


@dataclass(frozen=True)
class Matches:
    """The best matches of every live feature of one side, for each measure (the first axis, in the order of MEASURES)."""

    features: Int[np.ndarray, " alive"]
    match: Int[np.ndarray, "measure alive rank"]
    """features of the other side, best first; -1 where there are no more"""
    values: Float[np.ndarray, "measure alive rank measured"]
    """all three measures of those pairs; NaN where there are no more"""
    others: Int[np.ndarray, " other"]
    best_of_other: Int[np.ndarray, "measure other"]
    """for each live feature of the other side, the feature of this side that is its best match"""
    value_of_other: Float[np.ndarray, "measure other"]

    @cached_property
    def mutual(self) -> np.ndarray:
        """bool (measure, alive, rank): whether the match's own best match is the feature itself."""
        place = np.searchsorted(self.others, np.maximum(self.match, 0))
        back = np.stack(
            [best[np.minimum(where, len(best) - 1)] for best, where in zip(self.best_of_other, place, strict=True)]
        )
        return np.asarray((self.match >= 0) & (back == self.features[None, :, None]))


def same_decoder(of: Side, other: Side) -> bool:
    """Whether the sides are one dictionary at two steps: then every feature's own direction is its best match, at cosine 1."""
    return of.subject.identity == other.subject.identity and of.step != other.step


def same_side(of: Side, other: Side) -> bool:
    """Whether a side is held against itself."""
    return (of.subject.identity, of.step) == (other.subject.identity, other.step)


@torch.no_grad()
def match(of: Side, other: Side, most: int, active_above: float, memory: int) -> Matches:
    """The `most` best matches in `other` of each live feature of `of`; a feature is not matched with itself."""
    device = device_of_work()
    n_of, n_other, images = len(of.features), len(other.features), of.matrix.n_images
    keys = torch.full((len(MEASURES), n_of, most), NOTHING, dtype=torch.int64, device=device)
    values = torch.full((len(MEASURES), n_of, most, len(MEASURES)), torch.nan, device=device)
    back = torch.full((len(MEASURES), n_other), NOTHING, dtype=torch.int64, device=device)
    directions = [_directions_of(of, device), _directions_of(other, device)]
    same = same_side(of, other)
    size, width = block_sizes(images, memory)
    with tqdm(total=n_of * n_other, desc=f"{of.name} with {other.name}", unit="pair", unit_scale=True, mininterval=0.5,
              disable=n_of * n_other < 10**7, leave=False) as progress:  # fmt: skip
        for start in range(0, n_of, size):
            rows = slice(start, min(start + size, n_of))
            mine = _block(of, rows, active_above, device)
            for first in range(0, n_other, width):
                columns = slice(first, min(first + width, n_other))
                theirs = _block(other, columns, active_above, device)
                cosines = directions[0][:, rows].T @ directions[1][:, columns]
                tiles = [cosines, mine.correlation(theirs), mine.jaccard(theirs)]
                if same:
                    _without_itself(tiles, rows, columns)
                _keep(keys[:, rows], values[:, rows], back[:, columns], tiles, rows.start, columns.start)
                progress.update((rows.stop - rows.start) * (columns.stop - columns.start))
    places, backs = columns_of(keys).cpu().numpy(), columns_of(back).cpu().numpy()
    return Matches(
        of.features,
        np.where(places >= 0, other.features[np.maximum(places, 0)], -1).astype(np.int32),
        values.cpu().numpy(),
        other.features,
        np.where(backs >= 0, of.features[np.maximum(backs, 0)], -1).astype(np.int32),
        values_of(back).cpu().numpy(),
    )


def _without_itself(tiles: list[Float[Tensor, "row column"]], rows: slice, columns: slice) -> None:
    """Take a feature out of its own matches, in place."""
    device = tiles[0].device
    itself = torch.arange(rows.start, rows.stop, device=device)[:, None] == torch.arange(
        columns.start, columns.stop, device=device
    )
    for tile in tiles:
        tile.masked_fill_(itself, -torch.inf)


def _keep(
    keys: Int[Tensor, "measure row rank"],
    values: Float[Tensor, "measure row rank measured"],
    back: Int[Tensor, "measure column"],
    tiles: list[Float[Tensor, "row column"]],
    first_row: int,
    first_column: int,
) -> None:
    """Merge a tile into what is kept, in place."""
    rows, columns = tiles[0].shape
    row_numbers = torch.arange(first_row, first_row + rows, device=keys.device)
    column_numbers = torch.arange(first_column, first_column + columns, device=keys.device)
    most = keys.shape[2]
    for measure in range(len(MEASURES)):
        whole = rounded(tiles[measure])
        found, place = best_first(packed(whole, column_numbers), most)
        beside = torch.stack([tile.gather(1, place) for tile in tiles], dim=-1)
        beside = torch.where((found < BELOW)[..., None], torch.nan, beside)
        merged, place = best_first(torch.cat([keys[measure], found], dim=1), most)
        both = torch.cat([values[measure], beside], dim=1)
        values[measure] = both.gather(1, place[..., None].expand(-1, -1, both.shape[2]))
        keys[measure] = merged
        best = whole.max(dim=0)  # of equal ones the first
        back[measure] = torch.maximum(back[measure], packed(best.values, row_numbers[best.indices]))


@dataclass(frozen=True)
class _Block:
    """Some features over all images, ready for products."""

    standard: Float[Tensor, "image feature"]
    """scores less their mean, of length 1; 0 where a feature scores the same everywhere"""
    active: Float[Tensor, "image feature"]
    """1 where active, else 0"""
    count: Float[Tensor, " feature"]

    def correlation(self, other: "_Block") -> Float[Tensor, "row column"]:
        return self.standard.T @ other.standard

    def jaccard(self, other: "_Block") -> Float[Tensor, "row column"]:
        both = self.active.T @ other.active  # counts below 2**24 are exact
        either = (self.count[:, None] + other.count).sub_(both).clamp_(min=1)
        return both.div_(either)


def best_by_chance(of: Side, other: Side, active_above: float, memory: int, seed: int = 0) -> dict[Measure, float]:
    """The median over features of `of` of the best match in `other`, were nothing related: what `match` is to be judged against.

    Of cosines that of random directions.  Of correlation and Jaccard index, one match after the images of `of` were put in another
    order, drawn with `seed`: every feature keeps its scores, and loses what it shares with others.  Memory as in `match`.
    """
    candidates = len(other.features) - same_side(of, other)
    found: dict[Measure, float] = {"cosine": chance_cosine(candidates + 1, of.d_model)}
    shuffled = _best_of_shuffled(of, other, active_above, memory, np.random.default_rng(seed))
    return found | {name: float(np.median(best)) for name, best in zip(MEASURES[1:], shuffled, strict=True)}


@torch.no_grad()
def _best_of_shuffled(
    of: Side, other: Side, active_above: float, memory: int, random: np.random.Generator
) -> Float[np.ndarray, "2 some"]:
    """The best correlation and Jaccard index of some features of `of`, their images in another order, with those of `other`."""
    device, images = device_of_work(), of.matrix.n_images
    order = random.permutation(images)
    some = np.sort(random.permutation(of.features)[:CHANCE_FEATURES])
    size, width = block_sizes(images, memory)
    best = torch.full((2, len(some)), -torch.inf, device=device)
    for start in range(0, len(some), size):
        rows = slice(start, min(start + size, len(some)))
        mine = _prepared(_columns(of, some[rows])[order], active_above, device)
        for first in range(0, len(other.features), width):
            theirs = _block(other, slice(first, first + width), active_above, device)
            for place, tile in enumerate((mine.correlation(theirs), mine.jaccard(theirs))):
                best[place, rows] = torch.maximum(best[place, rows], tile.amax(dim=1))
    return np.asarray(best.cpu().numpy())


def _block(side: Side, span: slice, active_above: float, device: torch.device) -> _Block:
    chosen = side.features[span]
    return _prepared(_columns(side, chosen), active_above, device)


def _columns(side: Side, chosen: Int[np.ndarray, " chosen"]) -> Float[np.ndarray, "image chosen"]:
    """The scores of ascending features over all images, read span by span: few live features may be far apart."""
    found = np.empty((side.matrix.n_images, len(chosen)), np.float32)
    for span in np.unique(chosen // READ):
        here = np.flatnonzero(chosen // READ == span)
        low, high = int(chosen[here[0]]), int(chosen[here[-1]]) + 1
        found[:, here] = side.scores(slice(low, high))[:, chosen[here] - low]
    return found


def _prepared(scores: Float[np.ndarray, "image feature"], active_above: float, device: torch.device) -> _Block:
    raw = torch.from_numpy(scores).to(device)
    active = (raw > active_above).float()
    standard = raw - raw.mean(dim=0, dtype=torch.float64).float()
    length = torch.linalg.vector_norm(standard, dim=0, dtype=torch.float64).float()
    varies = raw.amax(dim=0) > raw.amin(dim=0)
    standard = torch.where(varies, standard / length.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    return _Block(standard, active, active.sum(dim=0))


def _directions_of(side: Side, device: torch.device) -> Float[Tensor, "d_model alive"]:
    directions = unit_directions(side.subject.dictionary)
    if len(side.features) == directions.shape[1]:
        return directions
    return directions[:, torch.from_numpy(np.asarray(side.features, np.int64)).to(device)]


def block_sizes(images: int, memory: int) -> tuple[int, int]:
    """Features of the one and the other side at once, so that both blocks and their tile stay within `memory` bytes.

    `UsageError` when not even small blocks do.
    """
    column = COLUMN_BYTES * images
    width = min(memory // 4 // column, LARGEST[1])
    rows = min((memory - width * column) // (column + width * TILE_BYTES), LARGEST[0])
    if min(rows, width) < LEAST:
        least = 4 * LEAST * (column + LEAST * TILE_BYTES)
        raise UsageError(
            f"--memory {human_size(memory)} is too little to compare features over {images} images: give at least {human_size(least)}"
        )
    return rows, width


def correlations_with(matrix: ScoreMatrix, scores: Float[np.ndarray, " image"]) -> Float[np.ndarray, " feature"]:
    """Pearson's correlation over the images of every feature's scores with the given ones; 0 for features that never vary."""
    one = scores.astype(np.float64) - scores.astype(np.float64).mean()
    one /= max(float(np.linalg.norm(one)), 1e-300)
    found = np.zeros(matrix.n_features, np.float32)
    for block in matrix.blocks():
        read = matrix.scores(block).astype(np.float64)
        read -= read.mean(axis=0)
        length = np.linalg.norm(read, axis=0)
        found[block] = np.where(length > 1e-12, one @ read / np.maximum(length, 1e-300), 0.0)
    return found
