"""What plain diffusers did in one run, read where it happens."""

from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_flux
from torch import Tensor

from harvest.models.model import TINY_FLUX_FOLDER
from store import Store


class Oracle:
    """What plain diffusers did in one run, read where it happens and not by our hooks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Store, image: int) -> None:
        from diffusers import FluxPipeline

        self.joint: list[tuple[Tensor, Tensor]] = []
        self.blocks: list[dict[str, Tensor]] = []
        dispatch, forward = transformer_flux.dispatch_attention_fn, transformer_flux.FluxTransformerBlock.forward

        def attend(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
            self.joint.append((query[0].clone(), key[0].clone()))
            return dispatch(query, key, value, **rest)  # type: ignore[no-any-return]

        def block(
            module: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **rest: Any
        ) -> tuple[Tensor, Tensor]:
            out = forward(module, hidden_states, encoder_hidden_states, **rest)
            seen = {"resid.img": hidden_states, "resid.txt": encoder_hidden_states}
            seen |= {"resid_out.txt": out[0], "resid_out.img": out[1]}
            self.blocks.append({name: value[0].clone() for name, value in seen.items()})
            return out  # type: ignore[no-any-return]

        monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", attend)
        monkeypatch.setattr(transformer_flux.FluxTransformerBlock, "forward", block)
        dtype = torch.bfloat16 if store.meta.dtype == "bfloat16" else torch.float32
        pipe = FluxPipeline.from_pretrained(TINY_FLUX_FOLDER, dtype=dtype, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        row = store.prompts().slice(image, 1).to_pylist()[0]
        pipe(
            row["prompt"], height=48, width=64, num_inference_steps=2, guidance_scale=0.0, max_sequence_length=16,
            generator=torch.Generator("cpu").manual_seed(row["seed"]), output_type="latent",
        )  # fmt: skip
        doubles, singles = len(pipe.transformer.transformer_blocks), len(pipe.transformer.single_transformer_blocks)
        self.joint, self.blocks = self.joint[doubles + singles :], self.blocks[doubles:]  # those of step 1
