"""Truth over image tokens: how well a feature tells the tokens of a red object from those of objects of other colours."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse

from analyze.inputs import Subject, sigmas
from analyze.rows import StoreRows
from analyze.scoring.scores import encoded
from analyze.truth.attributes import ATTRIBUTES, POPULATIONS, Group, Population, Scene, TokenLabels, token_labels
from analyze.truth.choosing import MIN_ROWS, Choice, auroc_of, choose_columns, only
from analyze.truth.halves import Halves
from analyze.truth.probes import best_channel, ridge_probe
from store.sites import Point, Site
from train.rows.tensors import to_torch


@dataclass(frozen=True)
class TokenRows:
    """The labelled tokens of one site and step, with what the MLP reads and writes there."""

    labels: TokenLabels
    sigma: Float[np.ndarray, " row"]
    points: dict[Point, Float[np.ndarray, "row d_model"]]


def gather(reader: StoreRows, site: Site, step: int, scenes: Sequence[Scene], labels: TokenLabels) -> TokenRows:
    """Activations at the labelled tokens (float32); tokens that a sampling store did not keep are dropped."""
    store = reader.store
    images = np.asarray([scene.image for scene in scenes])[labels.scene]
    slot = np.full(len(images), -1)
    taken: dict[Point, np.ndarray] = {
        point: np.zeros((len(images), store.meta.d_model), np.float32) for point in reader.points
    }
    for start in range(0, store.n_images, store.chunk_images):
        stop = min(start + store.chunk_images, store.n_images)
        rows = np.flatnonzero((images >= start) & (images < stop))
        if not len(rows):
            continue
        positions = store.tokens(site.stream, step, start, stop)
        place = np.full((stop - start, int(store.meta.tokens[site.stream].total)), -1)
        image, kept = np.nonzero(positions >= 0)
        place[image, positions[image, kept]] = kept
        slot[rows] = place[images[rows] - start, labels.token[rows]]
        rows = rows[slot[rows] >= 0]
        found = reader.read(site, step, reader.points, start, stop, (images[rows] - start, slot[rows]))
        for point, values in found.items():
            taken[point][rows] = values.astype(np.float32)
    there = slot >= 0
    return TokenRows(
        labels.keep(there), sigmas(store, step)[images[there]], {p: values[there] for p, values in taken.items()}
    )


def activations(subject: Subject, rows: TokenRows) -> sparse.csr_array:
    """z of the labelled tokens, sparse (row, feature)."""
    blocks = encoded(subject, to_torch(rows.points[subject.point]), torch.from_numpy(rows.sigma))
    return sparse.vstack([sparse.csr_array(z.numpy()) for _, z in blocks], format="csr")


def populations() -> Iterator[tuple[Population, Int[np.ndarray, " label"]]]:
    """Each population of tokens with the attributes (their numbers) that are told apart in it."""
    for population in ("object", "placed", "background"):
        groups: list[Group] = [group for group, name in POPULATIONS.items() if name == population]
        yield population, np.asarray([i for i, attribute in enumerate(ATTRIBUTES) if attribute.group in groups])  # type: ignore[misc]


@dataclass(frozen=True)
class TokenTruth:
    """For every attribute, over the tokens of its population: what a dictionary, a probe or a channel reaches."""

    choice: Choice
    of_image_feature: Float[np.ndarray, " attribute"]
    """AUROC on the scored half of the feature that was chosen by images"""


def empty_choice() -> Choice:
    """Nothing judged yet, for all attributes."""
    count = len(ATTRIBUTES)
    return Choice(np.zeros(count, np.int64), np.full(count, np.nan), np.full(count, np.nan))


def _fill(into: Choice, labels: Int[np.ndarray, " label"], found: Choice) -> None:
    into.column[labels], into.selection[labels], into.scored[labels] = found.column, found.selection, found.scored


def dictionary_truth(subject: Subject, rows: TokenRows, halves: Halves, by_images: Choice) -> TokenTruth:
    """The best feature over tokens, chosen and scored on different halves, and how the one chosen by images does."""
    z = activations(subject, rows)
    choice, of_image = empty_choice(), np.full(len(ATTRIBUTES), np.nan)
    for population, labels in populations():
        member = rows.labels.population[population]
        shown, choose = _part(rows, member, labels, halves)
        found = only(choose_columns(z[member], shown, choose), _enough_scenes(rows, member, shown, choose))
        _fill(choice, labels, found)
        of_image[labels] = auroc_of(z[member], shown, ~choose, by_images.column[labels])
    of_image[np.isnan(by_images.selection) | np.isnan(choice.selection)] = np.nan
    return TokenTruth(choice, of_image)


def bounds(rows: TokenRows, halves: Halves) -> tuple[Choice, Choice]:
    """Ceiling (ridge probe on mlp_in) and floor (best channel: mlp_in's channels first, then mlp_out's) for every attribute."""
    probe, channel = empty_choice(), empty_choice()
    x = np.concatenate([rows.points[point] for point in sorted(rows.points)], axis=1)
    for population, labels in populations():
        member = rows.labels.population[population]
        part = halves.part[rows.labels.scene[member]]
        shown = rows.labels.shown[member][:, labels]
        enough = _enough_scenes(rows, member, shown, part < 2)
        _fill(probe, labels, only(ridge_probe(rows.points["mlp_in"][member], shown, part), enough))
        _fill(channel, labels, only(best_channel(x[member], shown, part), enough))
    return probe, channel


def _enough_scenes(
    rows: TokenRows,
    member: Bool[np.ndarray, " row"],
    shown: Bool[np.ndarray, "member label"],
    choose: Bool[np.ndarray, " member"],
) -> Bool[np.ndarray, " label"]:
    """Which labels have tokens of both kinds from enough different images in both halves: tokens of one are alike."""
    scene = rows.labels.scene[member]
    parts = [(scene[half], kind[half]) for half in (choose, ~choose) for kind in (shown, ~shown)]
    counts = [[len(np.unique(of[column])) for column in kind.T] for of, kind in parts]
    return np.asarray(np.min(counts, axis=0) >= MIN_ROWS)


def _part(
    rows: TokenRows, member: Bool[np.ndarray, " row"], labels: Int[np.ndarray, " label"], halves: Halves
) -> tuple[Bool[np.ndarray, "member label"], Bool[np.ndarray, " member"]]:
    return rows.labels.shown[member][:, labels], halves.choose[rows.labels.scene[member]]


__all__ = ["TokenRows", "TokenTruth", "bounds", "dictionary_truth", "gather", "token_labels"]
