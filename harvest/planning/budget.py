"""`--plan --budget 2TB`: the plan the other way round, how much of what fits into so many bytes.

Rows are token policies, from most tokens to fewest; columns are targets and store dtypes.  Everything that a store holds
counts, not the activations alone, and only whole parts do: a store of such a size can be extended.
"""

from dataclasses import dataclass, replace

from harvest.planning.choosing import token_policies
from harvest.planning.estimate import spans, volume_of
from harvest.planning.plan import Outline, chunked
from harvest.planning.traced import FEWER
from store.format import StoreDtype, StoreMeta, StreamTokens, Targets
from store.sites import POINTS, Stream
from store.sizes import human_size, parse_size, picture_size

PARTS_OF_TOKENS = (4, 8, 16, 32)
"""of the image tokens, so many times fewer: 256, 128, 64 and 32 of 1024"""
COLUMNS: tuple[StoreDtype, ...] = ("bfloat16", "fp8-e4m3", "float32")
PUBLISHED_ROWS = 256_000_000
"""rows of each site that the published transcoders were trained on"""


TARGETS: tuple[Targets, ...] = ("stored", "recomputed")


@dataclass(frozen=True)
class Policy:
    """A row of the table: flags for tokens, and what they keep."""

    flags: dict[str, str]
    tokens: dict[Stream, StreamTokens]


@dataclass(frozen=True)
class Choice:
    """A cell of the table: a kind of store, and how many images of it fit."""

    policy: Policy
    dtype: StoreDtype
    targets: Targets
    images: int

    @property
    def flags(self) -> str:
        """Ready for the command line."""
        tokens = " ".join(f"--{name} {value}" for name, value in self.policy.flags.items())
        return f"{tokens} --store-dtype {self.dtype} --targets {self.targets}"


def show(plan: Outline) -> None:
    """Print what fits into the budget of a plan's settings."""
    assert plan.settings.budget is not None
    budget = parse_size(plan.settings.budget)
    rows = choices(plan, budget)
    every = [choice for row in rows for choice in row]
    print(
        "\n".join([*_head(plan.meta, budget), "", *_table(plan.meta, rows), "", *_notes(plan), *_advice(plan, every)])
    )


def choices(plan: Outline, budget: int) -> list[list[Choice]]:
    """The table: a row for each token policy, in it stored targets in every dtype, then recomputed ones."""
    dtypes = dict.fromkeys((*COLUMNS, plan.meta.store_dtype))
    return [
        [
            Choice(policy, dtype, targets, images_within(varied(plan, policy, dtype, targets), budget))
            for targets in TARGETS
            for dtype in dtypes
        ]
        for policy in policies_of(plan)
    ]


def images_within(plan: Outline, budget: int) -> int:
    """How many images of a plan's store fit into `budget` bytes, in whole parts."""
    return volume_of(plan).parts_within(budget, new=True) * plan.meta.chunk_images


def varied(plan: Outline, policy: Policy, dtype: StoreDtype, targets: Targets) -> Outline:
    """The plan with other tokens, store dtype and targets."""
    meta = plan.meta
    weights = {**meta.weights, "policy": "copy" if targets == "recomputed" else plan.settings.weights or "ref"}
    points = POINTS[:1] if targets == "recomputed" else POINTS
    changed = replace(meta, tokens=policy.tokens, store_dtype=dtype, targets=targets, points=points, weights=weights)
    return replace(plan, meta=chunked(changed))


