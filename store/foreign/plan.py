"""What an import will do, settled before it costs anything: which arrays become which sites, and the store's metadata.

What the caller did not say and the arrays cannot know (sigmas, prompts, grid, model) is assumed in one place, here;
every assumption is a sentence, printed before the import begins and kept in the store's metadata under `parent`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa

from store.errors import UsageError
from store.files import json_bytes, sha256_bytes
from store.foreign.arrays import ForeignArray
from store.foreign.prompts import made_up, read_prompts
from store.foreign.schedules import received_sigmas, scheduler_sigmas
from store.foreign.settings import ImportSettings
from store.foreign.sources import STREAMS, Key, Source, dtypes_of, facts_of, open_sources, points_of, sites_of
from store.format import StoreDtype, StoreMeta, StreamTokens, carrier_of, chunk_images, part_files
from store.sites import Stream
from store.sizes import human_size
from store.strata import RealText
from store.tokens import image_policy, joint_policy, text_policy

LIBRARIES = ("numpy", "ml_dtypes", "numcodecs", "pyarrow", "safetensors")
"""whose versions could change a byte of an imported store"""
UNKNOWN = "unknown"
SCHNELL_STEPS = 4


@dataclass(frozen=True)
class ImportPlan:
    """An import that is ready to run."""

    meta: StoreMeta
    sources: dict[Key, Source]
    prompts: pa.Table
    """one row a prompt"""
    sigmas: list[float]
    scheduled: list[float] | None
    assumed: tuple[str, ...]

    @property
    def text_tokens(self) -> int:
        return self.meta.max_sequence_length

    @property
    def read_per_image(self) -> int:
        """Bytes that are read of each image."""
        return sum(s.array.tokens * s.array.d_model * s.array.dtype.itemsize for s in self.sources.values())

    def text(self, out: Path, images: int, free: int) -> str:
        """The plan in words: what is read, what is assumed, and how many bytes and files that makes."""
        meta = self.meta
        kept = ", ".join(f"{t.kept} of {t.total} {stream} tokens" for stream, t in meta.tokens.items())
        arrays = {id(source.array): source.array for source in self.sources.values()}.values()
        lines = [f"import {', '.join(sorted({array.path.name for array in arrays}))} -> {out}"]
        lines += [f"  {array.path.name}: {array.dtype.name} {'x'.join(map(str, array.shape))}" for array in arrays]
        lines += [
            f"  {', '.join(meta.sites)}: {', '.join(meta.points)}, steps {', '.join(map(str, meta.steps))} of "
            f"{meta.num_inference_steps}; {meta.n_images} images, {kept}, {meta.store_dtype}",
            *(f"  assumed: {sentence}" for sentence in self.assumed),
            f"  {human_size(self.read_per_image * meta.n_images)} are read, "
            f"{human_size(meta.bytes_per_image * meta.n_images)} written in {meta.n_parts} parts of {meta.chunk_images} "
            f"images, {meta.n_parts * len(part_files(meta, 0))} files; {human_size(free)} free; "
            f"{human_size(meta.bytes_per_image * meta.chunk_images)} in memory",
        ]
        if images < meta.n_images:
            lines.append(f"  {meta.n_images - images} images are there already; {images} are to be imported now")
        return "\n".join(lines)


def make_plan(settings: ImportSettings) -> ImportPlan:
    """Open every array and settle every value that decides a byte of the store; every refusal is a `UsageError`."""
    sources = open_sources(settings)
    array = next(iter(sources.values())).array
    n_images = _images(settings, sources)
    tokens = {key[0].stream: source.array.tokens for key, source in sources.items()}
    assumed: list[str] = []
    grid, text_tokens = _geometry(settings, tokens, assumed)
    steps = tuple(sorted({step for _, step, _ in sources}))
    count, sigmas, scheduled, scheduler = _sigmas(settings, steps, sources, math.prod(grid), assumed)
    prompts, source = _prompts(settings, array, sources, text_tokens, assumed)
    if settings.model_id is None:
        assumed.append("nothing about the model: dictionaries of any model are taken to fit (--model-id names it)")
    store_dtype = _store_dtype(settings, sources)
    policies = _policies(settings, tokens, text_tokens, prompts)
    itemsize = np.dtype(carrier_of(store_dtype).stored).itemsize
    meta = StoreMeta(
        n_images=n_images,
        chunk_images=chunk_images(max(t.kept for t in policies.values()) * array.d_model * itemsize),
        sites=tuple(str(site) for site in sites_of(sources)),
        points=points_of(sources),
        steps=steps,
        d_model=array.d_model,
        store_dtype=store_dtype,
        codec=settings.codec,
        targets="stored",
        tokens=policies,
        height=grid[0] * settings.pixels_per_token,
        width=grid[1] * settings.pixels_per_token,
        pixels_per_token=settings.pixels_per_token,
        num_inference_steps=count,
        max_sequence_length=text_tokens,
        guidance=settings.guidance,
        seed=settings.seed,
        seeds_per_prompt=settings.seeds_per_prompt,
        cycle=False,
        batch_size=1,  # nothing was drawn: neither this nor threads decides a byte
        threads=1,
        dtype=dtypes_of(sources),
        device=UNKNOWN,
        pictures="none",
        model={
            "id": settings.model_id or UNKNOWN,
            "revision": settings.revision,
            "weights_sha256": {},
            "transformer": {},
        },
        scheduler=scheduler,
        prompts=source,
        weights={"policy": "none"},
        versions={name: version(name) for name in LIBRARIES},
        parent={"imported": facts_of(sources), "assumed": list(assumed)},
    )
    return ImportPlan(meta, sources, prompts, sigmas, scheduled, tuple(assumed))


def _images(settings: ImportSettings, sources: dict[Key, Source]) -> int:
    there = next(iter(sources.values())).array.images
    if settings.images is not None and settings.images > there:
        raise UsageError(f"--images {settings.images}: the arrays hold {there}")
    return settings.images or there


def _geometry(settings: ImportSettings, tokens: dict[Stream, int], assumed: list[str]) -> tuple[tuple[int, int], int]:
    """Rows and columns of image tokens, and the number of text tokens (0 where there is no text)."""
    image_tokens = tokens.get("img")
    grid = None if settings.grid is None else settings.grid_of()
    if grid is not None and image_tokens is not None and math.prod(grid) != image_tokens:
        raise UsageError(
            f"--grid {settings.grid}: the arrays hold {image_tokens} image tokens, which is not {math.prod(grid)}"
        )
    if grid is None and image_tokens is not None:
        side = math.isqrt(image_tokens)
        grid = (side, side) if side * side == image_tokens else (1, image_tokens)
        assumed.append(f"{image_tokens} image tokens are a grid of {grid[0]} x {grid[1]} (--grid says otherwise)")
    if "joint" in tokens and grid is None:
        raise UsageError(
            "a joint site holds text tokens, then image tokens: say --grid ROWSxCOLUMNS to tell them apart"
        )
    grid = grid or (1, 1)
    text_tokens = tokens.get("txt", tokens["joint"] - math.prod(grid) if "joint" in tokens else 0)
    if "joint" in tokens and (text_tokens < 0 or tokens["joint"] != text_tokens + math.prod(grid)):
        raise UsageError(
            f"the joint arrays hold {tokens['joint']} tokens, which are not {max(text_tokens, 0)} of text and "
            f"{grid[0]} x {grid[1]} of the image"
        )
    return grid, text_tokens


def _sigmas(
    settings: ImportSettings, steps: tuple[int, ...], sources: dict[Key, Source], image_tokens: int, assumed: list[str]
) -> tuple[int, list[float], list[float] | None, dict[str, object]]:
    """The number of sampler steps, sigma at each as received and as scheduled, and what the store says of the scheduler."""
    in_array = max(source.array.steps for source in sources.values())
    given, name = settings.sigmas_of()
    count = settings.num_inference_steps or len(given) or (in_array if in_array > 1 else SCHNELL_STEPS)
    if max(steps) >= count:
        raise UsageError(
            f"step {max(steps)} is not among {count} sampler steps (0 to {count - 1}): say how many there were with "
            "--num-inference-steps, and their sigmas with --sigma"
        )
    if given:
        if len(given) != count:
            raise UsageError(
                f"--sigma gives {len(given)} values for {count} sampler steps: one for each, whether imported or not"
            )
        return count, given, None, {"class": UNKNOWN, "config": {}}
    if name is None and count != SCHNELL_STEPS:
        raise UsageError(
            f"what sigma did the transformer get at each of the {count} sampler steps? Transcoders are conditioned on it. Say "
            "--sigma schnell or --sigma dev to have it computed as FLUX.1 does, or give the values: --sigma 1,0.9,…"
        )
    if name == "dev" and image_tokens == 1:
        raise UsageError("--sigma dev depends on the number of image tokens: say --grid ROWSxCOLUMNS")
    scheduled = scheduler_sigmas(name or "schnell", count, image_tokens)
    received = received_sigmas(scheduled)
    assumed.append(
        f"sigma is that of FLUX.1[{name or 'schnell'}] in bfloat16 with {count} steps: "
        f"{', '.join(f'{each:g}' for each in received)}" + ("" if name else " (--sigma says otherwise)")
    )
    facts: dict[str, object] = {
        "class": "FlowMatchEulerDiscreteScheduler",
        "config": {"use_dynamic_shifting": name == "dev"},
    }
    return count, received.tolist(), scheduled.tolist(), facts


def _prompts(
    settings: ImportSettings, array: ForeignArray, sources: dict[Key, Source], text_tokens: int, assumed: list[str]
) -> tuple[pa.Table, dict[str, object]]:
    """The prompts, and what the store says of their source."""
    images = min(settings.images or array.images, array.images)
    needed = -(-images // settings.seeds_per_prompt)
    if settings.prompts is None:
        table, name = made_up(array.path.name, needed), "made up"
        assumed.append(
            f"no prompts are known; texts in their place: {table['prompt'][0].as_py()!r} and so on (--prompts)"
        )
    else:
        table, name = read_prompts(settings.prompts), settings.prompts.name
        if settings.images is not None:
            table = table.slice(0, needed)
    if table.num_rows != needed:
        raise UsageError(
            f"{settings.prompts} holds {table.num_rows} prompts, and {images} images with "
            f"{settings.seeds_per_prompt} seed(s) a prompt (--seeds-per-prompt), which makes {needed}"
        )
    has_text = any(site.stream != "img" for site, _, _ in sources)
    if "text_length" in table.column_names and has_text:
        longest = max(table["text_length"].to_pylist())
        if longest > text_tokens:
            raise UsageError(
                f"{settings.prompts}: text_length is {longest}, and the arrays hold {text_tokens} text tokens"
            )
    elif has_text:
        assumed.append("all text tokens are real (a column text_length of the prompt file says otherwise)")
    digest = sha256_bytes(json_bytes(table.to_pylist()))
    return table, {"source": name, "sha256": digest, "count": table.num_rows, "split": "all"}


def _policies(
    settings: ImportSettings, tokens: dict[Stream, int], text_tokens: int, prompts: pa.Table
) -> dict[Stream, StreamTokens]:
    """What is kept of each stream; of a joint sequence what is kept of its text and of its image."""
    real = RealText.of(prompts).count(text_tokens).tolist() if "text_length" in prompts.column_names else []
    image_tokens = tokens.get("img", tokens.get("joint", 0) - text_tokens)
    made: dict[Stream, Callable[[], StreamTokens]] = {
        "img": lambda: image_policy(settings.tokens, image_tokens),
        "txt": lambda: text_policy(settings.text_tokens, text_tokens, max(real, default=text_tokens)),
        "joint": lambda: joint_policy(made["txt"](), made["img"]()),
    }
    return {stream: made[stream]() for stream in STREAMS if stream in tokens}


def _store_dtype(settings: ImportSettings, sources: dict[Key, Source]) -> StoreDtype:
    """What was asked for; else 16-bit values as they are, and bfloat16 for wider ones."""
    if settings.store_dtype is not None:
        return settings.store_dtype
    halves = {source.array.dtype == np.float16 for source in sources.values()}
    if len(halves) > 1:
        raise UsageError(f"the arrays are of {dtypes_of(sources)}: say which dtype the store has, with --store-dtype")
    return "float16" if halves == {True} else "bfloat16"
