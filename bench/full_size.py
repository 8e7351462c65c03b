"""Harvesting FLUX.1 at full size with random weights: `python -m bench.full_size --model FOLDER [flags]`.  Downloads nothing.

1. Build, unless FOLDER is there already: a FluxPipeline of FLUX.1[schnell]'s dimensions (12 billion parameters, 24 GB in
   bfloat16), its full VAE, CLIP's width and T5's width with `--t5-layers` of its 24 layers.  The weights are drawn at random.
2. Load it as `python -m harvest` does, with `--offload`, `--quantize`, `--compile` and `--text-encoders` as given.
3. For 64 image tokens and for all (`--tokens`): the pictures alone, then a harvest of the same pictures, by turns.
4. Print for each: seconds a picture of both, their ratio, who waited for whom, peak memory of the device and of the host.

It needs a disk (or /dev/shm) of 30 GB for the model and room for the stores, about 0.5 GB a picture with all tokens; on an H100
building takes about a minute and a round about as long.  On a CPU give `--small`: two blocks of each kind, d_model 256.

A machine that has torch and transformers but not diffusers and zarr needs wheels (pure Python ones, but for numcodecs, crc32c,
pyarrow, ml_dtypes, safetensors and google-crc32c, which come for each platform): fetch them where there is a network with
`pip download --no-deps -d wheels diffusers==0.42.1 zarr==3.1.6 accelerate==1.15.0 numcodecs crc32c donfig pyarrow ml_dtypes
datasets tyro …` (what else `pip check` names; `requirements.lock` has the versions), carry the folder over, and there
`pip install --no-index --no-deps --target site wheels/*.whl && PYTHONPATH=site python -m bench.full_size …`.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.timing import quiet as silent
from harvest import fill
from harvest.models.loading import without_gradients
from harvest.models.text import encode
from harvest.planning.budget import policy_of, varied
from harvest.planning.plan import Plan, make_plan
from harvest.quiet import quiet
from harvest.settings import HarvestSettings
from harvest.tiny_flux import scenes
from harvest.tiny_flux.tokenizers import CLIP_LENGTH, clip_tokenizer, t5_tokenizer

FULL: dict[str, Any] = {
    "double": 19, "single": 38, "heads": 24, "text": 4096, "clip": 768, "vae": (128, 256, 512, 512), "channels": 16, "groups": 32,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "double": 2, "single": 2, "heads": 2, "text": 64, "clip": 32, "vae": (8, 8, 8, 8), "channels": 16, "groups": 4,
}  # fmt: skip


def build(folder: Path, sizes: dict[str, Any], t5_layers: int, device: torch.device) -> None:
    """Write a FluxPipeline of these sizes with random bfloat16 weights; they are drawn on `device`."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    clip, t5, kinds = clip_tokenizer(), t5_tokenizer(), len(sizes["vae"])
    with _made_in(torch.bfloat16, device):
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=FluxTransformer2DModel(
                num_layers=sizes["double"], num_single_layers=sizes["single"], num_attention_heads=sizes["heads"],
                joint_attention_dim=sizes["text"], pooled_projection_dim=sizes["clip"], in_channels=4 * sizes["channels"],
            ),
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * kinds, up_block_types=("UpDecoderBlock2D",) * kinds,
                block_out_channels=sizes["vae"], layers_per_block=2, latent_channels=sizes["channels"],
                norm_num_groups=sizes["groups"], use_quant_conv=False, use_post_quant_conv=False,
                scaling_factor=0.3611, shift_factor=0.1159,
            ),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(clip), hidden_size=sizes["clip"], intermediate_size=4 * sizes["clip"], num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=CLIP_LENGTH, bos_token_id=clip.bos_token_id,
                    eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
                )
            ),
            tokenizer=clip,
            text_encoder_2=T5EncoderModel(
                T5Config(
                    vocab_size=len(t5), d_model=sizes["text"], d_kv=64, d_ff=5 * sizes["text"] // 2, num_layers=t5_layers,
                    num_heads=max(1, sizes["text"] // 64), feed_forward_proj="gated-gelu", dropout_rate=0.0,
                    is_encoder_decoder=False, use_cache=False, pad_token_id=0, eos_token_id=1,
                )
            ),
            tokenizer_2=t5,
        )  # fmt: skip
        with quiet():
            pipe.save_pretrained(folder)


@contextmanager
def _made_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Inside, modules are made in this dtype and on this device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def plain(plan: Plan, images: int) -> float:
    """Seconds that the pipeline takes for the latents of the first images, nothing captured."""
    sampler, meta = plan.sampler, plan.meta
    begun = _now(sampler.pipe._execution_device)
    with without_gradients(sampler.pipe):
        for first in range(0, images, meta.batch_size):
            batch = range(first, min(first + meta.batch_size, images))
            texts = [plan.prompts.prompts[i].text for i in batch]
            source = sampler.embeddings
            embedded = encode(sampler.pipe, texts, meta.max_sequence_length) if source is None else source.of(texts)
            given = dict(zip(sampler.architecture.embeddings, embedded, strict=True))
            sampler.pipe(
                **given, height=meta.height, width=meta.width, num_inference_steps=meta.num_inference_steps,
                guidance_scale=meta.guidance, max_sequence_length=meta.max_sequence_length, output_type="latent",
                generator=[torch.Generator("cpu").manual_seed(i) for i in batch],
            )  # fmt: skip
    return _now(sampler.pipe._execution_device) - begun


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def harvested(plan: Plan, out: Path) -> fill.Summary:
    """What a harvest of the plan's images into a new store did, the model already loaded; the store is removed again."""
    settings = replace(plan.settings, out=out)
    with silent(), mock.patch.object(fill, "make_plan", return_value=replace(plan, settings=settings)):
        summary = fill.run(settings)
    shutil.rmtree(out)
    assert summary is not None
    return summary


