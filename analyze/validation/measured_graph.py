"""One graph measured in the real model: every node of it perturbed, batch by batch, with MLPs held and with nothing held."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from torch import Tensor, nn

from analyze.validation.direct import direct_table
from analyze.validation.graphs import Job
from analyze.validation.node_writes import Subjects, perturbations_of, places_of, read_by, readings_of
from analyze.validation.pairwise import out_of_reach, pairwise_table
from analyze.validation.perturbed_runs import Call, Perturbation, Plain, read_changes
from analyze.validation.settings import ValidateSettings
from store.errors import MismatchError
from store.sites import Site

DRIFT = 0.05
"""of a pre-activation: what is drawn again is another picture than the one that was traced when half of the nodes differ by more"""
SMALL = 1e-3
"""of the largest pre-activation of a graph: none is compared to more digits than this has"""


@dataclass(frozen=True)
class Measured:
    """What came of one graph."""

    direct: pa.Table | None
    pairwise: pa.Table | None
    drift: float
    """by how much the redrawn pre-activations differ from the graph's: of the nodes the median, relative"""
    out_of_reach: float
    """the largest change of a reader that its source cannot reach, 0 but for rounding"""


def measure(
    job: Job,
    transformer: nn.Module,
    call: Call,
    plain: Plain,
    subjects: Subjects,
    settings: ValidateSettings,
    batch_size: int,
    real_text: int,
    progress: Callable[[int], object] = lambda _: None,
) -> Measured:
    """Perturb every node of the job and read every expanded node; `progress` hears how many rows ran.

    `MismatchError` when the picture that was drawn again is not the one that the graph explains.
    """
    places, readings = places_of(job.readers), readings_of(job.readers, subjects, call.sigma)
    drift = _drift(job, read_by(job.readers, readings, places, _rows_of(plain, places), constants=True)[0])
    if not drift <= DRIFT:
        raise MismatchError(
            f"{job.member.folder}: half of its nodes have pre-activations that differ by more than {drift:.0%} when image "
            f"{job.member.image} is drawn again: it was traced on another kind of device or with another model; harvest the trace again"
        )
    perturbations = perturbations_of(job.graph, job.rows, plain, subjects, call.sigma, settings.eps)
    tables: dict[bool, pa.Table] = {}
    stray = 0.0
    for hold in settings.holds:
        held = _skips(plain, subjects) if hold else None
        parts = []
        for start in range(0, len(perturbations), batch_size):
            batch = perturbations[start : start + batch_size]
            values = read_changes(transformer, call, plain, batch, places, held)
            parts.append(read_by(job.readers, readings, places, values))
            progress(len(batch))
        measured = np.concatenate(parts)
        stray = max(stray, out_of_reach(job, measured))
        tables[hold] = _table(job, hold, measured, perturbations, settings.eps, real_text)
    return Measured(tables.get(True), tables.get(False), drift, stray)


def _table(
    job: Job, hold: bool, measured: np.ndarray, perturbations: Sequence[Perturbation], eps: float, real_text: int
) -> pa.Table:
    if hold:
        return direct_table(job, measured, eps, real_text)
    return pairwise_table(job, measured, perturbations, eps, real_text)


def _rows_of(plain: Plain, places: Mapping[Site, Sequence[int]]) -> dict[Site, Tensor]:
    """mlp_in at the places that are read, as one row: (1, place, d_model)."""
    return {site: plain.inputs[site][list(tokens)][None] for site, tokens in places.items()}


def _drift(job: Job, now: np.ndarray) -> float:
    then = np.asarray([reader.pre for reader in job.readers])
    return float(np.median(np.abs(now - then) / (np.abs(then) + SMALL * np.abs(then).max())))


def _skips(plain: Plain, subjects: Subjects) -> dict[Site, Tensor | None]:
    """Every site of the plain run with the matrix of its transcoder's skip path, float32 where the run is."""
    found: dict[Site, Tensor | None] = {}
    for site, values in plain.outputs.items():
        found[site] = None
        if site in subjects and subjects[site].outline.config.skip:
            found[site] = subjects[site].dictionary.skip.weight.detach().float().to(values.device)
    return found
