"""What a harvest takes: bytes by site, files, memory and time, said before it begins; what does not fit is refused.

1. The bytes of activations follow from the settings; those of everything else are estimated, and said to be.
2. They are held against the free space and inodes of the disk that the store lies on; only what is missing counts.
3. A batch is drawn and a file is written, timed and dropped: the slower of the two says how long it will take.
"""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harvest.planning.measure import bytes_a_second, seconds_a_batch
from harvest.planning.plan import Outline, Plan
from harvest.planning.traced import FEWER
from harvest.planning.volume import Volume, part_bytes, pinned_bytes
from harvest.staging import slots_of
from store.errors import GranaryError
from store.format import StoreMeta
from store.layout import STORE_COMMIT, part_commit
from store.sites import Stream
from store.sites import spans as spans
from store.sizes import human_size, many, picture_size

FEW_BATCHES = 16
"""a harvest of fewer batches is not timed beforehand unless `--plan` asks: that would take longer than it tells"""
TEXT_BYTES = 150.0
"""of a prompt, where the prompts are not at hand"""


@dataclass(frozen=True)
class Disk:
    """What is free on the disk of a folder."""

    folder: Path
    """the nearest one that is there"""
    free: int
    inodes: int | None
    """None where the file system has no fixed number of them"""
    block: int

    @classmethod
    def of(cls, out: Path) -> "Disk":
        """The disk that `out` lies on, or will lie on."""
        path = Path(os.path.realpath(out))  # a link may lead to another disk, and to what is not there yet
        folder = next(each for each in (path, *path.parents) if each.is_dir())
        if folder == path and path.parent.stat().st_dev == path.stat().st_dev:
            folder = path.parent  # where a file may be written that is none of the store's
        about = os.statvfs(folder)
        return cls(folder, shutil.disk_usage(folder).free, about.f_favail if about.f_files else None, about.f_frsize)


def announce(
    plan: Outline,
    out: Path | None,
    missing: Sequence[int],
    share: Sequence[int] = (),
    measure: bool = True,
    said: Outline | None = None,
) -> None:
    """Print what the parts `missing` will take, of which `out` may hold others; `GranaryError` when that does not fit.

    `share`: those of them that this worker begins with, where there are others: what they take is said, and all that is missing
    has to fit, for the others write to the same disk.  With `measure` a batch is drawn and a file is written to tell the time,
    unless there is little to do.  `said`: what was announced without that, before prompts were encoded; only what is new is
    said then.
    """
    meta, every = plan.meta, missing
    missing = share or missing
    volume = volume_of(plan, missing)
    new = bool(missing) and (out is None or not (out / STORE_COMMIT).exists())
    disk = Disk.of(out) if out is not None else None
    if said is not None:
        print("\n".join(_line("", remark) for remark in plan.remarks if remark not in said.remarks))
        if missing:
            if disk is not None:
                _refuse(plan, every, missing, disk, new)
            print(_line("time", _time(plan, volume, disk, missing)), flush=True)
        return
    print("\n".join(_head(plan, out, missing)), flush=True)
    if not missing:
        return
    print("\n".join(["", *_table(volume, len(missing), new)]))
    if meta.traced is not None and not volume.traced_in(len(missing)):
        print(_line("traces", _no_traces(meta, out)))
    print(_line("memory", _memory(meta)))
    if disk is not None:
        inodes = "" if disk.inodes is None else f" and {disk.inodes:,} inodes"
        print(_line("disk", f"{human_size(disk.free)}{inodes} are free at {disk.folder}"), flush=True)
        if len(missing) < len(every):
            needed = volume_of(plan, every).on_disk(len(every), new, disk.block)
            print(_line("", f"all {len(every):,} missing parts, of all workers, take {human_size(needed)}"), flush=True)
        _refuse(plan, every, missing, disk, new)
    print(_line("time", _time(plan, volume, disk, missing) if measure else "not measured"), flush=True)


def _refuse(plan: Outline, every: Sequence[int], share: Sequence[int], disk: Disk, new: bool) -> None:
    """`GranaryError` when what is missing does not fit; that says how much of it is a worker's `share`, where it has one."""
    try:
        refuse_what_does_not_fit(volume_of(plan, every), disk, len(every), new)
    except GranaryError as error:
        if len(share) == len(every):
            raise
        own = human_size(volume_of(plan, share).on_disk(len(share), new, disk.block))
        whose = f"{own} of it in the {many(len(share), 'part')} that this worker begins with"
        raise GranaryError(
            f"{error}. That is for all {len(every):,} missing parts, {whose}; the others write there too"
        ) from None


