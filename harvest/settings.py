"""What a harvest is asked to do: one frozen dataclass, from which the command line comes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from store.errors import UsageError
from store.format import StoreDtype

TINY_FLUX = "tiny-flux"
SCHNELL = "black-forest-labs/FLUX.1-schnell"


@dataclass(frozen=True)
class HarvestSettings:
    """Run FLUX over prompts and keep what its MLPs did in a store."""

    out: Path | None = None
    """the store to write, a new folder; the same command again goes on where it was"""
    resume: Path | None = None
    """go on with this unfinished store, with the settings that it was begun with; no other flag is needed"""
    model: str = TINY_FLUX
    """tiny-flux (comes with Granary), a FluxPipeline folder, or a Hugging Face id such as black-forest-labs/FLUX.1-schnell"""
    revision: str | None = None
    """branch, tag or commit of a Hugging Face model"""
    prompts: str | None = None
    """builtin:shapes; a text, CSV, JSONL or Parquet file; or a Hugging Face dataset.
    Default: builtin:shapes for tiny-flux, yvdao/midjourney-v6 otherwise"""
    split: Literal["all", "train", "val"] = "all"
    """take only prompts of this split (5 percent of all prompts are val, by a hash of their text)"""
    images: int | None = None
    """how many images; default: every prompt of a file (times --seeds-per-prompt), 256 of builtin:shapes, 1000 of a dataset"""
    seeds_per_prompt: int = 1
    """images of each prompt, with successive seeds"""
    cycle: bool = False
    """begin again with the first prompt when there are more images than prompts (else an error)"""
    layers: str = "all"
    """all, 0-15, or double:0-15; layers are 0-based"""
    streams: str = "img,txt"
    """img, txt, or both"""
    tokens: str = "all"
    """all image tokens, or how many to draw for each image and step"""
    text_tokens: str = "all"
    """all text tokens, only the real ones, or real+N (N padding tokens drawn beside the real ones)"""
    steps: str = "all"
    """all denoising steps, or which (0-based): 1,3"""
    num_inference_steps: int = 4
    """denoising steps of the sampler"""
    guidance: float = 0.0
    """guidance scale; a schnell-like model takes none"""
    resolution: int | None = None
    """height and width in pixels; default 512, and 64 for tiny-flux"""
    height: int | None = None
    """height in pixels, where it differs from the width"""
    width: int | None = None
    """width in pixels, where it differs from the height"""
    max_sequence_length: int | None = None
    """text tokens; default 512, and 16 for tiny-flux"""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """what the model computes in; default bfloat16 on CUDA, float32 on a CPU"""
    store_dtype: StoreDtype | None = None
    """what activations are written in; default: as computed, but bfloat16 for float32"""
    targets: Literal["stored"] = "stored"
    """mlp_out is stored beside mlp_in"""
    weights: Literal["none", "ref", "copy"] = "ref"
    """the MLP matrices of the sites: not mentioned, named by their hash, or copied into the store"""
    pictures: Literal["none", "webp", "png"] = "webp"
    """how the pictures are kept"""
    seed: int = 0
    """image i has noise seed seed + i unless the prompt file gives one; also seeds builtin prompts and token draws"""
    batch_size: int = 8
    """images a batch; part of what makes two stores byte-equal"""
    parts: str = "all"
    """fill only these parts (0-3,7), so that several processes can share one store"""
    device: str | None = None
    """cuda, cuda:1, cpu; default: cuda where there is one"""
    threads: int | None = None
    """CPU threads of the model; part of what makes two stores byte-equal. Default: the cores of this machine"""

    def __post_init__(self) -> None:
        if (self.out is None) == (self.resume is None):
            raise UsageError("say where to write: --out STORE for a new store (or to go on with it), or --resume STORE")
        for name in (
            "images",
            "seeds_per_prompt",
            "num_inference_steps",
            "batch_size",
            "threads",
            "resolution",
            "height",
            "width",
            "max_sequence_length",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}: it must be 0 or more")
        if self.guidance < 0:
            raise UsageError(f"--guidance is {self.guidance}: it must be 0 or more")
        if (self.height is None) != (self.width is None):
            raise UsageError("give --height and --width together, or --resolution alone")
        if self.height is not None and self.resolution is not None:
            raise UsageError("give --resolution, or --height and --width, not both")
        odd = [name for name in self.streams.split(",") if name not in ("img", "txt")]
        if odd:
            raise UsageError(
                f"--streams {self.streams!r}: {odd[0]!r} is no stream of a double block; write img, txt, or img,txt"
            )
