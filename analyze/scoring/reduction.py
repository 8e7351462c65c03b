"""What is kept of the activations of some features on a block of images: maxima and their tokens, statistics, top words.

z (row, feature) is looked at block by block while it lies in the cache.  The maximum of each image is one vectorised pass, the
rest is made of a list of the active entries: beside a product of 16 ns an entry (d_model 512, one core of a Xeon), 2 ns where 5 % are
active and 7 where half of them are.  On a GPU all are dense passes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyze.scoring.kinds import KindStatistics, overall
from analyze.scoring.statistics import HISTOGRAM_BINS, RowStatistics, histogram_bins
from analyze.scoring.top import TopWords
from store.strata import Group

LOOKED_AT = 1 << 17
"""entries of z whose active ones are listed at once: the lists stay in the cache, which makes them three times as quick"""


@dataclass(frozen=True)
class RowBlock:
    """Which images some consecutive rows belong to, and which tokens they are."""

    rows: slice
    """where they lie among the rows that were read"""
    starts: Int[np.ndarray, " segment"]
    """first row, counted from the block's, of each segment: the rows of one image"""
    images: Int[np.ndarray, " segment"]
    """the image of each segment, counted from the first of the block of images"""
    position: Int[np.ndarray, " row"]
    piece: Int[np.ndarray, " row"] | None
    """number of the text piece, -1 for none"""
    alike: bool
    """whether all segments have equally many rows"""

    @property
    def count(self) -> int:
        """How many rows there are."""
        return len(self.position)

    def segment_of_row(self) -> Int[np.ndarray, " row"]:
        """The number of each row's segment."""
        return np.repeat(np.arange(len(self.starts)), np.diff(self.starts, append=self.count))


def row_blocks(
    owner: Int[np.ndarray, " row"],
    position: Int[np.ndarray, " row"],
    piece: Int[np.ndarray, " row"] | None,
    size: int,
) -> list[RowBlock]:
    """Rows, ordered by their image `owner`, in blocks of at most `size`; of whole images where all have equally many."""
    if not len(owner):
        return []
    tokens = np.bincount(owner)
    tokens = tokens[tokens > 0]
    if tokens.min() == tokens.max() <= size:
        size = size // int(tokens[0]) * int(tokens[0])
    found = []
    for first in range(0, len(owner), size):
        rows = slice(first, min(first + size, len(owner)))
        mine = owner[rows]
        starts = np.concatenate(([0], np.flatnonzero(np.diff(mine)) + 1))
        pieces, sizes = None if piece is None else piece[rows], np.diff(starts, append=len(mine))
        found.append(RowBlock(rows, starts, mine[starts], position[rows], pieces, bool((sizes == sizes[0]).all())))
    return found