def compare(plan: Plan, tokens: str, folder: Path, rounds: int) -> dict[str, Any]:
    """One line of the table: `rounds` turns of the pictures alone and of a harvest that keeps `tokens` image tokens."""
    of_tokens = varied(
        plan,
        policy_of(plan, tokens, "all" if tokens == "all" else plan.settings.text_tokens),
        plan.meta.store_dtype,
        "stored",
    )
    assert isinstance(of_tokens, Plan)
    images, device = plan.meta.n_images, plan.sampler.pipe._execution_device
    plain(plan, min(plan.meta.batch_size, images))  # warms up
    alone, ours = [], []
    for turn in range(rounds):
        alone.append(plain(plan, images))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        ours.append(harvested(of_tokens, folder / f"store-{tokens}-{turn}"))
    best = min(ours, key=lambda summary: summary.seconds)
    return {
        "tokens": tokens,
        "plain_s": min(alone) / images,
        "harvest_s": best.seconds / images,
        "ratio": best.seconds / min(alone),
        "bytes_an_image": of_tokens.meta.bytes_per_image,
        "waited": best.waiting.said(),
        "device_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
        "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "all_plain_s": alone,
        "all_harvest_s": [summary.seconds for summary in ours],
    }


def shown(line: dict[str, Any]) -> str:
    """A line for people."""
    peak = "" if line["device_gb"] is None else f"{line['device_gb']:.1f} GB of the device at most, "
    return (
        f"{line['tokens']} image tokens: {line['plain_s']:.3f} s a picture alone, {line['harvest_s']:.3f} s harvested "
        f"({line['bytes_an_image'] / 1e6:.1f} MB each): {line['ratio']:.3f} times\n  {line['waited']}\n"
        f"  {peak}{line['host_gb']:.1f} GB of the host at most"
    )


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="folder of the model, built when it is not there; default: a temporary one"
    )
    parser.add_argument("--work", type=Path, help="folder of the stores, which are removed; default: a temporary one")
    parser.add_argument("--small", action="store_true", help="two blocks of each kind, d_model 256, for a CPU")
    parser.add_argument("--t5-layers", type=int, default=1)
    parser.add_argument("--layers", default=None, help="as of python -m harvest; default: 0-15, and all with --small")
    parser.add_argument("--tokens", default="64,all")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--resolution", type=int, default=None, help="default: 512, and 128 with --small")
    parser.add_argument("--max-sequence-length", type=int, default=None, help="default: 512, and 32 with --small")
    parser.add_argument("--text-tokens", default="real")
    for flag, choices in (
        ("--offload", ("none", "model", "sequential", "group")),
        ("--quantize", ("none", "nf4", "int8", "int8wo", "float8wo")),
        ("--text-encoders", ("resident", "first")),
    ):
        parser.add_argument(flag, choices=choices, default=choices[0])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


def settings_of(asked: argparse.Namespace, model: Path, folder: Path) -> HarvestSettings:
    """What `python -m harvest` would be asked for, with prompts of its own."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(text for text, _ in scenes.prompts(asked.images, 0)))
    return HarvestSettings(
        out=folder / "run", model=str(model), prompts=str(prompts), images=asked.images, batch_size=asked.batch_size,
        layers=asked.layers or ("all" if asked.small else "0-15"), tokens="64", text_tokens=asked.text_tokens,
        resolution=asked.resolution or (128 if asked.small else 512), pictures="none", weights="none", guidance=0.0,
        max_sequence_length=asked.max_sequence_length or (32 if asked.small else 512), num_inference_steps=4,
        dtype=asked.dtype, device=asked.device, offload=asked.offload, quantize=asked.quantize, compile=asked.compile,
        text_encoders=asked.text_encoders,
    )  # fmt: skip


def main(words: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Build, load, measure and print; the lines as they are kept by `--json`."""
    asked = parsed(words)
    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory(dir=asked.work) as temporary:
        folder = Path(temporary)
        model = asked.model or folder / "model"
        if not (model / "model_index.json").exists():
            begun = time.perf_counter()
            build(model, SMALL if asked.small else FULL, asked.t5_layers, device)
            print(f"built {model} in {time.perf_counter() - begun:.0f} s", flush=True)
        begun = time.perf_counter()
        plan = make_plan(settings_of(asked, model, folder))
        if (ahead := plan.sampler.embeddings) is not None:  # batches are cut otherwise where all tokens are kept
            plan = replace(plan, sampler=replace(plan.sampler, embeddings=ahead.loosely()))
        print(f"loaded, hashed and placed in {time.perf_counter() - begun:.0f} s", flush=True)
        lines = [compare(plan, tokens, folder, asked.rounds) for tokens in asked.tokens.split(",")]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    ways = f"offload {asked.offload}, quantize {asked.quantize}, compile {asked.compile}, text encoders {asked.text_encoders}"
    print(f"\n{name}; {len(plan.meta.sites)} sites, {plan.meta.height} pixels, batches of {asked.batch_size}; {ways}")
    print("\n".join(map(shown, lines)))
    if asked.json is not None:
        asked.json.write_text(
            json.dumps({"device": name, "flags": {k: str(v) for k, v in vars(asked).items()}, "lines": lines})
        )
    return lines


if __name__ == "__main__":
    main()
