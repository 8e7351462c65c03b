"""Activations as they are, without a dictionary: pooled over each image, and at labelled tokens, from one read of a site and step."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from analyze.counted import counted_chunks
from analyze.inputs import Analysis, sigmas
from analyze.truth.attributes import TokenLabels
from analyze.truth.choosing import Choice, empty_choice
from analyze.truth.judges import Judges
from analyze.truth.probes import best_channel, ridge_probe
from store.sites import Point, Site

POOLS = ("max", "min", "mean")


@dataclass(frozen=True)
class TokenRows:
    """The labelled tokens of one site and step, with what the MLP reads and writes there."""

    labels: TokenLabels
    sigma: Float[np.ndarray, " row"]
    points: dict[Point, Float[np.ndarray, "row d_model"]]


@dataclass(frozen=True)
class ImageRows:
    """The judged images of one site and step: maximum, minimum and mean over the counted tokens of every channel."""

    pooled: dict[tuple[Point, str], Float[np.ndarray, "image d_model"]]
    """zeros for an image of which no token counts"""

    def channel(self, column: int) -> str:
        """What a column of `channels` is: `mlp_in 12 max`."""
        place, channel = divmod(column, next(iter(self.pooled.values())).shape[1])
        point, pool = self._order()[place]
        return f"{point} {channel} {pool}"

    def channels(self) -> list[Float[np.ndarray, "image column"]]:
        """Every channel of every point, by its maximum and by its minimum: what a feature's S is compared with."""
        return [self.pooled[key] for key in self._order()]

    def probed(self) -> Float[np.ndarray, "image column"]:
        """What the probe reads: all that a channel is chosen from, and the means of the channels."""
        means = [self.pooled[key] for key in sorted(self.pooled) if key[1] == "mean"]
        return np.concatenate([*self.channels(), *means], axis=1)

    def _order(self) -> list[tuple[Point, str]]:
        points = sorted({point for point, _ in self.pooled})
        return [(point, pool) for point in points for pool in ("max", "min")]


def read_raw(
    analysis: Analysis, site: Site, step: int, judges: Judges, labels: TokenLabels | None, padding: bool
) -> tuple[ImageRows, TokenRows | None]:
    """Pooled and labelled activations (float32); labelled tokens that a sampling store did not keep are dropped."""
    store, points = analysis.store, analysis.rows.points
    d_model = store.meta.d_model
    pooled = {(point, pool): np.zeros((len(judges.images), d_model), np.float32) for point in points for pool in POOLS}
    count = 0 if labels is None else len(labels.token)
    taken: dict[Point, np.ndarray] = {point: np.zeros((count, d_model), np.float32) for point in points}
    there = np.zeros(count, bool)
    image_of_row = np.zeros(0, np.int64) if labels is None else judges.images[labels.scene]
    for start, stop, image, position, read in _chunks(analysis, site, step, judges.images, padding):
        owner = np.searchsorted(judges.images, image + start)
        for point, values in read.items():
            _pool(pooled, point, owner, values)
        mine = np.flatnonzero((image_of_row >= start) & (image_of_row < stop))
        if labels is not None and len(mine):
            slot = np.full((stop - start, int(store.meta.tokens[site.stream].total)), -1)
            slot[image, position] = np.arange(len(image))
            place = slot[image_of_row[mine] - start, labels.token[mine]]
            there[mine] = place >= 0
            for point, values in read.items():
                taken[point][mine[place >= 0]] = values[place[place >= 0]]
    if labels is None:
        return ImageRows(pooled), None
    sigma = sigmas(store, step)[image_of_row[there]]
    return ImageRows(pooled), TokenRows(labels.keep(there), sigma, {p: values[there] for p, values in taken.items()})


def _chunks(
    analysis: Analysis, site: Site, step: int, images: Int[np.ndarray, " row"], padding: bool
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, dict[Point, np.ndarray]]]:
    """Start, stop, and of the counted rows of the images there: image (from start), position, and float32 activations.

    Of a joint site only its image tokens count, as for the scores that it is judged by.
    """
    for chunk in counted_chunks(analysis.store, site.stream, step, images, padding):
        if site.stream == "joint":
            chunk = replace(chunk, counted=chunk.counted & (chunk.positions >= analysis.store.meta.text_tokens))
        read = analysis.rows.read(site, step, analysis.rows.points, chunk.start, chunk.stop, chunk.rows)
        floats = {point: np.asarray(values, np.float32) for point, values in read.items()}
        yield chunk.start, chunk.stop, chunk.rows[0], chunk.row_positions, floats


def _pool(
    pooled: dict[tuple[Point, str], np.ndarray], point: Point, owner: Int[np.ndarray, " row"], values: np.ndarray
) -> None:
    """Pool the rows of each image; `owner` ascends."""
    if not len(owner):
        return
    starts = np.flatnonzero(np.concatenate(([True], np.diff(owner) > 0)))
    counts = np.diff(np.append(starts, len(owner)))
    image = owner[starts]
    if (counts == counts[0]).all():  # several times faster than reduceat
        blocks = values.reshape(len(image), counts[0], -1)
        high, low, mean = blocks.max(axis=1), blocks.min(axis=1), blocks.mean(axis=1, dtype=np.float64)
    else:
        high, low = np.maximum.reduceat(values, starts, axis=0), np.minimum.reduceat(values, starts, axis=0)
        mean = np.add.reduceat(values, starts, axis=0, dtype=np.float64) / counts[:, None]
    pooled[point, "max"][image], pooled[point, "min"][image], pooled[point, "mean"][image] = high, low, mean


def image_bounds(rows: ImageRows, judges: Judges) -> tuple[Choice, Choice]:
    """Linear probe and floor (best channel, of either sign) of every attribute over images."""
    probe, channel = empty_choice(len(judges.attributes)), empty_choice(len(judges.attributes))
    x, columns = rows.probed(), rows.channels()
    for labels, known in judges.populations():
        part, shown = judges.halves.part[known], judges.shown[known][:, labels]
        probe.put(labels, ridge_probe(x[known], shown, part))
        channel.put(labels, best_channel((values[known] for values in columns), shown, part))
    return probe, channel
