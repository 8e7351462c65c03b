"""Truth over image tokens: how well a feature tells the tokens of a red object from those of objects of other colours."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse

from analyze.inputs import Subject
from analyze.scoring.scores import encoded
from analyze.truth.attributes import ATTRIBUTES, POPULATIONS, Group, Population
from analyze.truth.choosing import (
    MIN_ROWS,
    Choice,
    choose_columns,
    columns_of,
    diagonal_auroc,
    empty_choice,
    only,
)
from analyze.truth.halves import Halves
from analyze.truth.probes import best_channel, ridge_probe
from analyze.truth.raw import TokenRows
from train.rows.tensors import to_torch


def activations(subject: Subject, rows: TokenRows) -> sparse.csr_array:
    """z of the labelled tokens, sparse (row, feature)."""
    blocks = encoded(subject, to_torch(rows.points[subject.point]), torch.from_numpy(rows.sigma))
    return sparse.vstack([_sparse(z.numpy()) for _, z in blocks], format="csr")


def _sparse(z: Float[np.ndarray, "row feature"]) -> sparse.csr_array:
    """What is not zero; several times faster than `csr_array(z)`, which looks for it among floats."""
    active = z != 0
    place = np.flatnonzero(active)
    ends = np.concatenate(([0], np.cumsum(np.count_nonzero(active, axis=1))))
    return sparse.csr_array((z.ravel()[place], place % z.shape[1], ends), shape=z.shape)


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


@dataclass(frozen=True)
class Part:
    """The tokens of one population: what is the same for every dictionary of a site."""

    labels: Int[np.ndarray, " label"]
    """numbers of the attributes that are told apart in it"""
    member: Bool[np.ndarray, " row"]
    shown: Bool[np.ndarray, "member label"]
    part: Int[np.ndarray, " member"]
    enough: Bool[np.ndarray, " label"]

    @property
    def choose(self) -> Bool[np.ndarray, " member"]:
        """The half that features are chosen on."""
        return np.asarray(self.part < 2)


def parts_of(rows: TokenRows, halves: Halves) -> list[Part]:
    """The populations of labelled tokens."""
    found = []
    for population, labels in populations():
        member = rows.labels.population[population]
        shown, part = rows.labels.shown[member][:, labels], halves.part[rows.labels.scene[member]]
        enough = _enough_scenes(rows.labels.scene[member], shown, part < 2)
        found.append(Part(labels, member, shown, part, enough))
    return found


def dictionary_truth(subject: Subject, rows: TokenRows, parts: list[Part], by_images: Choice) -> TokenTruth:
    """The best feature over tokens, chosen and scored on different halves, and how the one chosen by images does."""
    z = activations(subject, rows)
    choice, of_image = empty_choice(len(ATTRIBUTES)), np.full(len(ATTRIBUTES), np.nan)
    for part in parts:
        own = z[part.member]
        choice.put(part.labels, only(choose_columns(own, part.shown, part.choose), part.enough))
        chosen = columns_of(own[~part.choose], by_images.column[part.labels])
        of_image[part.labels] = diagonal_auroc(chosen, part.shown[~part.choose])
    of_image[np.isnan(by_images.selection) | np.isnan(choice.selection)] = np.nan
    return TokenTruth(choice, of_image)


def token_bounds(rows: TokenRows, parts: list[Part]) -> tuple[Choice, Choice]:
    """Linear probe (on mlp_in) and floor (best channel: mlp_in's channels first, then mlp_out's) for every attribute."""
    probe, channel = empty_choice(len(ATTRIBUTES)), empty_choice(len(ATTRIBUTES))
    points = sorted(rows.points)
    for part in parts:
        read = rows.points[points[0]][part.member]
        probe.put(part.labels, only(ridge_probe(read, part.shown, part.part), part.enough))
        channel.put(
            part.labels,
            only(
                best_channel((rows.points[point][part.member] for point in points), part.shown, part.part), part.enough
            ),
        )
    return probe, channel


def _enough_scenes(
    scene: Int[np.ndarray, " member"], shown: Bool[np.ndarray, "member label"], choose: Bool[np.ndarray, " member"]
) -> Bool[np.ndarray, " label"]:
    """Which labels have tokens of both kinds from enough different images in both halves: tokens of one are alike."""
    parts = [(scene[half], kind[half]) for half in (choose, ~choose) for kind in (shown, ~shown)]
    counts = [[len(np.unique(of[column])) for column in kind.T] for of, kind in parts]
    return np.asarray(np.min(counts, axis=0) >= MIN_ROWS)
