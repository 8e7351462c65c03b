"""What a harvest will do, settled before it costs anything: the model, the prompts, and the store's metadata."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from harvest.model import (
    KNOWN_SHAPES,
    Geometry,
    choose_device,
    cpu_threads,
    defaults_of,
    geometry_of,
    is_here,
    library_versions,
    load_pipeline,
    locate_model,
    model_facts,
    shape_of,
)
from harvest.prompts import DATASET_MAX_CHARACTERS, IMAGES_DEFAULT, PromptSet, is_dataset, load_prompts, source_of
from harvest.sample import Sampler
from harvest.settings import HarvestSettings
from harvest.text import Tokenized, tokenize
from harvest.traced import choose_traced
from harvest.weights import (
    attention_bytes,
    attention_file,
    attention_file_bytes,
    file_bytes,
    weights_bytes,
    weights_files,
)
from store.errors import UsageError
from store.format import CARRIERS, StoreDtype, StoreMeta, StreamTokens, chunk_images
from store.sites import POINTS, Point, Site, Stream, parse_numbers
from store.tokens import image_policy, text_policy

if TYPE_CHECKING:
    from diffusers import FluxPipeline

MAX_TEXT_TOKENS = 512
CHARACTERS_A_TOKEN = 3
"""of English in T5, and a little less than it is, where no tokenizer is at hand"""


@dataclass(frozen=True)
class Outline:
    """What a harvest would write, as far as that can be told without the model's weights."""

    settings: HarvestSettings
    meta: StoreMeta
    geometry: Geometry
    prompts: PromptSet | None
    """None where they are far away and were not fetched"""
    longest: int
    """text tokens of the longest prompt of the source"""
    remarks: tuple[str, ...]
    """what the user should know besides"""

    @property
    def weights_file_bytes(self) -> int:
        """Bytes of a site's weights file, about."""
        return file_bytes(self.meta.d_model, self.meta.dtype)

    @property
    def attention_file_bytes(self) -> int:
        """Bytes of a traced block's weights file, about."""
        return attention_file_bytes(self.meta.d_model, self.meta.dtype)


@dataclass(frozen=True)
class Plan(Outline):
    """A harvest that is ready to run."""

    prompts: PromptSet
    sampler: Sampler
    tokenized: list[Tokenized]

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The prompt file's own columns and their types."""
        return self.prompts.columns

    @cached_property
    def _site_of_file(self) -> dict[str, Site]:
        return {name: Site.parse(site) for site, name in self.meta.weights.get("files", {}).items()}

    def weights(self, name: str) -> bytes:
        """The content of the weights file `name`, one of `meta.weights_held`."""
        transformer = self.sampler.pipe.transformer
        if name in self._site_of_file:
            return weights_bytes(transformer, self._site_of_file[name])
        assert self.meta.traced is not None
        return attention_bytes(transformer, self.meta.traced.weights.index(name))