def volume_of(plan: Outline, parts: Sequence[int] | None = None) -> Volume:
    """The files that a plan's store consists of; traces are those of the images of `parts`, or all."""
    meta, prompts = plan.meta, plan.prompts
    policy, files = meta.weights["policy"], meta.weights.get("files", {})
    count = (len(set(files.values())) or len(meta.sites)) if policy == "copy" else 0
    text = TEXT_BYTES if prompts is None else float(np.mean([len(p.text.encode()) for p in prompts.found]))
    blocks = 0 if meta.traced is None else len(set(meta.traced.weights or meta.traced.blocks))
    weights = (plan.weights_file_bytes,) * count + (plan.attention_file_bytes,) * blocks
    traced = Counter(image // meta.chunk_images for image in meta.traced_images)
    chosen = range(meta.n_parts) if parts is None else parts
    return Volume(meta, text, weights, tuple(traced[part] for part in chosen) if traced else ())


def refuse_what_does_not_fit(volume: Volume, disk: Disk, parts: int, new: bool) -> None:
    """`GranaryError` with numbers and remedies when so many parts need more bytes or inodes than the disk has."""
    needed, traced = volume.on_disk(parts, new, disk.block), volume.traced_in(parts)
    size = volume.by_kind(parts, new).get("traces", 0)
    traces = f"{human_size(size)} of that are traces of {many(traced, 'image')}: {FEWER}. " if traced else ""
    if needed > disk.free:
        images = volume.parts_within(disk.free, new, disk.block) * volume.meta.chunk_images
        fit = f"{images:,} of these images would fit; or keep" if images else "Keep"
        raise GranaryError(
            f"{human_size(needed)} are still to be written and the disk at {disk.folder} has {human_size(disk.free)} free. "
            f"{traces}{fit} fewer tokens (--tokens 64 --text-tokens real), layers or steps, choose a smaller --store-dtype or "
            f"--targets recomputed, or a larger disk. What fits: the same command with --plan --budget "
            f"{human_size(disk.free).replace(' ', '')}"
        )
    inodes = volume.files(parts, new) + (volume.folders if new else 0) + volume.trace_folders(parts)
    if disk.inodes is not None and inodes > disk.inodes:
        raise GranaryError(
            f"{inodes:,} files and folders are still to be written and the disk at {disk.folder} has {disk.inodes:,} "
            f"inodes free. {traces}Keep fewer layers, steps or images; or fewer tokens, so that a part holds more images (up to "
            "64); or choose a disk with more inodes."
        )


def _head(plan: Outline, out: Path | None, missing: Sequence[int]) -> list[str]:
    meta = plan.meta
    count = "not fetched, " if plan.prompts is None else f"{meta.prompts['count']:,}, "
    prompts = f"prompts: {meta.prompts['source']} ({count}split {meta.prompts['split']})"
    lines = [
        f"harvest {meta.model['id']}" + ("" if out is None else f" -> {out}"),
        _line(
            "images",
            f"{meta.n_images:,} of {picture_size(meta.width, meta.height)} in {meta.num_inference_steps} "
            f"step{'s' * (meta.num_inference_steps > 1)} (kept: {spans(meta.steps)})"
            f"{f', guidance {meta.guidance:g}' if meta.guidance else ''}; {prompts}",
        ),
        *(_line("", remark) for remark in plan.remarks),
        _line("parts", f"{meta.n_parts:,} of {meta.chunk_images} images, " + _extension(meta)),
    ]
    if len(missing) < meta.n_parts:
        images = sum(len(meta.part_images(part)) for part in missing)
        now = (
            f"{images:,} images in {len(missing):,} part{'s' * (len(missing) > 1)}" if missing else "nothing to harvest"
        )
        lines.append(_line("now", f"{now}; the other parts are there already or left to others"))
    return lines


def _extension(meta: StoreMeta) -> str:
    """Whether a store of so many images can grow: committed chunks are never touched again."""
    over = meta.n_images % meta.chunk_images
    if not over:
        return "all of them whole: the store can be extended"
    there = f"{over} image{'s' * (over != 1)} leave{'s' * (over == 1)} the last part short"
    return (
        f"and {there}: this store cannot be extended as it is; "
        f"with --images {meta.n_images - over + meta.chunk_images} it could"
    )


def _table(volume: Volume, parts: int, new: bool) -> list[str]:
    meta = volume.meta
    rows = [("site", "", "an image", "to write")]
    written = parts * meta.chunk_images
    for stream in meta.streams:
        names = [site.layer for site in meta.site_objects if site.stream == stream]
        each = len(names) * len(meta.steps) * len(meta.points) * meta.tokens[stream].kept * meta.row_bytes
        how = (
            f"{len(names)} site{'s' * (len(names) > 1)} x {len(meta.steps)} step{'s' * (len(meta.steps) > 1)} x "
            f"{' and '.join(meta.points)} x {_kept(meta, stream)} x {meta.row_bytes:,} B"
        )
        rows.append((f"{stream}_{spans(names)}", how, human_size(each), human_size(each * written)))
    kinds = volume.by_kind(parts, new)
    before = ", before compression" if meta.codec == "zstd" else ""
    rows.append((
        "all sites", f"{meta.store_dtype}, targets {meta.targets}, codec {meta.codec}{before}",
        human_size(meta.bytes_per_image), human_size(kinds["activations"]),
    ))  # fmt: skip
    beside = {kind: size for kind, size in kinds.items() if size and kind not in ("activations", "traces", "weights")}
    rows.append(("beside", f"{', '.join(beside)} (estimated)", "", human_size(sum(beside.values()))))
    if meta.traced is not None and (traced := volume.traced_in(parts)):
        what = f"{meta.traced.text()}; {many(traced, 'image')} now; the time to capture them is not measured"
        rows.append(("traces", what, human_size(kinds["traces"] / traced), human_size(kinds["traces"])))
    if kinds.get("weights"):
        rows.append(("weights", _weights(volume), "", human_size(kinds["weights"])))
    files, folders = volume.files(parts, new), (volume.folders if new else 0) + volume.trace_folders(parts)
    inodes = f"{files:,} files in {folders:,} new folders: {files + folders:,} inodes"
    rows.append(("in all", inodes, "", human_size(sum(kinds.values()))))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in rows]