class Pane:
    """The activations of some features on one block of images."""

    def __init__(
        self,
        n_images: int,
        n_features: int,
        above: float,
        words: int | None,
        refuse: Callable[[Tensor], None],
        kinds: tuple[Group, ...] = ("all",),
    ) -> None:
        """`words`: how many text pieces to keep of each feature, None for no text; `refuse` what is NaN or infinite.

        With several `kinds` the segments' `images` are numbers of (image, kind), and `kinds` keeps figures of each.
        """
        self.above, self._refuse = above, refuse
        self.scores = np.full((n_images * len(kinds), n_features), -np.inf, np.float32)
        self.tokens = np.full((n_images * len(kinds), n_features), -1, np.int32)
        self.kinds = KindStatistics(kinds, n_features) if len(kinds) > 1 else None
        self.by_kind: dict[Group, np.ndarray] = {}
        """kind -> its maxima (image, feature), when all is done; empty where no kinds are told apart"""
        self.image_tokens: np.ndarray | None = None
        """(image, feature) the tokens of the maxima among image tokens, likewise; None where no kinds are told apart"""
        self.rows = RowStatistics(n_features)
        self.words = None if words is None else TopWords(n_features, words)

    def add(self, z: Float[Tensor, "row feature"], block: RowBlock) -> None:
        """Look at a block of activations; one that is NaN or infinite is found among the maxima."""
        best = maxima(z, block)
        self._refuse(best)
        self._count(block)
        if z.device.type != "cpu":
            self._dense(z, block, best)
            return
        values, maximum, width = z.numpy(), best.numpy(), z.shape[1]
        tokens, size = _first_tokens(block, width), max(LOOKED_AT // width, 1)
        for first in reversed(range(0, len(values), size)):  # backwards: the first row of equals has the last word
            some = values[first : first + size]
            place = np.flatnonzero(some > 0)
            if width & (width - 1):
                row, feature = np.divmod(place, width)
            else:
                row, feature = place >> (width.bit_length() - 1), place & (width - 1)
            row += first
            self._entries(row, feature, some.reshape(-1)[place], block, maximum, tokens)
        self._better(block, maximum, tokens)

    def add_entries(
        self,
        row: Int[np.ndarray, " entry"],
        feature: Int[np.ndarray, " entry"],
        value: Float[np.ndarray, " entry"],
        block: RowBlock,
    ) -> None:
        """The same from all entries that are not zero, by rows."""
        n_features = self.scores.shape[1]
        place = torch.from_numpy(block.segment_of_row()[row] * n_features + feature)
        flat = torch.zeros(len(block.starts) * n_features).scatter_reduce_(0, place, torch.from_numpy(value), "amax")
        best, tokens = flat.numpy().reshape(-1, n_features), _first_tokens(block, n_features)
        self._count(block)
        self._entries(row, feature, value, block, best, tokens)
        self._better(block, best, tokens)

    def _count(self, block: RowBlock) -> None:
        self.rows.rows += block.count
        if self.kinds is not None:
            self.kinds.add_rows(self._kind_of_row(block))

    def _kind_of_row(self, block: RowBlock) -> Int[np.ndarray, " row"]:
        assert self.kinds is not None
        return np.asarray((block.images % len(self.kinds.kinds))[block.segment_of_row()])

    def _entries(
        self,
        row: np.ndarray,
        feature: np.ndarray,
        value: np.ndarray,
        block: RowBlock,
        best: np.ndarray,
        tokens: np.ndarray,
    ) -> None:
        """Count active entries, by rows; note in `tokens` where those lie that are the best of their segment."""
        segment = None if len(block.starts) == 1 else block.segment_of_row()[row]
        place = feature if segment is None else segment * best.shape[1] + feature
        hits = np.flatnonzero(value == best.reshape(-1)[place])[::-1]
        tokens.reshape(-1)[place[hits]] = block.position[row[hits]]
        if self.above > 0:
            active = value > self.above
            row, feature, value = row[active], feature[active], value[active]
        self.rows.add_active(feature, value)
        if self.kinds is not None:
            self.kinds.add_active(self._kind_of_row(block)[row], feature, value)
        if self.words is not None and block.piece is not None:
            piece = block.piece[row]
            real = piece >= 0
            self.words.add(feature[real], piece[real], value[real])

    def _dense(self, z: Tensor, block: RowBlock, best: Tensor) -> None:
        first = _first_rows(z, block, best).cpu().numpy() + block.starts[:, None]
        self._better(block, best.cpu().numpy(), block.position[first])
        n_features = z.shape[1]
        active = z > self.above
        kept = z * active if self.above > 0 else z
        bins = torch.where(active, histogram_bins(kept * kept), HISTOGRAM_BINS)
        code = bins.mul_(n_features).add_(torch.arange(n_features, dtype=torch.int32, device=z.device))
        counts = torch.bincount(code.flatten(), minlength=(HISTOGRAM_BINS + 1) * n_features)
        histogram = counts.view(-1, n_features)[:HISTOGRAM_BINS].T.cpu().numpy()
        exact = kept.double()
        total, squares = (each.sum(dim=0).cpu().numpy() for each in (exact, exact * exact))
        self.rows.add_sums(histogram, total, squares)
        if self.kinds is not None:
            of_row = torch.from_numpy(self._kind_of_row(block)).to(z.device)
            for kind in range(len(self.kinds.kinds)):
                mine = of_row == kind
                self.kinds.add_sums(kind, active[mine].sum(dim=0).cpu().numpy(), exact[mine].sum(dim=0).cpu().numpy())
        if self.words is not None and block.piece is not None:
            real = block.piece >= 0
            row, feature = np.nonzero(active.cpu().numpy() & real[:, None])
            self.words.add(feature, block.piece[row], z.cpu().numpy()[row, feature])

    def _better(self, block: RowBlock, best: np.ndarray, tokens: np.ndarray) -> None:
        """Take over maxima that exceed what earlier rows of the image had."""
        better = best > self.scores[block.images]
        self.scores[block.images] = np.where(better, best, self.scores[block.images])
        self.tokens[block.images] = np.where(better, tokens, self.tokens[block.images])

    def finish(self, rounded: Callable[[np.ndarray], np.ndarray] = lambda scores: scores) -> None:
        """Give images without a counted row the score 0; and no zero a sign, which JumpReLU leaves.

        Of several kinds the greatest is the image's; the figures of each kind are taken before that, of scores as they will be
        `rounded`.
        """
        if self.kinds is not None:
            found = rounded(np.where(np.isneginf(self.scores), 0, self.scores)) + 0
            self.kinds.take_images(found, self.above)
            count = len(self.kinds.kinds)
            self.by_kind = {kind: found[place::count] for place, kind in enumerate(self.kinds.kinds)}
            self.image_tokens = self.tokens[self.kinds.kinds.index("image") :: count]
            self.scores, self.tokens = overall(self.scores, self.tokens, len(self.kinds.kinds))
        self.scores[np.isneginf(self.scores)] = 0
        self.scores += 0


def maxima(z: Float[Tensor, "row feature"], block: RowBlock) -> Float[Tensor, "segment feature"]:
    """The greatest activation of each feature on each segment; NaN where one is."""
    if block.alike:
        return z.view(len(block.starts), -1, z.shape[1]).amax(dim=1)
    ends = [*block.starts[1:].tolist(), block.count]
    return torch.stack([z[low:high].amax(dim=0) for low, high in zip(block.starts.tolist(), ends, strict=True)])


def _first_tokens(block: RowBlock, n_features: int) -> Int[np.ndarray, "segment feature"]:
    """The first token of each segment, for every feature: where a maximum of 0 is found."""
    return np.repeat(block.position[block.starts].astype(np.int32)[:, None], n_features, axis=1)


def _first_rows(z: Tensor, block: RowBlock, best: Tensor) -> Tensor:
    """For each segment and feature, the first row, counted from the segment's, that has the maximum: (segment, feature) int64."""
    if block.alike:
        return _first(z.view(len(block.starts), -1, z.shape[1]), best)
    ends = [*block.starts[1:].tolist(), block.count]
    spans = zip(block.starts.tolist(), ends, strict=True)
    return torch.cat([_first(z[None, low:high], best[None, i]) for i, (low, high) in enumerate(spans)])


def _first(z: Tensor, best: Tensor) -> Tensor:
    count = z.shape[1]
    back = torch.arange(count, 0, -1, dtype=z.dtype, device=z.device)[None, :, None]  # exact below 2**24 rows
    return count - (z == best[:, None]).to(z.dtype).mul_(back).amax(dim=1).long()
