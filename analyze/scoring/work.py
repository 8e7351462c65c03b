"""Does tasks of a plan: reads the images of a block span by span, encodes them, and writes scores and findings.

    OUT/unfinished/lock                                    held by the process that computes
    OUT/unfinished/img_6/step.0/matrix/                    the score matrix as far as it is
    OUT/unfinished/img_6/step.0/findings/00003.2.found     what was found on block 3 for pane 2; written after its chunks

The findings of a block say that it is done.  Every block is computed with one thread in one order, so that the bytes depend on
neither the number of workers, nor the memory, nor on how often the run was killed.
"""

import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from analyze.counted import are_lower_bounds, counted_kinds, counted_rows
from analyze.inputs import Analysis, Subject
from analyze.scoring.encoding import Encoder, panes_of, rows_at_once
from analyze.scoring.findings import Findings
from analyze.scoring.images import ImageFacts
from analyze.scoring.kinds import kind_numbers
from analyze.scoring.matrices import UNFINISHED, ScoreWriter, step_folder
from analyze.scoring.plan import ScorePlan, Task
from analyze.scoring.reduction import Pane, RowBlock, row_blocks
from analyze.scoring.settings import ScoresSettings
from analyze.scoring.table import feature_table
from store.errors import StoreError
from store.sites import Site
from store.strata import Group, codes_of
from train.rows.tensors import to_torch

Advance = Callable[[int], object]


class Hands:
    """Does tasks in one process, several at once if need be; holds the encoders of the dictionaries at work."""

    def __init__(self, plan: ScorePlan, advance: Advance) -> None:
        self.plan, self.advance = plan, advance
        self.analysis, self.settings = plan.analysis, plan.settings
        self.facts = ImageFacts(plan.store)
        self._encoders: dict[str, Encoder] = {}
        self._lock = threading.Lock()
        self._subjects = {subject.name: subject for subject in self.analysis.subjects}

    def do(self, task: Task) -> None:
        """Compute what is not there yet of a block of images."""
        images = self.plan.images(task.block)
        chosen: dict[str, list[int]] = {}
        for name, pane in task.panes:
            if not self._findings(self._subjects[name], pane).load(self._file(task, name, pane)):
                chosen.setdefault(name, []).append(pane)
        if not chosen:
            self.advance(len(images))
            return
        panes = {
            (name, pane): self._pane(name, pane, len(images)) for name, numbers in chosen.items() for pane in numbers
        }
        encoders = {name: self._encoder(name) for name in chosen}
        with torch.inference_mode():
            for span in self._spans(task, images):
                for name, numbers in chosen.items():
                    _look(encoders[name], span, [(number, panes[name, number]) for number in numbers])
        for (name, number), found in panes.items():
            self._publish(task, name, number, found)

    def _spans(self, task: Task, images: range) -> Iterator["Span"]:
        """The counted rows of some images at a time, at all points that the dictionaries read."""
        store, site, facts = self.plan.store, task.site, self.facts
        points = {self._subjects[name].point for name, _ in task.panes}
        size = self.plan.span(site.stream)
        for start in range(images.start, images.stop, size):
            stop = min(start + size, images.stop)
            positions = store.tokens(site.stream, task.step, start, stop)
            counted = counted_rows(
                positions, site.stream, facts.text[start:stop], store.meta.text_tokens, self.settings.padding
            )
            rows = self.analysis.rows.read(site, task.step, points, start, stop, counted)
            image, position = np.nonzero(counted)[0] + start, positions[counted].astype(np.int32)
            piece = None
            if site.stream != "img" and facts.pieces is not None:
                piece = facts.pieces.at(image, position, facts.text)
            owner, kinds = image - images.start, self._kinds(site)
            if len(kinds) > 1:
                codes = codes_of(site.stream, position, facts.text.at(image, position), store.meta.text_tokens)
                owner = owner * len(kinds) + kind_numbers(codes, kinds)
            blocks = row_blocks(owner, position, piece, rows_at_once(self.plan.device))
            yield Span(
                {p: to_torch(x) for p, x in rows.items()}, torch.from_numpy(facts.sigmas[task.step][image]), blocks
            )
            self.advance(stop - start)

    def _kinds(self, site: Site) -> tuple[Group, ...]:
        return counted_kinds(site.stream, self.settings.padding)

    def _pane(self, name: str, number: int, n_images: int) -> Pane:
        part = panes_of(self._subjects[name].n_features)[number]
        words = None if self._subjects[name].site.stream == "img" else self.settings.top
        encoder = self._encoder(name)
        kinds = self._kinds(self._subjects[name].site)
        return Pane(
            n_images, part.stop - part.start, self.settings.active_above, words, encoder.refuse_non_finite, kinds
        )

    def _encoder(self, name: str) -> Encoder:
        with self._lock:
            if name not in self._encoders:
                self._encoders[name] = Encoder(self._subjects[name].fresh(), self.plan.device)
            return self._encoders[name]

    def let_go(self, keep: Sequence[str] = ()) -> None:
        """Give back the memory of all dictionaries but these."""
        with self._lock:
            self._encoders = {name: encoder for name, encoder in self._encoders.items() if name in keep}

    def _findings(self, subject: Subject, number: int = 0) -> Findings:
        part = panes_of(subject.n_features)[number]
        words = subject.site.stream != "img"
        kinds = self._kinds(subject.site)
        return Findings(part.stop - part.start, self.settings.top, self.settings.active_above, self.facts, words, kinds)

    def _publish(self, task: Task, name: str, number: int, pane: Pane) -> None:
        subject, images = self._subjects[name], self.plan.images(task.block)
        features = panes_of(subject.n_features)[number]
        writer = writer_of(self.analysis, self.settings, subject, task.step, self.plan.device)
        pane.finish(writer.rounded)
        pane.scores = writer.rounded(pane.scores)  # before any of it goes into the table
        writer.write(slice(images.start, images.stop), features, pane.scores, pane.tokens, pane.by_kind)
        findings = self._findings(subject, number)
        findings.take(pane, images.start)
        findings.save(self._file(task, name, number))

    def _file(self, task: Task, name: str, pane: int) -> Path:
        return findings_file(self.analysis, name, task.step, task.block, pane)

    def finish(self, subject: Subject, step: int) -> None:
        """Merge what was found on all blocks, write the table, and make the result appear."""
        panes = []
        for number in range(len(panes_of(subject.n_features))):
            merged, found = self._findings(subject, number), self._findings(subject, number)
            for block in range(self.plan.n_blocks):
                file = findings_file(self.analysis, subject.name, step, block, number)
                if not found.load(file):
                    raise StoreError(f"{file} is missing or damaged: run the same command again")
                merged.merge(found)
            panes.append(merged)
        table = feature_table(panes, self.plan.store.n_images, self.settings.active_above, self.facts.pieces)
        writer = writer_of(self.analysis, self.settings, subject, step, self.plan.device)
        writer.finish(step_folder(self.analysis.out, subject.name, step), table)
        shutil.rmtree(writer.folder.parent)


