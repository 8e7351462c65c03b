"""The trained parts as a folder: a `FluxPipeline` like FLUX.1-schnell's, and its `CLIPModel` under `clip/`."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPModel

from harvest.tiny_flux.text import Encoders
from harvest.tiny_flux.tokenizers import clip_tokenizer, t5_tokenizer

PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": 64, "width": 64},
    "do_center_crop": False,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": 64, "width": 64},
}


def pipeline(encoders: Encoders, vae: AutoencoderKL, flux: FluxTransformer2DModel) -> FluxPipeline:
    """The parts as one pipeline with schnell's scheduler: no shift, sigmas 1, .75, .5, .25 in four steps."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=encoders.clip,
        tokenizer=clip_tokenizer(),  # new ones: a used tokenizer is saved with its last padding and truncation
        text_encoder_2=encoders.t5,
        tokenizer_2=t5_tokenizer(),
        transformer=flux,
    )


def save(folder: Path, pipe: FluxPipeline, clip: CLIPModel | None, card: str = "") -> None:
    """Write everything as float16 safetensors; nothing in any file depends on where or when it was written."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.to(torch.float16)
    pipe.save_pretrained(temporary)
    if clip is not None:
        clip.to(torch.float16).save_pretrained(temporary / "clip")
        clip_tokenizer().save_pretrained(temporary / "clip")
        (temporary / "clip" / "preprocessor_config.json").write_text(
            json.dumps(PREPROCESSOR, indent=2, sort_keys=True) + "\n"
        )
    for file in sorted(temporary.rglob("*.json")):
        _tidy(file)
    if card:
        (temporary / "README.md").write_text(card)
    for file in temporary.rglob("*.safetensors"):
        file.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _tidy(file: Path) -> None:
    """Drop what a reader does not need and what would differ from one machine to the next."""
    said = json.loads(file.read_text())
    if isinstance(said, dict):
        for key in ("_name_or_path", "name_or_path"):
            said.pop(key, None)
    file.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n")