def make_outline(settings: HarvestSettings) -> Outline:
    """What `--plan` speaks of: a `Plan`, or, without loading anything, the outline of a published model.

    The latter where its weights are not here, and for `--budget`, which needs none.
    """
    known = not locate_model(settings.model)[1] and settings.model in KNOWN_SHAPES
    if not known or (settings.budget is None and is_here(settings)):
        return make_plan(settings)
    geometry = geometry_of(KNOWN_SHAPES[settings.model], settings)
    _check_guidance(settings, KNOWN_SHAPES[settings.model].takes_guidance)
    if is_dataset(settings):
        prompts = None
        source: dict[str, Any] = {"source": source_of(settings), "split": settings.split}
        images = settings.images or IMAGES_DEFAULT["dataset"]
        characters = DATASET_MAX_CHARACTERS
    else:
        prompts = load_prompts(settings)
        source, images = prompts.source, len(prompts.prompts)
        characters = max(map(len, prompts.candidates_for_longest()))
    length = _text_length(settings)
    longest = min(characters // CHARACTERS_A_TOKEN + 1, length)
    dtype = settings.dtype or "bfloat16"
    sites = choose_sites(settings, geometry)
    meta = _meta(settings, geometry, sites, longest, images, dtype)
    meta = replace(meta, prompts=source, weights={"policy": settings.weights_policy, "files": {}})
    remarks = [f"the weights of {settings.model} were not loaded: computing in {dtype} is assumed"]
    if "txt" in meta.tokens and (settings.text_tokens != "all" or settings.budget is not None):
        remarks.append(f"the longest prompt is taken to have {longest} text tokens, where only real ones are kept")
    return Outline(settings, meta, geometry, prompts, longest, tuple(remarks))


def make_plan(settings: HarvestSettings) -> Plan:
    """Load the prompts and the model and settle every value that decides a byte of the store."""
    device = choose_device(settings.device)
    threads = cpu_threads(settings.threads)
    torch.set_num_threads(threads)
    dtype = settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    locate_model(settings.model)
    ready = None if is_dataset(settings) else load_prompts(settings)  # what is here is checked before the model is
    pipe = load_pipeline(settings, device, dtype)  # loaded, and what is far away is streamed after it
    prompts = ready or load_prompts(settings)
    shape = shape_of(pipe)
    geometry = geometry_of(shape, settings)
    _check_guidance(settings, shape.takes_guidance)
    sites = choose_sites(settings, geometry)
    length = _text_length(settings)
    tokenized = tokenize(pipe, [p.text for p in prompts.prompts], length)
    longest = _longest(pipe, settings, prompts, tokenized, length)
    meta = _meta(settings, geometry, sites, longest, len(prompts.prompts), dtype)
    meta = replace(
        meta,
        threads=threads,
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        model=model_facts(pipe, settings),
        scheduler=_scheduler_facts(pipe),
        prompts=prompts.source,
        weights=_weights_facts(settings, pipe, sites),
        versions=library_versions(),
        traces=_traces_facts(meta, pipe),
    )
    sampler = Sampler(
        pipe,
        sites,
        geometry.height,
        geometry.width,
        settings.num_inference_steps,
        length,
        settings.guidance,
        settings.pictures != "none",
    )
    remarks = _cuts(prompts, tokenized, length)
    if any(t.policy.startswith("real") for t in meta.tokens.values()) and is_dataset(settings):
        remarks += (
            f"this store can be extended only with prompts of at most {longest} text tokens, the most that it has",
        )
    return Plan(settings, meta, geometry, prompts, longest, remarks, sampler, tokenized)


def _meta(
    settings: HarvestSettings, geometry: Geometry, sites: tuple[Site, ...], longest: int, images: int, dtype: str
) -> StoreMeta:
    """What the settings and the model's sizes decide; the rest of it empty."""
    length = _text_length(settings)
    points: tuple[Point, ...] = ("mlp_in",) if settings.targets == "recomputed" else POINTS
    meta = StoreMeta(
        n_images=images,
        chunk_images=1,
        sites=tuple(str(site) for site in sites),
        points=points,
        steps=parse_numbers(settings.steps, settings.num_inference_steps, "step"),
        d_model=geometry.d_model,
        store_dtype=_store_dtype(settings, dtype),
        codec=settings.codec,
        targets=settings.targets,
        tokens=_policies(settings, sites, geometry.image_tokens, length, longest),
        height=geometry.height,
        width=geometry.width,
        pixels_per_token=geometry.pixels_per_token,
        num_inference_steps=settings.num_inference_steps,
        max_sequence_length=length,
        guidance=settings.guidance,
        seed=settings.seed,
        seeds_per_prompt=settings.seeds_per_prompt,
        cycle=settings.cycle,
        batch_size=settings.batch_size,
        threads=0,
        dtype=dtype,
        device="",
        pictures=settings.pictures,
        model={"id": settings.model},
        scheduler={},
        prompts={},
        weights={},
        versions={},
    )
    traced = choose_traced(settings, meta, geometry)
    return chunked(meta if traced is None else replace(meta, traces=traced.attributes()))


def chunked(meta: StoreMeta) -> StoreMeta:
    """The same store with the images per chunk that its largest array asks for."""
    return replace(meta, chunk_images=chunk_images(max(t.kept for t in meta.tokens.values()) * meta.row_bytes))


def _text_length(settings: HarvestSettings) -> int:
    length = settings.max_sequence_length or defaults_of(settings.model).max_sequence_length
    if length > MAX_TEXT_TOKENS:
        raise UsageError(f"--max-sequence-length {length}: FLUX takes at most {MAX_TEXT_TOKENS} text tokens")
    return length


def _check_guidance(settings: HarvestSettings, takes_guidance: bool) -> None:
    if settings.guidance and not takes_guidance:
        raise UsageError(
            f"--guidance {settings.guidance}: {settings.model} has no guidance embedding; leave --guidance at 0"
        )


def _longest(
    pipe: "FluxPipeline", settings: HarvestSettings, prompts: PromptSet, tokenized: list[Tokenized], length: int
) -> int:
    """Text tokens of the longest prompt: of those used, and where slots depend on it of all that the source has.

    So a store of more images of the same source has the same slots, and a store can be extended.
    """
    longest = max(len(t.ids) for t in tokenized)
    if settings.text_tokens == "all" or "txt" not in settings.streams.split(","):
        return longest
    texts = prompts.candidates_for_longest()
    ids = pipe.tokenizer_2(texts, truncation=True, max_length=length).input_ids
    return max(longest, *map(len, ids))


def _cuts(prompts: PromptSet, tokenized: list[Tokenized], length: int) -> tuple[str, ...]:
    different = dict(zip((p.text for p in prompts.prompts), tokenized, strict=True)).values()
    cut, clip_cut = sum(t.cut for t in different), sum(t.clip_cut for t in different)
    if not cut and not clip_cut:
        return ()
    return (f"of {len(different)} different prompts {cut} are cut at {length} T5 tokens and {clip_cut} at CLIP's 77",)


def choose_sites(settings: HarvestSettings, geometry: Geometry) -> tuple[Site, ...]:
    """The sites that `--layers` and `--streams` name; `UsageError` for a layer that the model does not have."""
    text = settings.layers.strip()
    kinds = [word.partition(":")[0] for word in text.split(",") if ":" in word]
    if any(kind not in ("double", "single") for kind in kinds):
        raise UsageError(f"--layers {text!r}: write all, 0-15, or double:0-15")
    if "single" in kinds:
        raise UsageError(
            f"--layers {text!r}: single-stream blocks are not harvested yet; {settings.model} has "
            f"double blocks 0 to {geometry.double_blocks - 1} beside its {geometry.single_blocks} single ones"
        )
    text = text.replace("double:", "")
    try:
        layers = parse_numbers(text, geometry.double_blocks, "layer")
    except UsageError as error:
        there = f"{settings.model} has double blocks 0 to {geometry.double_blocks - 1}"
        raise UsageError(
            f"--layers {settings.layers!r}: {error}. {there}: write --layers all or --layers 0-{geometry.double_blocks - 1}"
        ) from None
    streams: tuple[Stream, ...] = tuple(s for s in ("img", "txt") if s in settings.streams.split(","))  # type: ignore[misc]
    return tuple(Site("double", layer, stream) for stream in streams for layer in layers)


def _policies(
    settings: HarvestSettings, sites: tuple[Site, ...], image_tokens: int, length: int, longest: int
) -> dict[Stream, StreamTokens]:
    policies: dict[Stream, StreamTokens] = {}
    for stream in dict.fromkeys(site.stream for site in sites):
        chosen = (
            image_policy(settings.tokens, image_tokens)
            if stream == "img"
            else text_policy(settings.text_tokens, length, longest)
        )
        policies[stream] = chosen
    return policies


def _store_dtype(settings: HarvestSettings, dtype: str) -> StoreDtype:
    if settings.store_dtype is not None:
        return settings.store_dtype
    computed: dict[str, StoreDtype] = {name: name for name in CARRIERS}
    return "bfloat16" if dtype == "float32" else computed[dtype]


def _scheduler_facts(pipe: "FluxPipeline") -> dict[str, object]:
    config = {key: value for key, value in dict(pipe.scheduler.config).items() if not key.startswith("_")}
    return {"class": type(pipe.scheduler).__name__, "config": config}


def _weights_facts(settings: HarvestSettings, pipe: "FluxPipeline", sites: tuple[Site, ...]) -> dict[str, Any]:
    if settings.weights_policy == "none":
        return {"policy": "none"}
    return {"policy": settings.weights_policy, "files": weights_files(pipe.transformer, sites)}


def _traces_facts(meta: StoreMeta, pipe: "FluxPipeline") -> dict[str, Any] | None:
    if meta.traced is None:
        return None
    files = tuple(attention_file(pipe.transformer, block) for block in meta.traced.blocks)
    return replace(meta.traced, weights=files).attributes()
