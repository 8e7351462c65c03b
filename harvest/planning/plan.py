"""What a harvest will do, settled before it costs anything: the model, the prompts, and the store's metadata."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from harvest.models.ahead import encode_first, encoded_alone
from harvest.models.compiling import check_compile, compile_blocks
from harvest.models.defaults import defaults_of, guidance_of, remarks_of, steps_of
from harvest.models.embeddings import Embeddings
from harvest.models.loading import check_offload, load_frame, load_weights, place
from harvest.models.model import (
    KNOWN_SHAPES,
    Geometry,
    choose_device,
    cpu_threads,
    facts_without_weights,
    geometry_of,
    is_here,
    library_versions,
    locate_model,
    model_facts,
    shape_of,
)
from harvest.models.pipelines import refuse_unfit
from harvest.models.quantizing import check_quantize
from harvest.models.text import Tokenized, cuts_said, encode, longest_of, tokenize
from harvest.models.weights import (
    attention_bytes,
    attention_file,
    attention_file_bytes,
    file_bytes,
    weights_bytes,
    weights_files,
)
from harvest.planning.choosing import asked_layers, asked_numbers, choose_sites, reads_text, token_policies
from harvest.planning.parameters import configurations_of
from harvest.planning.traced import choose_traced
from harvest.prompts import DATASET_MAX_CHARACTERS, IMAGES_DEFAULT, PromptSet, is_dataset, load_prompts, source_of
from harvest.sample import Sampler
from harvest.settings import HarvestSettings
from harvest.tiny_flux.scenes import PIXELS
from store.errors import UsageError
from store.format import CARRIERS, StoreDtype, StoreMeta, chunk_images
from store.sites import POINTS, Point, Site

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
    """real text tokens of the prompt of the source with the most"""
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

    The latter where its weights are not here, and for `--budget` and `--scale` with a stated rate, which need none.  With
    `--scale`, `UsageError` for a model that is neither published nor here: nothing is downloaded for it.
    """
    known = not locate_model(settings.model)[1] and settings.model in KNOWN_SHAPES
    needs_none = settings.budget is not None or (settings.scale is not None and settings.images_per_second is not None)
    if settings.scale is not None and not known:
        configurations_of(settings)  # which refuses what would have to be downloaded
    if not known or (not needs_none and is_here(settings)):
        return make_plan(settings)
    geometry = geometry_of(KNOWN_SHAPES[settings.model], settings)
    refuse_unfit(settings, geometry.family)
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
    longest = sum(min(characters // CHARACTERS_A_TOKEN + 1, places) for places in (geometry.family.text_before, length))
    dtype = settings.dtype or "bfloat16"
    sites = choose_sites(settings, geometry, geometry.family)
    meta = _meta(settings, geometry, sites, longest, images, dtype)
    meta = replace(meta, prompts=source, weights={"policy": settings.weights_policy, "files": {}})
    remarks = [
        *remarks_of(settings),
        *_unknown_scenes(geometry, prompts),
        f"the weights of {settings.model} were not loaded: computing in {dtype} is assumed",
    ]
    sparse = settings.text_tokens != "all" or settings.budget is not None or settings.scale is not None
    if sparse and any(stream != "img" for stream in meta.tokens):
        remarks.append(f"the longest prompt is taken to have {longest} text tokens, where only real ones are kept")
    return Outline(settings, meta, geometry, prompts, longest, tuple(remarks))


def make_plan(settings: HarvestSettings, accept: Callable[[Outline], object] | None = None) -> Plan:
    """Load the prompts and the model and settle every value that decides a byte of the store.

    With `--text-encoders first`, `accept` is shown what is known before the prompts are encoded, and may refuse it.
    """
    asked_layers(settings)  # which refuses what needs no model
    device = _device(settings)
    threads = cpu_threads(settings.threads)
    torch.set_num_threads(threads)
    dtype = settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    locate_model(settings.model)
    ready = None if is_dataset(settings) else load_prompts(settings)  # what is here is checked before the model is
    frame = load_frame(settings)
    prompts = ready or load_prompts(settings)
    shape = shape_of(frame.pipe)
    geometry = geometry_of(shape, settings)
    _check_guidance(settings, shape.takes_guidance)
    sites = choose_sites(settings, geometry, geometry.family)
    length = _text_length(settings)
    texts = [p.text for p in prompts.prompts]
    tokenized = tokenize(frame.pipe, texts, length)
    longest = _longest(frame.pipe, settings, prompts, tokenized, length)
    meta = _meta(settings, geometry, sites, longest, len(prompts.prompts), dtype)
    alone = encoded_alone(settings)
    meta = replace(
        meta,
        threads=threads,
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        model=facts_without_weights(frame.pipe, settings, alone),
        scheduler=_scheduler_facts(frame.pipe),
        prompts=prompts.source,
        weights={"policy": settings.weights_policy, "files": {}},
        versions=library_versions(),
    )
    remarks = remarks_of(settings) + _unknown_scenes(geometry, prompts) + _cuts(geometry, prompts, tokenized, length)
    if accept is not None and settings.text_encoders == "first":
        accept(Outline(settings, meta, geometry, prompts, longest, remarks))
    first = encode_first(settings, frame, meta, texts, alone, device) if settings.text_encoders == "first" else None
    encoded = {} if first is None else dict(first.weights)
    pipe = load_weights(settings, frame, dtype, [part for part in frame.parts if part not in encoded])
    meta = replace(
        meta,
        model=model_facts(pipe, settings, encoded, alone),
        weights=_weights_facts(settings, pipe, sites),
        traces=_traces_facts(meta, pipe),
    )
    if settings.pictures == "none" and not geometry.family.vae_always:
        pipe.vae = None  # its weights are hashed, and nothing needs them
    place(pipe, device, settings.offload)
    if settings.compile:
        compile_blocks(pipe.transformer)
    embeddings = first.embeddings if first is not None else _embeddings(pipe, length) if alone else None
    sampler = _sampler(pipe, meta, embeddings)
    if any(t.policy.startswith("real") for t in meta.tokens.values()) and is_dataset(settings):
        remarks += (
            f"this store can be extended only with prompts of at most {longest} text tokens, the most that it has",
        )
    if first is not None:
        remarks += (first.remark,)
    return Plan(settings, meta, geometry, prompts, longest, remarks, sampler, tokenized)


def _device(settings: HarvestSettings) -> torch.device:
    """The device of a run; `UsageError` for one that is not there, and for what cannot be done on it."""
    device = choose_device(settings.device)
    check_offload(settings.offload, device)
    check_quantize(settings.quantize, device)
    if settings.compile:
        check_compile(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where bitsandbytes quantises
    return device


def _sampler(pipe: Any, meta: StoreMeta, embeddings: Embeddings | None) -> Sampler:
    """What draws the images of a store."""
    sizes = meta.height, meta.width, meta.num_inference_steps, meta.max_sequence_length, meta.guidance
    return Sampler(pipe, meta.site_objects, *sizes, meta.pictures != "none", embeddings)


def _embeddings(pipe: Any, length: int) -> Embeddings:
    """Each prompt's embedding by itself, made when it is first drawn."""
    return Embeddings(lambda unit: encode(pipe, unit, length), True, lambda: pipe._execution_device)


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
        steps=asked_numbers("--steps", settings.steps, steps_of(settings), "step"),
        d_model=geometry.d_model,
        store_dtype=_store_dtype(settings, dtype),
        codec=settings.codec,
        targets=settings.targets,
        tokens=token_policies(settings, sites, geometry.image_tokens, geometry.family.text_before + length, longest),
        height=geometry.height,
        width=geometry.width,
        pixels_per_token=geometry.pixels_per_token,
        num_inference_steps=steps_of(settings),
        max_sequence_length=length,
        guidance=guidance_of(settings),
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
    length = settings.max_sequence_length or defaults_of(settings.model, settings.revision).max_sequence_length
    if length > MAX_TEXT_TOKENS:
        raise UsageError(f"--max-sequence-length {length}: the pipelines take at most {MAX_TEXT_TOKENS} text tokens")
    return length


def _check_guidance(settings: HarvestSettings, takes_guidance: bool) -> None:
    if settings.guidance and not takes_guidance:
        raise UsageError(
            f"--guidance {settings.guidance}: {settings.model} has no guidance embedding; leave --guidance at 0"
        )


def _longest(
    pipe: "FluxPipeline", settings: HarvestSettings, prompts: PromptSet, tokenized: list[Tokenized], length: int
) -> int:
    """Real text tokens of the prompt with the most: of those used, and where slots depend on it of all that the source has.

    So a store of more images of the same source has the same slots, and a store can be extended.
    """
    longest = max(t.real for t in tokenized)
    if settings.text_tokens == "all" or not reads_text(settings):
        return longest
    texts = prompts.candidates_for_longest()
    return max(longest, longest_of(pipe, texts, length))


def _unknown_scenes(geometry: Geometry, prompts: PromptSet | None) -> tuple[str, ...]:
    """That what our captions ask for is not looked for in pictures of another size than the judge reads."""
    known = prompts is not None and prompts.prompts[0].scene is not None
    if not known or (geometry.height, geometry.width) == (PIXELS, PIXELS):
        return ()
    return (
        f"no column truth (for python -m analyze truth): scenes are read from pictures of {PIXELS} x {PIXELS} pixels alone",
    )


def _cuts(geometry: Geometry, prompts: PromptSet, tokenized: list[Tokenized], length: int) -> tuple[str, ...]:
    different = dict(zip((p.text for p in prompts.prompts), tokenized, strict=True)).values()
    return cuts_said(geometry.family, tuple(different), length)


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