def _no_traces(meta: StoreMeta, out: Path | None) -> str:
    """Why nothing is traced now: the traced images were chosen when the store was begun, and are there or in other parts."""
    assert meta.traced is not None
    parts = {image // meta.chunk_images for image in meta.traced.images}
    there = out is not None and all((out / part_commit(part)).exists() for part in parts)
    images = f"image{'s' * (len(meta.traced.images) > 1)} {spans(meta.traced.images)}"
    are = "are" if len(meta.traced.images) > 1 else "is"
    return f"{images} {are} traced already; none of the new ones" if there else f"of {images}, none of those now"


def _weights(volume: Volume) -> str:
    """How many files of matrices, of what and of how many bytes, a file for each that differs."""
    traced = volume.meta.traced
    blocks = 0 if traced is None else len(set(traced.weights or traced.blocks))
    sites, attention = volume.weights[: len(volume.weights) - blocks], volume.weights[len(volume.weights) - blocks :]
    kinds = {"MLP matrices, a file for each that differs": sites, "attention matrices of traced blocks": attention}
    return "; ".join(f"{what}: {len(each)} of {human_size(each[0])}" for what, each in kinds.items() if each)


def _kept(meta: StoreMeta, stream: Stream) -> str:
    tokens = meta.tokens[stream]
    return (
        f"all {tokens.total} tokens" if tokens.all_kept else f"{tokens.kept} of {tokens.total} tokens ({tokens.policy})"
    )


def _memory(meta: StoreMeta) -> str:
    part, slots = part_bytes(meta), slots_of(meta)
    staging = 0 if meta.device == "cpu" else pinned_bytes(meta)
    slotted = f", and {human_size(staging)}, pinned, for what {many(slots, 'step')} of a batch keep{'s' * (slots == 1)}"
    text = (
        f"{human_size(2 * part)} for two parts of {human_size(part)}, one being drawn and one being written"
        f"{slotted if staging else ''}, beside the model"
    )
    available = _available_memory()
    if available is None or 2 * part + staging < available:
        return text
    return f"{text}; only {human_size(available)} are available: keep fewer tokens or layers"


def _available_memory() -> int | None:
    """What Linux thinks that programs can still get; None on other systems."""
    try:
        words = Path("/proc/meminfo").read_text().split()
        return int(words[words.index("MemAvailable:") + 1]) * 1024
    except (OSError, ValueError):
        return None


def _time(plan: Outline, volume: Volume, disk: Disk | None, missing: Sequence[int]) -> str:
    if not isinstance(plan, Plan):
        return f"unknown until the weights of {plan.meta.model['id']} are here"
    meta = plan.meta
    images = sum(len(meta.part_images(part)) for part in missing)
    batches = sum(-(-len(meta.part_images(part)) // meta.batch_size) for part in missing)
    if batches < FEW_BATCHES and not plan.settings.plan:
        return f"not measured for {batches} batch{'es' * (batches > 1)}; --plan measures"
    seconds, size = seconds_a_batch(plan, meta.part_images(missing[0]).start)
    drawing = seconds * images / size
    drawn = f"a batch of {size} was drawn in {duration(seconds)}, {size / seconds:.3g} images/s"
    chunk = max(volume.part["activations"])
    rate = bytes_a_second(disk.folder, chunk) if disk is not None else None
    if rate is None:
        return f"about {duration(drawing)}: {drawn}; how fast the disk is was not measured"
    writing = sum(volume.by_kind(len(missing), False).values()) / rate  # traces too: all is written beside drawing
    limit = "drawing" if drawing >= writing else "writing"
    beside = ", besides what capturing traces takes" if volume.traced_in(len(missing)) else ""
    return (
        f"about {duration(max(drawing, writing))}, limited by {limit}: {drawn}; files of {human_size(chunk)} were "
        f"written at {human_size(rate)}/s, {duration(writing)} for these{beside}"
    )


def _line(name: str, text: str) -> str:
    return f"  {name:<8}  {text}"


def duration(seconds: float) -> str:
    """`0.41 s`, `12 min`, `3.2 h`, `5.6 days`."""
    size, unit = next(((s, u) for s, u in ((86400, "days"), (3600, "h"), (60, "min")) if seconds >= 2 * s), (1, "s"))
    count = seconds / size
    return f"{count:.2g} {unit}" if count < 9.95 else f"{count:,.0f} {unit}"
