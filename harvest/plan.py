"""What a harvest will do, settled before it costs anything: the model, the prompts, and the store's metadata."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import safetensors.torch
import torch

from harvest.model import (
    Geometry,
    choose_device,
    cpu_threads,
    defaults_of,
    geometry_of,
    library_versions,
    load_pipeline,
    locate_model,
    mlp_weights,
    model_facts,
    tensors_hash,
)
from harvest.prompts import PromptSet, is_dataset, load_prompts
from harvest.rows import column_types
from harvest.sample import Sampler
from harvest.settings import HarvestSettings
from harvest.text import Tokenized, tokenize
from store.errors import UsageError
from store.format import CARRIERS, StoreDtype, StoreMeta, StreamTokens, chunk_images
from store.sites import POINTS, Site, Stream, parse_numbers
from store.tokens import image_policy, text_policy

if TYPE_CHECKING:
    from diffusers import FluxPipeline


@dataclass(frozen=True)
class Plan:
    """A harvest that is ready to run."""

    meta: StoreMeta
    sampler: Sampler
    prompts: PromptSet
    tokenized: list[Tokenized]
    columns: dict[str, pa.DataType]
    """the prompt file's own columns and their types"""

    def weights(self) -> bytes | None:
        """The content of the file that `--weights copy` puts into the store."""
        if self.meta.weights["policy"] != "copy":
            return None
        content: bytes = safetensors.torch.save(mlp_weights(self.sampler.pipe.transformer, self.sampler.sites))
        return content

    def text(self, out: Path, images: int) -> str:
        """The plan in words: what is drawn, what is kept, and how many bytes that is."""
        meta = self.meta
        kept = ", ".join(f"{t.kept} of {t.total} {stream} tokens" for stream, t in meta.tokens.items())
        files = meta.n_parts * (len(meta.sites) * len(meta.steps) * len(meta.points) + 3)
        lines = [
            f"harvest {meta.model['id']} -> {out}",
            f"  {meta.n_images} images of {meta.height}x{meta.width} pixels, {meta.num_inference_steps} steps "
            f"(steps kept: {', '.join(map(str, meta.steps))}), "
            f"prompts: {meta.prompts['source']} ({meta.prompts['count']} prompts, split {meta.prompts['split']})",
            f"  {len(meta.sites)} sites ({', '.join(meta.sites)}), {kept}, {meta.store_dtype}",
            f"  {meta.bytes_per_image / 1e6:.2f} MB an image, {meta.bytes_per_image * meta.n_images / 1e9:.3f} GB of "
            f"activations in {files} files",
        ]
        different = dict(zip((p.text for p in self.prompts.prompts), self.tokenized, strict=True)).values()
        cut, clip_cut = sum(t.cut for t in different), sum(t.clip_cut for t in different)
        if cut or clip_cut:
            lines.append(
                f"  of {len(different)} different prompts {cut} are cut at {meta.max_sequence_length} T5 tokens "
                f"and {clip_cut} at CLIP's 77"
            )
        if images < meta.n_images:
            lines.append(
                f"  {meta.n_images - images} images are there already or left to others; {images} are to be harvested now"
            )
        return "\n".join(lines)


def make_plan(settings: HarvestSettings) -> Plan:
    """Load the prompts and the model and settle every value that decides a byte of the store."""
    device = choose_device(settings.device)
    threads = cpu_threads(settings.threads)
    torch.set_num_threads(threads)
    dtype = settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    locate_model(settings.model)
    ready = (
        None if is_dataset(settings) else load_prompts(settings)
    )  # what is here is checked before the model is loaded,
    pipe = load_pipeline(settings, device, dtype)
    prompts = ready or load_prompts(settings)  # and what is far away is streamed after it
    columns = column_types(prompts.prompts)
    geometry = geometry_of(pipe, settings)
    if settings.guidance and not pipe.transformer.config.guidance_embeds:
        raise UsageError(
            f"--guidance {settings.guidance}: {settings.model} has no guidance embedding; leave --guidance at 0"
        )
    sites = choose_sites(settings, geometry)
    length = settings.max_sequence_length or defaults_of(settings.model).max_sequence_length
    if length > 512:
        raise UsageError(f"--max-sequence-length {length}: FLUX takes at most 512 text tokens")
    tokenized = tokenize(pipe, [p.text for p in prompts.prompts], length)
    tokens = _policies(settings, sites, geometry.image_tokens, length, max(len(t.ids) for t in tokenized))
    store_dtype = _store_dtype(settings, dtype)
    meta = StoreMeta(
        n_images=len(prompts.prompts),
        chunk_images=chunk_images(
            max(t.kept for t in tokens.values()) * geometry.d_model * (4 if store_dtype == "float32" else 2)
        ),
        sites=tuple(str(site) for site in sites),
        points=POINTS,
        steps=parse_numbers(settings.steps, settings.num_inference_steps, "step"),
        d_model=geometry.d_model,
        store_dtype=store_dtype,
        tokens=tokens,
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
        threads=threads,
        dtype=dtype,
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        pictures=settings.pictures,
        model=model_facts(pipe, settings),
        scheduler=_scheduler_facts(pipe),
        prompts=prompts.source,
        weights=_weights_facts(settings, pipe, sites),
        versions=library_versions(),
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
    return Plan(meta, sampler, prompts, tokenized, columns)


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


def _weights_facts(settings: HarvestSettings, pipe: "FluxPipeline", sites: tuple[Site, ...]) -> dict[str, str]:
    if settings.weights == "none":
        return {"policy": "none"}
    digest = tensors_hash(mlp_weights(pipe.transformer, sites))
    return {"policy": settings.weights, "sha256": digest, "file": f"sha256-{digest}.safetensors"}
