"""What a harvest is asked to do: one frozen dataclass, from which the command line comes."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from store.errors import UsageError
from store.format import Codec, StoreDtype, Targets
from store.sites import Stream, parse_numbers
from store.sizes import parse_size
from store.traces import TraceDtype

TINY_FLUX = "tiny-flux"
SCHNELL = "black-forest-labs/FLUX.1-schnell"
DEV = "black-forest-labs/FLUX.1-dev"
SD3_MEDIUM = "stabilityai/stable-diffusion-3-medium-diffusers"
SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
SD35_LARGE = "stabilityai/stable-diffusion-3.5-large"
SD35_TURBO = "stabilityai/stable-diffusion-3.5-large-turbo"
MOST_PROMPTS = 10**9
OF_TRACES = ("trace_images", "trace_steps", "trace_blocks", "trace_dtype")


@dataclass(frozen=True)
class HarvestSettings:
    """Run FLUX over prompts and keep what its MLPs did in a store."""

    out: Path | None = None
    """the store to write, a new folder; the same command again goes on where it was"""
    resume: Path | None = None
    """go on with this unfinished store, with the settings that it was begun with; no other flag is needed. --offload and
    --text-encoders may be given anew; to hold the whole model on the device again, give the whole first command with --out"""
    extend: Path | None = None
    """add images to this finished store, up to --images, with the settings that it was made with; no other flag is needed"""
    plan: bool = False
    """say what would be written, and how long it would take by a measured batch, and write nothing"""
    budget: str | None = None
    """with --plan: which token policies, dtypes and numbers of images fit into so much, such as 2TB"""
    scale: str | None = None
    """with --plan: what disk, files, RAM, GPU memory and time so many prompts take, such as 1000,60000,1000000, and why"""
    images_per_second: float | None = None
    """with --scale: images a second that one device draws, as you know it; without it a batch is measured where the model is"""
    disk_per_second: str | None = None
    """with --scale: what the disk takes a second, such as 1GB, as you know it"""
    model: str = TINY_FLUX
    """tiny-flux (comes with Granary), a folder with a FluxPipeline, a StableDiffusion3Pipeline or a Flux2KleinPipeline, or a
    Hugging Face id such as black-forest-labs/FLUX.1-schnell"""
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
    """all (double blocks), 0-15, double:0-15, or double:0-18,single:0-37 (all,single:all); layers are 0-based"""
    streams: str | None = None
    """img and txt of double blocks, joint of single ones, such as img,joint; default: all of the blocks that --layers names"""
    tokens: str = "all"
    """all image tokens, or how many to draw for each image and step"""
    text_tokens: str = "all"
    """all text tokens, only the real ones, or real+N (N padding tokens drawn beside the real ones)"""
    steps: str = "all"
    """all denoising steps, or which (0-based): 1,3"""
    num_inference_steps: int | None = None
    """denoising steps of the sampler; default 4, and 28 for FLUX.1-dev, others with a guidance embedding, and SD3 (40 for SD3.5-medium)"""
    guidance: float | None = None
    """guidance scale; default 0, for a schnell-like model takes none, 3.5 for FLUX.1-dev and others with a guidance embedding, and
    what its page says for SD3 and SD3.5. Above 1 SD3 runs on twice the batch, of which the half that knows the prompt is kept"""
    resolution: int | None = None
    """height and width in pixels; default 512, 1024 for SD3, and 64 for tiny-flux"""
    height: int | None = None
    """height in pixels, where it differs from the width"""
    width: int | None = None
    """width in pixels, where it differs from the height"""
    max_sequence_length: int | None = None
    """text tokens; default 512, 16 for tiny-flux, and 256 for SD3, which has CLIP's 77 besides"""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """what the model computes in; default bfloat16 on CUDA, float32 on a CPU"""
    offload: Literal["none", "model", "sequential", "group"] = "none"
    """keep weights on the host until they compute, for a CUDA device that is too small: whole parts (model), layer by layer
    (sequential, slowest), or the transformer's blocks with the next one copied while one computes (group)"""
    text_encoders: Literal["resident", "first"] = "resident"
    """first: encode every prompt, keep the embeddings beside the store (OUT.runs/embeddings), and free the text encoders before
    the transformer is loaded"""
    quantize: Literal["none", "nf4", "int8", "int8wo", "float8wo"] = "none"
    """load the transformer quantised: nf4 and int8 by bitsandbytes (CUDA only), int8wo and float8wo by torchao (weights only).
    It is then another model, and the store says so"""
    compile: bool = False
    """compile the transformer's blocks (torch.compile): a minute or so at the start; roundings differ, and the store says so"""
    store_dtype: StoreDtype | None = None
    """what activations are written in; default: as computed, but bfloat16 for float32. fp8-e4m3 has a scale for each
    row: half the bytes, about 2.7 percent RMS error"""
    codec: Codec = "none"
    """none, or zstd: about a fifth fewer bytes for bfloat16, compressed at some 330 MB/s a core"""
    targets: Targets = "stored"
    """stored: mlp_out beside mlp_in; recomputed: mlp_in alone, half the bytes; train and analyze compute mlp_out again
    from it and the MLP matrices, which the store then holds (--weights copy)"""
    weights: Literal["none", "ref", "copy"] | None = None
    """the MLP matrices of the sites: not mentioned, named by their hash, or copied into the store.
    Default: ref, and copy for recomputed targets"""
    pictures: Literal["none", "webp", "png"] = "webp"
    """how the pictures are kept"""
    trace: bool = False
    """keep traces of some images as well: what `analyze graph` needs to compute circuits, and it then needs no FLUX"""
    trace_images: str | None = None
    """which images are traced, such as 0-9; default: the first 10"""
    trace_steps: str | None = None
    """at which of the kept steps, such as 1,3; default: all that are kept"""
    trace_blocks: str | None = None
    """which double blocks, from 0 without a gap, such as 0-15; default: up to the highest of --layers"""
    trace_dtype: TraceDtype | None = None
    """what traces are written in; default: float32 where the model computes in it, else bfloat16"""
    seed: int = 0
    """image i has noise seed seed + i unless the prompt file gives one; also seeds builtin prompts and token draws"""
    batch_size: int = 8
    """images a batch; part of what makes two stores byte-equal"""
    parts: str = "all"
    """fill only these parts (0-3,7)"""
    worker: str | None = None
    """i/n, such as 0/4: fill every n-th part from part i on, then those that nobody else has begun. Default: what torchrun,
    srun or a SLURM array says; without any of them processes share the parts as they come"""
    wait: Literal["all", "one", "none"] | None = None
    """when all parts that are left are held by others: stay, and take over from those that die (all), let one of those that
    are done stay (one), or end (none). Default: all, and one where there is a --worker"""
    lease_seconds: float | None = None
    """a worker that is not heard of for so long loses the part that it holds; default 60"""
    dask: str | None = None
    """local:N for N processes of this machine, or tcp://HOST:PORT of a dask scheduler whose workers fill the store"""
    allow_mixed: bool = False
    """go on under another batch size, thread count, device or library version than the store was begun with; its parts are
    then not byte-equal to those of an undisturbed run, and their commits say so"""
    device: str | None = None
    """cuda, cuda:1, cpu; default: cuda where there is one"""
    threads: int | None = None
    """CPU threads of the model; part of what makes two stores byte-equal. Default: the cores of this machine"""

    def __post_init__(self) -> None:
        places = sum(place is not None for place in (self.out, self.resume, self.extend))
        if places != 1 and not (self.plan and not places):
            raise UsageError(
                "say where to write: --out STORE for a new store (or to go on with it), --resume STORE or --extend STORE"
            )
        if self.budget is not None and not self.plan:
            raise UsageError("--budget answers what would fit, and writes nothing: give it with --plan")
        if self.budget is not None and parse_size(self.budget) < 1:
            raise UsageError(f"--budget {self.budget!r}: nothing fits into that; write for example 2TB")
        self._check_scale()
        if self.extend is not None and self.images is None:
            raise UsageError("--extend needs --images: how many the store shall have in all")
        if self.targets == "recomputed" and self.weights in ("none", "ref"):
            raise UsageError(
                f"--targets recomputed needs the MLP matrices in the store: leave out --weights {self.weights}, or say copy"
            )
        lone = [name for name in OF_TRACES if getattr(self, name) is not None and not self.trace]
        if lone:
            raise UsageError(f"--{lone[0].replace('_', '-')} says what to trace: give --trace as well")
        if self.compile and self.trace:
            raise UsageError("--trace reads inside of blocks that --compile makes one piece of: give one of them")
        if self.offload in ("sequential", "group") and (self.compile or self.quantize != "none"):
            other = "--compile" if self.compile else f"--quantize {self.quantize}"
            raise UsageError(
                f"--offload {self.offload} moves single layers, which {other} joins or packs: choose --offload model or none with it"
            )
        if self.quantize == "int8" and self.weights_policy != "none":
            raise UsageError(
                "--quantize int8 rounds activations too, so that a matrix alone does not say what an MLP computes: leave out "
                "--targets recomputed and --weights"
            )
        if self.worker is not None:
            self.worker_of()
            if self.parts != "all":
                raise UsageError("give --parts or --worker, not both")
        if self.lease_seconds is not None and not 1 <= self.lease_seconds <= 86_400:
            raise UsageError(f"--lease-seconds is {self.lease_seconds:g}: it must be at least 1, and at most a day")
        if self.dask is not None:
            self.dask_workers()
            if self.worker is not None or self.wait is not None or self.plan:
                raise UsageError("--dask hands out the parts itself: leave out --worker, --wait and --plan")
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
        if self.guidance is not None and not 0 <= self.guidance < math.inf:
            raise UsageError(f"--guidance is {self.guidance}: it must be 0 or more, and finite")
        if (self.height is None) != (self.width is None):
            raise UsageError("give --height and --width together, or --resolution alone")
        if self.height is not None and self.resolution is not None:
            raise UsageError("give --resolution, or --height and --width, not both")
        odd = [name for name in (self.streams or "img").split(",") if name not in get_args(Stream)]
        if odd:
            raise UsageError(f"--streams {self.streams!r}: {odd[0]!r} is no stream; write img, txt, joint, or img,txt")

    def _check_scale(self) -> None:
        if self.scale is not None and (not self.plan or self.budget is not None):
            raise UsageError(
                "--scale says what so many prompts take, and writes nothing: give it with --plan, without --budget"
            )
        _ = self.scales
        for name in ("images_per_second", "disk_per_second"):
            value = getattr(self, name)
            if value is not None and self.scale is None:
                raise UsageError(
                    f"--{name.replace('_', '-')} is a rate for --scale: give it with --plan --scale 1000,60000"
                )
        if self.images_per_second is not None and not 0 < self.images_per_second < 10**9:
            raise UsageError(f"--images-per-second is {self.images_per_second}: it must be more than 0")
        try:
            none = self.disk_per_second is not None and parse_size(self.disk_per_second) < 1
        except UsageError as error:
            raise UsageError(f"--disk-per-second: {error}") from None
        if none:
            raise UsageError(f"--disk-per-second {self.disk_per_second!r}: write for example 1GB")

    @property
    def scales(self) -> tuple[int, ...]:
        """The numbers of prompts of `--scale`, ascending; none without it."""
        words = [] if self.scale is None else [word.strip() for word in self.scale.split(",")]
        if any(not re.fullmatch(r"[0-9]{1,12}", word) or not 0 < int(word) <= MOST_PROMPTS for word in words):
            raise UsageError(
                f"--scale {self.scale!r}: write numbers of prompts from 1 to {MOST_PROMPTS}, such as 1000,60000,1000000"
            )
        return tuple(sorted({int(word) for word in words}))

    def worker_of(self) -> tuple[int, int]:
        """(i, n) of `--worker i/n`; (0, 1) without it."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.worker or "0/1")
        if match is None or not int(match[1]) < int(match[2]):
            raise UsageError(f"--worker {self.worker!r}: write i/n with i from 0 to n - 1, such as 0/4")
        return int(match[1]), int(match[2])

    def parts_of(self, count: int) -> set[int]:
        """Those of `count` parts that `--parts` names."""
        try:
            return set(parse_numbers(self.parts, count, "part"))
        except UsageError as error:
            raise UsageError(f"--parts {self.parts}: {error}") from None

    def dask_workers(self) -> int | None:
        """N of `--dask local:N`; None for the address of a scheduler."""
        text = self.dask or ""
        local = re.fullmatch(r"local:(\d+)", text)
        if (local is None or not int(local[1])) and "://" not in text:
            raise UsageError(f"--dask {text!r}: write local:2, or the scheduler's address, such as tcp://HOST:8786")
        return int(local[1]) if local else None

    @property
    def weights_policy(self) -> Literal["none", "ref", "copy"]:
        """`--weights`, or what follows from the targets."""
        usual: Literal["none", "ref"] = "none" if self.quantize == "int8" else "ref"
        return self.weights or ("copy" if self.targets == "recomputed" else usual)