class Span:
    """Some counted rows: activations at each point in the dtype of the store, sigmas, and the blocks that they fall into."""

    def __init__(self, rows: dict[str, Tensor], sigma: Tensor, blocks: list[RowBlock]) -> None:
        self.rows, self.sigma, self.blocks = rows, sigma, blocks


def _look(encoder: Encoder, span: Span, panes: Sequence[tuple[int, Pane]]) -> None:
    """Encode the rows of a span with one dictionary, and hand z to its panes."""
    x = encoder.prepared(span.rows[encoder.config.input_point], span.sigma)
    slices = panes_of(encoder.config.n_features)
    if encoder.by_rows:
        for block in span.blocks:
            row, feature, value = (each.cpu() for each in encoder.greatest(x[block.rows]))
            encoder.refuse_non_finite(value)
            for number, pane in panes:
                part = slices[number]
                kept = (value > 0) & (feature >= part.start) & (feature < part.stop)
                pane.add_entries(row[kept].numpy(), feature[kept].numpy() - part.start, value[kept].numpy(), block)
        return
    rows = max((block.count for block in span.blocks), default=0)
    for number, pane in panes:
        part = slices[number]
        out = torch.empty(rows, part.stop - part.start, device=x.device)
        for block in span.blocks:
            pane.add(encoder.pane(x[block.rows], part, out), block)


def findings_file(analysis: Analysis, name: str, step: int, block: int, pane: int) -> Path:
    """Where the findings of a block and pane are kept until all are there."""
    return _folder(analysis, name, step) / "findings" / f"{block:05d}.{pane}.found"


def _folder(analysis: Analysis, name: str, step: int) -> Path:
    return step_folder(analysis.out / UNFINISHED, name, step)


def writer_of(
    analysis: Analysis, settings: ScoresSettings, subject: Subject, step: int, device: torch.device
) -> ScoreWriter:
    """Writes the score matrix of a dictionary and step."""
    attributes = {
        "store": analysis.store.id,
        "dictionary": subject.identity,
        "dictionary_name": subject.outline.name,
        "site": str(subject.site),
        "step": step,
        "targets": analysis.store.meta.targets,
        "padding_counted": settings.padding,
        "active_above": settings.active_above,
        "device": device.type,
        "lower_bounds": are_lower_bounds(analysis.store, subject.site.stream, settings.padding),
    }
    kinds = counted_kinds(subject.site.stream, settings.padding)
    kinds = kinds if len(kinds) > 1 else ()
    if kinds:
        attributes["kinds"] = list(kinds)
    folder = _folder(analysis, subject.name, step) / "matrix"
    return ScoreWriter(folder, analysis.store.n_images, subject.n_features, settings.dtype, attributes, kinds)


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Nobody else computes scores into `out` meanwhile; `StoreError` when somebody does.  What is killed holds nothing any more."""
    work = out / UNFINISHED
    file = _locked(work)
    try:
        yield
    finally:
        tidy(out)
        os.close(file)


def _locked(work: Path) -> int:
    """A descriptor of the lock file, held; made again where the process that had it took the folder away meanwhile."""
    for _attempt in range(100):
        try:
            work.mkdir(parents=True, exist_ok=True)
            file = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except (FileExistsError, FileNotFoundError):
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise StoreError(
                f"another process computes scores into {work.parent}: wait until it ends, or choose another --out"
            ) from None
        except OSError as error:
            print(f"note: {work.parent} cannot be locked ({error.strerror}): start no second run with this --out")
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), (work / "lock").stat()):
                return file
        os.close(file)  # of a file that has no name any more: it keeps nobody out
    raise StoreError(f"{work / 'lock'} cannot be made: remove {work}, or choose another --out")


def tidy(out: Path) -> None:
    """Remove what is of no use in OUT/unfinished: of results that are there; and all of it where nothing else is left.  Under the lock."""
    work = out / UNFINISHED
    for step in work.glob("*/step.*"):
        if (out / step.relative_to(work)).exists():
            shutil.rmtree(step)
    for name in work.iterdir():
        with suppress(OSError):  # a file, or not empty
            name.rmdir()
    if [path.name for path in work.iterdir()] == ["lock"]:
        (work / "lock").unlink()  # from here on another process may hold a lock of its own in this folder
        with suppress(OSError):
            work.rmdir()
