"""What a run of `scores` is to do: which panes together, in how many reads of the store, with how many bytes, files and threads.

The unit of work is a task: one site and step, one block of images, and as many panes of the site's dictionaries as the
memory holds.  A task reads its images once for all of them.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from analyze.counted import counted_kinds
from analyze.inputs import Analysis, Subject
from analyze.scoring.encoding import PANE, panes_of, passing_bytes, rows_at_once, weight_bytes
from analyze.scoring.findings import bytes_of_feature
from analyze.scoring.matrices import IMAGE_BLOCK, chunk_shape
from analyze.scoring.settings import ScoresSettings
from store.errors import UsageError
from store.sites import Point, Site, Stream
from store.sizes import human_size, parse_size

SPAN_VALUES = 1 << 22
"""about as many values of activations are read at once, if chunks of the store are no larger"""
ENTRY = 80
"""bytes that an active entry of a block takes, at most, while it is looked at"""
IMAGE = 200
"""bytes that are known of an image"""
MARGIN = 16 << 20
"""for what is too small to be counted"""


@dataclass(frozen=True)
class Task:
    """One block of images at one site and step, and the panes to be looked at."""

    site: Site
    step: int
    block: int
    panes: tuple[tuple[str, int], ...]
    """name of a subject and number of the pane"""


Group = tuple[tuple[Subject, tuple[int, ...]], ...]
"""subjects of a site with the numbers of their panes, for which the store is read once"""


class ScorePlan:
    """The work for some (subject, step) pairs, divided so that the memory holds."""

    def __init__(self, analysis: Analysis, settings: ScoresSettings, missing: Sequence[tuple[Subject, int]]) -> None:
        self.analysis, self.settings, self.missing = analysis, settings, tuple(missing)
        self.store = analysis.store
        self.device = chosen_device(settings)
        self.memory = parse_size(settings.memory)
        wanted = 1 if settings.scheduler is not None else settings.workers or len(os.sched_getaffinity(0))
        self.lanes, self.groups = self._divided(wanted)

    @property
    def n_blocks(self) -> int:
        """Blocks of images."""
        return -(-self.store.n_images // IMAGE_BLOCK)

    def images(self, block: int) -> range:
        """The images of a block."""
        return range(block * IMAGE_BLOCK, min((block + 1) * IMAGE_BLOCK, self.store.n_images))

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites at which something is to be done, in the order of the subjects."""
        return tuple(dict.fromkeys(subject.site for subject in self.analysis.subjects if subject in self._subjects))

    @cached_property
    def _subjects(self) -> set[Subject]:
        return {subject for subject, _ in self.missing}

    @cached_property
    def _named(self) -> dict[str, Subject]:
        return {subject.name: subject for subject in self._subjects}

    def tasks(self, site: Site, group: Group) -> Iterator[Task]:
        """Everything to be done with a group of a site."""
        for step in self.analysis.steps:
            for share in self._shares(group, step):
                for block in range(self.n_blocks):
                    yield Task(site, step, block, share)

    def _shares(self, group: Group, step: int) -> list[tuple[tuple[str, int], ...]]:
        """The panes of a group that are missing at a step: in one task, or in several where there are fewer blocks than threads."""
        units: list[list[tuple[str, int]]] = []
        for subject, numbers in group:
            panes = [(subject.name, number) for number in numbers if (subject, step) in self.missing]
            whole = subject.outline.config.activation == "topk"  # every pane of it needs all of it
            units += ([panes] if whole else [[pane] for pane in panes]) if panes else []
        count = min(-(-self.lanes // (self.n_blocks * len(self.analysis.steps))), len(units))
        cuts = [len(units) * part // max(count, 1) for part in range(count + 1)]
        return [tuple(pane for unit in units[low:high] for pane in unit) for low, high in pairwise(cuts)]

    def _divided(self, wanted: int) -> tuple[int, dict[Site, list[Group]]]:
        """As many threads as have room for the widest dictionary, or one; and the groups of each site."""
        for lanes in range(wanted, 0, -1):
            rooms = {site: self._room(site, lanes) for site in self.sites}
            if all(self._cost(s, lanes, range(len(panes_of(s.n_features)))) <= rooms[s.site] for s in self._subjects):
                return lanes, {site: self._groups(site, lanes) for site in self.sites}
        self._refuse_little_memory()
        return 1, {site: self._groups(site, 1) for site in self.sites}

    def _room(self, site: Site, lanes: int) -> int:
        """What is left for weights and panes."""
        passing = max(passing_bytes(subject.outline) for subject in self._subjects if subject.site == site)
        known = MARGIN + self.store.n_images * IMAGE + passing
        return self.memory - known - lanes * self.lane_bytes(site) - self._mlp_bytes(site)

    def lane_bytes(self, site: Site) -> int:
        """What a thread needs beside the panes: activations that were read, a block of z, what is made of it and of a pane."""
        d_model, meta = self.store.meta.d_model, self.store.meta
        subjects = [subject for subject in self._subjects if subject.site == site]
        tokens = meta.tokens[site.stream].kept
        span = self.span(site.stream) * tokens * d_model
        points = len({subject.point for subject in subjects})
        stored = 4 if self.store.recomputed else 2
        read = span * (points * 2 * max(stored, meta.row_bytes // d_model) + 4 + 4)
        on_cpu = self.device.type == "cpu"
        widest = max(
            (s.n_features if s.outline.config.activation == "topk" else min(PANE, s.n_features)) for s in subjects
        )
        block = (
            rows_at_once(torch.device("cpu")) * (widest * 4 + min(PANE, widest) * ENTRY) if on_cpu else widest * 4096
        )
        top = self.settings.top
        tail = PANE * (IMAGE_BLOCK * (4 + 8) + 4 * bytes_of_feature(top, True)) + (IMAGE_BLOCK + 4 * top) * 1024 * 40
        return int(read + block + tail)

    def _kinds(self, site: Site) -> int:
        return len(counted_kinds(site.stream, self.settings.padding))

    def _more(self, site: Site) -> int:
        """Matrices beside those of all tokens: one for each kind that is told apart."""
        kinds = self._kinds(site)
        return kinds if kinds > 1 else 0

    def _of_feature(self, site: Site) -> int:
        return bytes_of_feature(self.settings.top, site.stream != "img", self._kinds(site))

    def _mlp_bytes(self, site: Site) -> int:
        recomputed = any(s.point not in self.store.points for s in self._subjects if s.site == site)
        return 2 * 8 * self.store.meta.d_model**2 * 4 if recomputed else 0

    def span(self, stream: Stream) -> int:
        """Images that are read at once: whole chunks of the store, about `SPAN_VALUES` together."""
        chunk = self.store.chunk_images
        values = chunk * self.store.meta.tokens[stream].kept * self.store.meta.d_model
        return min(chunk * max(1, SPAN_VALUES // max(values, 1)), IMAGE_BLOCK)

    def _cost(self, subject: Subject, lanes: int, panes: Sequence[int]) -> int:
        """Bytes of a subject's weights, and of some of its panes in every thread; and of its table."""
        widths = [part.stop - part.start for part in (panes_of(subject.n_features)[number] for number in panes)]
        of_feature, kinds = self._of_feature(subject.site), self._kinds(subject.site)
        images = min(IMAGE_BLOCK, self.store.n_images) * (1 if kinds == 1 else kinds + 1)
        pool = 3 * 16 * 2 * self.settings.top if subject.site.stream != "img" else 0
        table = 3 * subject.n_features * of_feature
        return int(weight_bytes(subject.outline) + lanes * sum(widths) * (images * 8 + of_feature + pool) + table)

    def _groups(self, site: Site, lanes: int) -> list[Group]:
        room, taken = self._room(site, lanes), 0
        found: list[Group] = []
        current: dict[Subject, list[int]] = {}
        subjects = [subject for subject in self.analysis.subjects if subject in self._subjects and subject.site == site]
        for subject in subjects:
            for pane in range(len(panes_of(subject.n_features))):
                before = self._cost(subject, lanes, current[subject]) if subject in current else 0
                more = self._cost(subject, lanes, [*current.get(subject, []), pane]) - before
                if current and taken + more > room:
                    found.append(tuple((s, tuple(numbers)) for s, numbers in current.items()))
                    current, taken, more = {}, 0, self._cost(subject, lanes, [pane])
                current.setdefault(subject, []).append(pane)
                taken += more
        return [*found, tuple((s, tuple(numbers)) for s, numbers in current.items())]

    def _refuse_little_memory(self) -> None:
        """`UsageError` where a thread has no room for a pane of some dictionary; it says how much would do for all."""
        needs = {
            subject: self.memory - self._room(subject.site, 1) + self._cost(subject, 1, [0])
            for subject in self.analysis.subjects
            if subject in self._subjects
        }
        subject = max(needs, key=lambda each: needs[each])
        if needs[subject] <= self.memory:
            return
        others = sum(need > self.memory for need in needs.values()) - 1
        more = f" (and for {others} more)" if others else ""
        raise UsageError(
            f"--memory {human_size(self.memory)} is too little for {subject.name}{more}: its encoder takes "
            f"{human_size(weight_bytes(subject.outline))}, {min(PANE, subject.n_features)} features of {IMAGE_BLOCK} images with what "
            f"is read of them the rest; use --memory {-(-needs[subject] // 10**6)}MB or more"
        )

    @cached_property
    def files(self) -> int:
        """Files of the results: chunks, four of metadata for each matrix (its table among them)."""
        total = 0
        for subject, _ in self.missing:
            images, features = chunk_shape(self.store.n_images, subject.n_features)
            arrays = 2 + self._more(subject.site)
            total += arrays * -(-self.store.n_images // images) * -(-subject.n_features // features) + 2 + arrays
        return total

    @cached_property
    def array_bytes(self) -> int:
        """Bytes of scores and tokens before compression; chunks at the edges are whole."""
        each, total = (2 if self.settings.dtype == "float16" else 4) + 4, 0
        for subject, _ in self.missing:
            images, features = chunk_shape(self.store.n_images, subject.n_features)
            whole = -(-self.store.n_images // images) * images * -(-subject.n_features // features) * features
            total += whole * (each + self._more(subject.site) * (each - 4))
        return total

    @cached_property
    def table_bytes(self) -> int:
        """Bytes of the feature tables before compression, at most."""
        return sum(subject.n_features * (self._of_feature(subject.site) + 150) + 20_000 for subject, _ in self.missing)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of what is kept of each block until all are done, of the dictionaries and steps of one group at a time, at most."""
        of_group = [
            sum(self._of_feature(site) * subject.n_features * len(self.analysis.steps) for subject, _ in group)
            for site, groups in self.groups.items()
            for group in groups
        ]
        return max(of_group, default=0) * self.n_blocks

    @cached_property
    def read_bytes(self) -> int:
        """Bytes of activations that are read of the store, all reads together."""
        meta, total = self.store.meta, 0
        for site, groups in self.groups.items():
            for share in (
                share for group in groups for step in self.analysis.steps for share in self._shares(group, step)
            ):
                total += len(self._points(share)) * self.store.n_images * meta.tokens[site.stream].kept * meta.row_bytes
        return total

    @property
    def reads(self) -> int:
        """How often the site, step and point that is read most often is read."""
        count: Counter[tuple[Site, int, Point]] = Counter(
            (site, step, point)
            for site, groups in self.groups.items()
            for step in self.analysis.steps
            for group in groups
            for share in self._shares(group, step)
            for point in self._points(share)
        )
        return max(count.values(), default=0)

    def _points(self, share: Sequence[tuple[str, int]]) -> set[Point]:
        """The points of the store that the dictionaries of a task are computed from."""
        read = {self._named[name].point for name, _ in share}
        return {point if point in self.store.points else "mlp_in" for point in read}

    @cached_property
    def operations(self) -> int:
        """Floating-point operations of the encoders, were every kept token counted."""
        meta, total = self.store.meta, 0
        for site, groups in self.groups.items():
            rows = self.store.n_images * meta.tokens[site.stream].kept
            for group in groups:
                for subject, panes in group:
                    steps = sum((subject, step) in self.missing for step in self.analysis.steps)
                    whole = subject.outline.config.activation == "topk"
                    parts = panes_of(subject.n_features)
                    width = subject.n_features if whole else sum(parts[p].stop - parts[p].start for p in panes)
                    total += 2 * rows * meta.d_model * width * steps
        return total

    def held_bytes(self) -> int:
        """What is held at once, at most, by our count."""
        found = [0]
        for site, groups in self.groups.items():
            around = self.memory - self._room(site, self.lanes)
            found += [around + sum(self._cost(s, self.lanes, panes) for s, panes in group) for group in groups]
        return max(found)


def chosen_device(settings: ScoresSettings) -> torch.device:
    """The device that is asked for; `UsageError` for a GPU that is not there."""
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise UsageError("--device cuda: this machine has no GPU that torch sees; use --device cpu or auto")
    return torch.device("cuda" if there and settings.device != "cpu" else "cpu")
