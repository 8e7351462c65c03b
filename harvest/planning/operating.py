"""`--plan --scale 1000,60000,1000000`: what to buy or reserve for so many prompts, with the reason of every number.

1. Columns are token policies: everything, what was asked for, a sixteenth of the image tokens, and the same at its smallest.
2. Disk and files follow from the metadata of a store, memory from the model's configuration (`.parameters`), all by formulas.
3. Time follows from a rate only: one that was stated, or that of a batch that is drawn now.  Without one it is unknown.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from harvest.models.model import DTYPES
from harvest.planning import reserve
from harvest.planning.budget import Policy, policy_of, varied
from harvest.planning.device_memory import GIVEN_UP, Way, device_bytes, ways_of, weights_on_device, weights_on_host
from harvest.planning.estimate import duration, spans
from harvest.planning.parameters import Held, Part, file_dtypes, held_by_a_batch, parts_of_model
from harvest.planning.plan import Outline
from harvest.planning.rates import Rates, rates_of
from harvest.planning.reserve import Reserve
from harvest.planning.volume import PICTURE_BYTES_A_PIXEL, part_bytes
from harvest.staging import batch_of, slots_of
from store.format import StoreMeta
from store.sizes import human_size, many, picture_size

SPARSE = 16
"""the sparse columns keep one image token in so many: 64 of 1024"""
PYTHON = 6 * 10**8
"""of Python, torch, diffusers and transformers in a process that harvests; measured on Linux, and about so everywhere"""
LETTERS = "ABCDE"
WIDTH = 120
"""of lines that reasons are broken into"""


@dataclass(frozen=True)
class Column:
    """A kind of store that is compared with others."""

    policy: Policy
    outline: Outline

    @property
    def meta(self) -> StoreMeta:
        """Of the store, but for its number of images."""
        return self.outline.meta

    @property
    def flags(self) -> str:
        """Ready for the command line."""
        tokens = " ".join(f"--{name} {value}" for name, value in self.policy.flags.items())
        return f"{tokens} --store-dtype {self.meta.store_dtype} --targets {self.meta.targets}"


@dataclass(frozen=True)
class Table:
    """Named rows of cells, and the reasons of what they say."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    why: tuple[tuple[str, str], ...]

    def text(self) -> str:
        """As it is printed."""
        left = max(len(name) for name, _ in (*self.rows, (self.title, ())))
        widths = [
            max(len(column), *(len(cells[place]) for _, cells in self.rows if cells))
            for place, column in enumerate(self.columns)
        ]
        lines = [
            (f"{name:<{left + 2}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths, strict=False))).rstrip()
            for name, cells in ((self.title, self.columns), *((f"  {name}", cells) for name, cells in self.rows))
        ]
        why = [
            wrap(f"{name}: {reason}", WIDTH, initial_indent="    ", subsequent_indent="      ")
            for name, reason in self.why
        ]
        return "\n".join([*lines, *(line for each in why for line in each)])


def show(plan: Outline) -> None:
    """Print what so many prompts as `--scale` names take."""
    print(operating_text(plan))


def operating_text(plan: Outline) -> str:
    """What `--plan --scale` prints; the same for the same settings, as long as rates are stated."""
    parts = parts_of_model(plan.settings)
    columns = columns_of(plan)
    held = _held(columns, parts)
    reserved = [[Reserve(column.outline, prompts) for column in columns] for prompts in plan.settings.scales]
    cuda = plan.meta.device != "cpu" and plan.settings.device != "cpu"
    tables = [
        _disk(reserved, parts),
        _host(reserved, parts, held, cuda),
        *([_device(plan, columns, parts, held)] if cuda else []),
        _training(plan.meta),
        time_table(reserved, rates_of(plan)),
    ]
    return "\n\n".join(["\n".join(_head(plan, columns, parts)), *(table.text() for table in tables)])


def _held(columns: Sequence[Column], parts: tuple[Part, ...]) -> list[Held]:
    """What a batch of each column holds; columns differ in it by their greatest batch alone."""
    by_batch: dict[int, Held] = {}
    for meta in (column.meta for column in columns):
        if batch_of(meta) not in by_batch:
            by_batch[batch_of(meta)] = held_by_a_batch(parts, meta, meta.dtype)
    return [by_batch[batch_of(column.meta)] for column in columns]


def columns_of(plan: Outline) -> list[Column]:
    """The kinds of stores that are compared, from most tokens to fewest, what was asked for among them."""
    total = plan.geometry.image_tokens
    some, words = str(max(total // SPARSE, 1)), plan.settings.text_tokens
    meta = plan.meta
    asked = [policy_of(plan, *each) for each in (("all", "all"), (plan.settings.tokens, words), (some, "real"))]
    found = {tuple(t.kept for t in policy.tokens.values()): policy for policy in reversed(asked)}
    policies = sorted(found.values(), key=lambda policy: -sum(t.kept for t in policy.tokens.values()))
    columns = [Column(policy, varied(plan, policy, meta.store_dtype, meta.targets)) for policy in policies]
    family = plan.geometry.family
    recomputable = all(family.streams[stream].recomputable for stream in meta.streams)
    smallest = varied(plan, asked[-1], "fp8-e4m3", "recomputed" if recomputable else meta.targets)
    return [*columns, *([Column(asked[-1], smallest)] if smallest.meta not in [each.meta for each in columns] else [])]


def _letters(columns: Sequence[object]) -> tuple[str, ...]:
    return tuple(LETTERS[: len(columns)])


def _head(plan: Outline, columns: Sequence[Column], parts: Sequence[Part]) -> list[str]:
    meta = plan.meta
    sites = {stream: [s.layer for s in meta.site_objects if s.stream == stream] for stream in meta.streams}
    names = ", ".join(f"{stream}_{spans(layers)}" for stream, layers in sites.items())
    guidance = f", guidance {meta.guidance:g}" if meta.guidance else ""
    lines = [
        f"what to reserve for {meta.model['id']}: {'; '.join(f'{n:,}' for n in plan.settings.scales)} prompts",
        f"  drawing   {picture_size(meta.width, meta.height)} in {many(meta.num_inference_steps, 'step')} (kept: {spans(meta.steps)})"
        f"{guidance}, {many(meta.seeds_per_prompt, 'image')} a prompt, at most {meta.batch_size} a batch, in {meta.dtype}",
        f"  sites     {names}: {len(meta.sites)} of {meta.d_model:,} channels; pictures {meta.pictures}",
    ]
    for letter, column in zip(LETTERS, columns, strict=False):
        m = column.meta
        kept = " and ".join(f"{t.kept:,} of {t.total:,} {stream} tokens" for stream, t in m.tokens.items())
        lines.append(
            f"  {letter}         {kept}, {' and '.join(m.points)} in {m.store_dtype}: {human_size(m.bytes_per_image)} an image, "
            f"{m.chunk_images} images a part"
        )
        lines.append(f"            {column.flags}")
    lines += [
        f"  {part.name:<14}  {part.parameters:,} parameters, counted from its configuration: "
        f"{human_size(part.weights(meta.dtype))} in {meta.dtype}"
        for part in parts
    ]
    return [*lines, *(f"  {remark}" for remark in plan.remarks)]


def _disk(reserved: Sequence[Sequence[Reserve]], parts: Sequence[Part]) -> Table:
    config: Any = next(part for part in parts if part.name == "transformer").module.config
    first = reserved[0][0]
    meta, settings = first.meta, first.outline.settings
    width, pooled = config.joint_attention_dim, getattr(config, "pooled_projection_dim", None) or 0
    ahead = settings.text_encoders == "first"

    def everything(each: Reserve) -> int:
        embedded = each.embeddings(width, pooled) if ahead else 0
        return each.store + each.packs + each.scratch + each.dictionaries + embedded

    kinds: dict[str, Callable[[Reserve], str]] = {
        "store, activations": lambda each: human_size(each.by_kind["activations"]),
        **({} if meta.traced is None else {"store, traces": lambda each: human_size(each.by_kind["traces"])}),
        "store, all else": lambda each: human_size(
            each.store - each.by_kind["activations"] - each.by_kind.get("traces", 0)
        ),
        "store, files and folders": lambda each: f"{each.inodes:,}",
        "packs, at most": lambda each: human_size(each.packs),
        "packs, scratch": lambda each: human_size(each.scratch),
        "dictionaries": lambda each: human_size(each.dictionaries),
        "text embeddings": lambda each: human_size(each.embeddings(width, pooled)),
        "all" if ahead else "all but embeddings": lambda each: human_size(everything(each)),
    }
    rows: list[tuple[str, tuple[str, ...]]] = []
    for row in reserved:
        rows.append((f"{row[0].prompts:,} prompts", ()))
        rows += [(f"  {name}", tuple(cell(each) for each in row)) for name, cell in kinds.items()]
    kept = " + ".join(
        f"{sum(s.stream == stream for s in meta.site_objects)} x {t.kept}" for stream, t in meta.tokens.items()
    )
    parameters = reserve.parameters_of(meta.d_model)
    zstd = "; --codec zstd compresses them, which is not foreseen: sizes are before it" if meta.codec == "zstd" else ""
    pictures = (
        f"pictures at {PICTURE_BYTES_A_PIXEL[meta.pictures]:g} B a pixel ({meta.pictures}), "
        if meta.pictures != "none"
        else ""
    )
    copied = "where targets are recomputed" if settings.weights != "copy" else "(--weights copy)"
    matrices = f"and MLP matrices once {copied}" + (
        "" if meta.traced is None else ", and attention matrices of traced blocks"
    )
    traces = [] if meta.traced is None else [("store, traces", f"{meta.traced.text()}, however many prompts there are")]
    why = (
        ("store, activations", f"images x {many(len(meta.steps), 'step')} x ({kept} rows, in {LETTERS[0]}) x "
         f"{len(meta.points)} points x {meta.row_bytes:,} B, the last part filled up{zstd}"),
        *traces,
        ("store, all else", f"{pictures}prompts, kept tokens, statistics, checksums, {matrices}; estimated"),
        ("store, files and folders", "a file for each site, step, point and part, and a few; a part is a power of two of images "
         "(4 to 64) whose largest file is near 24 MiB"),
        ("packs, at most", "the kept rows of train and val, shuffled, with 14 or 15 B of provenance each; fp8 is widened to bfloat16; text "
         "slots that prompts leave empty are counted and not written. Pack the sites that you train next, not all"),
        ("packs, scratch", f"the largest site once more while it is packed, where it is larger than --memory "
         f"{human_size(reserve.PACK_MEMORY)}"),
        ("dictionaries", f"one transcoder a site, {reserve.EXPANSION} x {meta.d_model:,} features, {parameters:,} parameters in float32; "
         "and twice the state (12 B a parameter) of one in training"),
        ("text embeddings", f"prompts x ({first.text_places} x {width:,} + {pooled:,}) numbers in {meta.dtype}, beside the store "
         f"(OUT.runs), only with --text-encoders first{'' if ahead else '; not in the sum'}. They may go when the store is finished"),
    )  # fmt: skip
    return Table("disk", _letters(reserved[0]), tuple(rows), why)


def _host(reserved: Sequence[Sequence[Reserve]], parts: tuple[Part, ...], held: Sequence[Held], cuda: bool) -> Table:
    metas = [each.meta for each in reserved[-1]]
    settings, dtype = reserved[0][0].outline.settings, metas[0].dtype
    way, kept = Way(settings.offload, settings.quantize, settings.text_encoders), file_dtypes(settings, parts)
    mapped = [name for name, files_in in kept.items() if files_in == dtype]
    weights = weights_on_host(way, parts, dtype, mapped)
    here = weights.drawing if cuda else sum(part.weights(dtype) for part in parts)
    rows: dict[str, list[int]] = {
        "two parts": [reserve.host_parts(meta) for meta in metas],
        "staging": [reserve.staging_on_host(meta, cuda) for meta in metas],
        "weights": [here for _ in metas],
    }
    if not cuda:
        rows["a batch"] = [max(each.encoding, each.denoising or 0, each.decoding) for each in held]
    rows["pictures"] = [2 * 3 * m.height * m.width * m.chunk_images * (m.pictures != "none") for m in metas]
    rows["Python"] = [PYTHON for _ in metas]
    drawing = [sum(each) for each in zip(*rows.values(), strict=True)]
    if cuda:
        rows |= {"drawing": drawing, "loading": [weights.loading + PYTHON for _ in metas]}
    rows["in all"] = [max(each) for each in zip(drawing, rows.get("loading", drawing), strict=True)]
    packs = {f"pack of {row[0].prompts:,} prompts": [each.pack_knows for each in row] for row in reserved}
    at_once = f"{slots_of(metas[0])} slots" if slots_of(metas[0]) > 1 else "one slot"
    why = [
        ("two parts", f"one is drawn while one is written: 2 x {human_size(part_bytes(metas[0]))} in {LETTERS[0]} "
         "(images a part x rows x steps x points x channels), however many prompts there are"),
        ("staging", f"what one step of a batch keeps, {at_once} of it in {LETTERS[0]}, in the store's dtype and "
         "pinned: torch rounds each buffer (a slot, stream and point) up to a power of two" if cuda else
         "what a hook chooses and converts: a batch's kept rows of the largest site, as computed and in float32"),
    ]  # fmt: skip
    if cuda:
        stays, grouped = (
            weights_on_host(Way(o, "none", way.text_encoders), parts, dtype, mapped) for o in ("model", "group")
        )
        why += [
            ("weights", f"none where they are on the device; with --offload they stay here, {human_size(stays.drawing)}, and "
             f"with --offload group {human_size(grouped.drawing)}: it pins each matrix of the transformer's blocks, rounded up likewise"),
            ("loading", f"Python, and weights until they are on the device: {_loading(kept, dtype)}"),
            ("in all", "the greater of drawing, which is the sum of the rows above it, and loading"),
        ]  # fmt: skip
    else:
        why += [
            ("weights", f"all parts in {dtype}"),
            ("a batch", "the greatest of encoding, denoising and decoding, as the modules hold it"),
        ]
    why += [
        ("pictures", "3 B a pixel of the images of two parts"),
        ("Python", "torch, diffusers and transformers as they are imported, about"),
        ("pack of …", f"what `store pack` knows of rows and commits; it comes out of --memory, which must be more than that and a "
         f"shard of 256 MB (default {human_size(reserve.PACK_MEMORY)})"),
    ]  # fmt: skip
    cells = {name: tuple(map(human_size, values)) for name, values in {**rows, **packs}.items()}
    return Table("memory of a worker (RAM)", _letters(metas), tuple(cells.items()), tuple(why))


def _loading(kept: Mapping[str, str | None], dtype: str) -> str:
    """Which parts are converted while they are loaded, and lie in RAM until they are on the device, and which are not."""
    kinds = {
        kind: [name for name, files_in in kept.items() if files_in == kind] for kind in dict.fromkeys(kept.values())
    }
    said = []
    for kind, names in kinds.items():
        of = f"the files of {' and '.join(names)}" if len(kinds) > 1 else "the files"
        if kind == dtype:
            said.append(f"{of} are in {dtype}, and mapped: no memory of the process")
        elif kind is None:
            said.append(
                f"which dtype {of} are in is not known from here; counted as if it were another than {dtype}, so that all are converted"
            )
        else:
            said.append(f"{of} are in {'several dtypes' if kind == 'mixed' else kind}, and converted to {dtype}")
    return "; ".join(said)


def _device(plan: Outline, columns: Sequence[Column], parts: Sequence[Part], held: Sequence[Held]) -> Table:
    dtype = plan.meta.dtype
    rows = []
    for way in ways_of(plan.settings):
        found = [
            device_bytes(way, parts, dtype, each, reserve.staging_on_device(column.meta))
            for column, each in zip(columns, held, strict=True)
        ]
        weights = weights_on_device(way, parts, dtype)
        most = human_size(max(weights.encoding, weights.denoising, weights.decoding))
        rows.append((way.flags, (most, *("unknown" if size is None else human_size(size) for size in found))))
    batches = [batch_of(column.meta) for column in columns]

    def said(sizes: Sequence[int | None]) -> str:
        return ", ".join(
            "unknown" if s is None else f"{human_size(s)} in {n}" for n, s in zip(LETTERS, sizes, strict=False)
        )

    staging = [reserve.staging_on_device(column.meta) for column in columns]
    batch = ", ".join(f"{size} in {letter}" for letter, size in zip(LETTERS, batches, strict=False))
    size = DTYPES[dtype].itemsize
    why = (
        ("weights", f"parameters x {size} B, of all parts that are on the device at once; quantised linear layers of the transformer "
         "x 1 B (int8) or 4.5 bits (nf4 with a float32 scale for 64)"),
        ("first", "text encoders are gone before the transformer comes: the greater of both"),
        ("model, group, sequential", "one part; the two largest neighbouring blocks and what is outside of blocks; the largest layer. The "
         "rest lies in RAM"),
        ("a batch", f"the greatest of three phases, found by running the modules on tensors without values, attention fused: a batch "
         f"is {batch} (never more than a part); encoding {said([h.encoding for h in held])}; denoising "
         f"{said([h.denoising for h in held])}; decoding {said([h.decoding for h in held])}"),
        ("staging", f"kept rows of one step, two slots (one above {human_size(8 * 2**30)}), and converted to the store's dtype "
         f"where that differs: {said(staging)}"),
        ("beside", f"{human_size(GIVEN_UP)} for the CUDA context and what allocators round up: a guess. Workspaces of libraries are not "
         "counted: leave a tenth free, or lower --batch-size"),
    )  # fmt: skip
    return Table("memory of a GPU", ("weights", *_letters(columns)), tuple(rows), why)


def _training(meta: StoreMeta) -> Table:
    parameters = reserve.parameters_of(meta.d_model)
    needed = reserve.training_bytes(meta.d_model)
    return Table(
        "training, a dictionary at a time",
        ("",),
        (("device", (human_size(needed),)), ("RAM beside it", (human_size(2 * 256 * 10**6 + 12 * parameters + 4 * 10**8),))),
        (
            ("device", f"weights and moments {human_size(12 * parameters)} (12 B a parameter), gradients and columns that get unit norm "
             f"{human_size(4 * parameters + 4 * meta.d_model * meta.d_model * reserve.EXPANSION)}, and what a step of {reserve.BATCH:,} "
             f"rows holds ({reserve.STEP_ENTRY} B an entry of rows x features); the first part again for each model --together"),
            ("RAM beside it", "two shards of 256 MB, a copy of the state while it is saved, Python"),
        ),
    )  # fmt: skip


def time_table(reserved: Sequence[Sequence[Reserve]], rates: Rates) -> Table:
    """How long drawing and writing take by the rates that are known, or that they are unknown."""
    columns = _letters(reserved[0])
    if rates.images is None:
        return Table(
            "time", columns, (("drawing", tuple("unknown" for _ in columns)),), (("drawing", rates.why_images),)
        )
    rate = rates.images
    rows: list[tuple[str, tuple[str, ...]]] = []
    for row in reserved:
        seconds = [each.meta.n_images / rate for each in row]
        rows.append((f"{row[0].prompts:,} prompts, drawing", tuple(duration(each) for each in seconds)))
        if rates.disk is not None:
            written = [each.store / rates.disk for each in row]
            rows.append((f"{row[0].prompts:,} prompts, writing", tuple(duration(each) for each in written)))
    needed = [each.store / each.meta.n_images * rate for each in reserved[-1]]
    rows.append(("disk that keeps up", tuple(f"{human_size(each)}/s" for each in needed)))
    why = [("drawing", f"images / rate, of one device: {rates.why_images}. n workers take an n-th of it")]
    if rates.disk is not None:
        why.append(("writing", f"bytes of the store / rate: {rates.why_disk}. Both go on at once: the greater counts"))
    why.append(("disk that keeps up", "bytes of the store an image x images/s: for a slower one the model waits"))
    return Table("time", columns, tuple(rows), tuple(why))
