"""What the text encoders are given, and what they answer.

FLUX masks no padding, so the store keeps T5's ids and the number of real ones with every prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harvest.quiet import quiet

if TYPE_CHECKING:
    from diffusers import FluxPipeline


@dataclass(frozen=True)
class Tokenized:
    """The real T5 tokens of a prompt (end mark included, padding not), and whether T5 or CLIP had to cut it."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    cut: bool
    clip_cut: bool


def tokenize(pipe: "FluxPipeline", prompts: Sequence[str], max_sequence_length: int) -> list[Tokenized]:
    """T5's view of each prompt at this text length.  Equal prompts are tokenized once."""
    known: dict[str, Tokenized] = {}
    clip_limit = pipe.tokenizer.model_max_length
    for prompt in dict.fromkeys(prompts):
        whole = pipe.tokenizer_2(prompt, truncation=False, verbose=False).input_ids
        ids = pipe.tokenizer_2(prompt, truncation=True, max_length=max_sequence_length).input_ids
        clip = pipe.tokenizer(prompt, truncation=False, verbose=False).input_ids
        pieces = pipe.tokenizer_2.convert_ids_to_tokens(ids)
        known[prompt] = Tokenized(tuple(ids), tuple(pieces), len(whole) > len(ids), len(clip) > clip_limit)
    return [known[prompt] for prompt in prompts]


def encode(pipe: "FluxPipeline", prompts: Sequence[str], max_sequence_length: int) -> tuple[Tensor, Tensor]:
    """(prompt_embeds, pooled_prompt_embeds) of the prompts.

    The pipeline would log a warning for each prompt that CLIP cuts at 77 tokens; we count those once,
    in `tokenize`, and the summary says how many there were.
    """
    with quiet(), torch.inference_mode():
        embeds, pooled, _ = pipe.encode_prompt(
            prompt=list(prompts), prompt_2=None, device=pipe._execution_device, max_sequence_length=max_sequence_length
        )
    return embeds, pooled