def policies_of(plan: Outline) -> list[Policy]:
    """Token policies from most tokens to fewest, what was asked for among them."""
    settings, streams = plan.settings, plan.meta.streams
    sparse = "real" if settings.text_tokens == "all" else settings.text_tokens
    if streams == ("txt",):
        asked = [("all", words) for words in ("all", settings.text_tokens, "real+64", "real+16", "real")]
    else:
        counts = [str(max(plan.geometry.image_tokens // part, 1)) for part in PARTS_OF_TOKENS]
        asked = [
            ("all", "all"),
            (settings.tokens, settings.text_tokens),
            *((count, sparse) for count in ("all", *counts)),
        ]
    found: dict[tuple[int, ...], Policy] = {}
    for tokens, words in asked:
        policy = policy_of(plan, tokens, words)
        found.setdefault(tuple(each.kept for each in policy.tokens.values()), policy)
    return sorted(found.values(), key=lambda policy: -sum(each.kept for each in policy.tokens.values()))


def policy_of(plan: Outline, tokens: str, words: str) -> Policy:
    """What `--tokens` and `--text-tokens` would keep of the streams of a plan."""
    streams, geometry = plan.meta.streams, plan.geometry
    flags = {"tokens": tokens} if streams != ("txt",) else {}
    flags |= {"text-tokens": words} if streams != ("img",) else {}
    asked = replace(plan.settings, tokens=tokens, text_tokens=words)
    length = geometry.family.text_before + plan.meta.max_sequence_length
    return Policy(flags, token_policies(asked, plan.meta.site_objects, geometry.image_tokens, length, plan.longest))


def _head(meta: StoreMeta, budget: int) -> list[str]:
    layers = {stream: [s.layer for s in meta.site_objects if s.stream == stream] for stream in meta.streams}
    sites = ", ".join(f"{stream}_{spans(numbers)}" for stream, numbers in layers.items())
    first = meta.sites[0]
    return [
        f"what fits into {human_size(budget)}: {meta.model['id']}, {picture_size(meta.width, meta.height)}, sites {sites}, "
        f"steps {spans(meta.steps)}, pictures {meta.pictures}"
        + (f", traces of {meta.traced.text()}" if meta.traced is not None else ""),
        f"images, and in brackets rows to train on at {first} and every other {meta.streams[0]} site",
    ]


def _table(meta: StoreMeta, rows: list[list[Choice]]) -> list[str]:
    shown = [[choice for choice in row if choice.dtype in COLUMNS] for row in rows]
    cells = [[_cell(choice, meta) for choice in row] for row in shown]
    width = max(10, *(len(cell) for row in cells for cell in row))
    flags = list(rows[0][0].policy.flags)
    margins = [["", *(f"--{name}" for name in flags)], *(["", *row[0].policy.flags.values()] for row in rows)]
    widths = [max(len(margin[column]) for margin in margins) for column in range(len(flags) + 1)]
    left = ["  ".join(f"{word:<{size}}" for word, size in zip(m, widths, strict=True)) for m in margins]
    half = (width + 2) * len(COLUMNS)
    over = "".join(f"  {f'--targets {targets}':<{half - 2}}" for targets in TARGETS)
    return [
        (" " * len(left[0]) + over).rstrip(),
        *(
            line + "".join(f"  {cell:>{width}}" for cell in row)
            for line, row in zip(left, [COLUMNS * 2, *cells], strict=True)
        ),
    ]


def _notes(plan: Outline) -> list[str]:
    notes = ["float16 takes as much as bfloat16"]
    notes += ["zstd would compress: these are sizes before it"] if plan.meta.codec == "zstd" else []
    notes.append(f"the published transcoders saw {_short(PUBLISHED_ROWS)} rows of each site")
    return [*plan.remarks, "; ".join(notes)]


def _advice(plan: Outline, every: list[Choice]) -> list[str]:
    """Flags that can be pasted: for the images asked for, or as many as fit as asked."""
    meta, wanted = plan.meta, plan.settings.images
    asked = (meta.store_dtype, meta.targets)
    if wanted is None:
        same = [c for c in every if c.policy.tokens == meta.tokens and (c.dtype, c.targets) == asked]
        if not any(choice.images for choice in every):
            return [f"not even one part fits into that. {_remedy(meta)}"]
        return [f"as asked: --images {c.images} {c.flags}" for c in same if c.images]
    lines: list[str] = []
    most = 0
    for dtype in dict.fromkeys((meta.store_dtype, "fp8-e4m3")):
        for targets in TARGETS:
            fits = [c for c in every if (c.dtype, c.targets) == (dtype, targets) and c.images >= wanted]
            tokens = sum(t.kept for t in fits[0].policy.tokens.values()) if fits else 0
            if tokens > most and (targets == "recomputed" or meta.targets == "stored"):
                most = tokens
                lines.append(("  or, with more tokens: " if lines else f"{wanted:,} images fit with ") + fits[0].flags)
    if lines:
        return lines
    best = max(every, key=lambda choice: choice.images)
    most_images = f"at most {best.images:,} do, with {best.flags}" if best.images else "not even one part does"
    return [f"{wanted:,} images fit into none of these: {most_images}. {_remedy(meta)}"]


def _remedy(meta: StoreMeta) -> str:
    traces = "" if meta.traced is None else f"; of traces, {FEWER}"
    return f"Keep fewer layers (--layers) or steps (--steps){traces}"


def _cell(choice: Choice, meta: StoreMeta) -> str:
    rows = choice.images * choice.policy.tokens[meta.streams[0]].kept * len(meta.steps)
    return f"{choice.images:,} ({_short(rows)})" if choice.images else "none"


def _short(count: int) -> str:
    """`6.77 M`"""
    for size, unit in ((10**12, " T"), (10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
