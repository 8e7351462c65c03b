"""What the text encoders are given, and what they answer.

No model here masks its padding, so the store keeps the ids of the text tokens and the number of real ones with every prompt:

    FLUX.1   T5's tokens
    SD3      the places of CLIP's two encoders, which are always all there, padding too, and T5's tokens after them
    FLUX.2   the chat that the prompt is put into, in Qwen's tokens
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harvest.models.architectures import ARCHITECTURES, FLUX, FLUX2, SD3, Architecture, architecture_of_pipeline
from harvest.models.loading import without_gradients
from harvest.quiet import quiet
from store.errors import UsageError

UNCONDITIONAL = ""
"""what classifier-free guidance leads away from, as the pipelines have it when no negative prompt is given"""
BEGINS, T5_END, CLIP_ENDS = "▁", "</s>", "</w>"
"""how T5 spells the beginning of a word and the end of a text, and CLIP the end of a word"""
START, PADDING, LINE_END = "⟨start⟩", "·", "↵"
"""how pieces of other encoders are spelled that T5 has not"""


@dataclass(frozen=True)
class Tokenized:
    """The text tokens of a prompt up to its last real one (end mark included), and whether T5 (Qwen) or CLIP had to cut it."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    """in T5's spelling"""
    cut: bool
    clip_cut: bool
    padding: tuple[int, ...] | None = None
    """the places of `ids` that hold padding; None of models whose texts never have any there"""

    @property
    def real(self) -> int:
        """How many tokens are real."""
        return len(self.ids) - len(self.padding or ())


def family_of(pipe: Any) -> Architecture:
    """The row of a pipeline, whose transformer may not be loaded yet; `UsageError` for one that Granary does not know."""
    row = architecture_of_pipeline(type(pipe).__name__)
    if row is None:
        known = ", ".join(row.pipeline for row in ARCHITECTURES.values())
        raise UsageError(f"a {type(pipe).__name__} is no pipeline that Granary harvests; it harvests a {known}")
    return row


def tokenize(pipe: Any, prompts: Sequence[str], max_sequence_length: int) -> list[Tokenized]:
    """The text tokens of each prompt at this text length.  Equal prompts are tokenized once."""
    one = _TOKENIZE[family_of(pipe).name]
    known = {prompt: one(pipe, prompt, max_sequence_length) for prompt in dict.fromkeys(prompts)}
    return [known[prompt] for prompt in prompts]


def longest_of(pipe: Any, prompts: Sequence[str], max_sequence_length: int) -> int:
    """Real text tokens of the longest of many prompts; 0 for none."""
    if not prompts:
        return 0
    row = family_of(pipe)
    if row is FLUX2:
        return max(len(_chat_ids(pipe, prompt, max_sequence_length)) for prompt in dict.fromkeys(prompts))
    if row is SD3:
        clips, t5 = (pipe.tokenizer, pipe.tokenizer_2), pipe.tokenizer_3
        of_clip = [
            max(pair)
            for pair in zip(*(_lengths(clip, prompts, pipe.tokenizer_max_length) for clip in clips), strict=True)
        ]
        of_t5 = _lengths(t5, prompts, max_sequence_length) if t5 is not None else [0] * len(prompts)
        return max(map(sum, zip(of_clip, of_t5, strict=True)))
    return max(_lengths(pipe.tokenizer_2, prompts, max_sequence_length))


def _lengths(tokenizer: Any, prompts: Sequence[str], most: int) -> list[int]:
    """Tokens of each prompt, padding not counted, cut at `most`."""
    return [len(ids) for ids in tokenizer(list(prompts), truncation=True, max_length=most).input_ids]


def _flux(pipe: Any, prompt: str, length: int) -> Tokenized:
    ids, pieces, cut = _t5(pipe.tokenizer_2, prompt, length)
    return Tokenized(ids, pieces, cut, _clip_cuts(pipe, prompt))


def _sd3(pipe: Any, prompt: str, length: int) -> Tokenized:
    """CLIP's places, padding and all: the transformer is given each of them.  T5's may be missing as a whole.

    Both encoders of CLIP have the same places, their channels side by side: one is real where either has a token, be it the end mark.
    """
    clip, most = pipe.tokenizer, pipe.tokenizer_max_length
    places = clip(prompt, truncation=True, max_length=most, padding="max_length").input_ids
    real, other = (_lengths(each, [prompt], most)[0] for each in (clip, pipe.tokenizer_2))
    ids, pieces, cut = ((), (), False) if pipe.tokenizer_3 is None else _t5(pipe.tokenizer_3, prompt, length)
    return Tokenized(
        (*places, *ids),
        (*_clip_pieces(clip, places[:real]), *[PADDING] * (most - real), *pieces),
        cut,
        _clip_cuts(pipe, prompt),
        tuple(range(max(real, other), most)),
    )


def _clip_pieces(clip: Any, ids: Sequence[int]) -> list[str]:
    """CLIP's pieces spelled as T5 spells its own: CLIP marks where a word ends, T5 where one begins."""
    pieces, begins = [], True
    for piece in clip.convert_ids_to_tokens(ids):
        if piece in (clip.bos_token, clip.eos_token):
            pieces.append(START if piece == clip.bos_token else T5_END)
        else:
            pieces.append(BEGINS * begins + clip.convert_tokens_to_string([piece.removesuffix(CLIP_ENDS)]))
            begins = piece.endswith(CLIP_ENDS)
    return pieces


def _flux2(pipe: Any, prompt: str, length: int) -> Tokenized:
    ids, qwen = _chat_ids(pipe, prompt, length), pipe.tokenizer
    whole = qwen(_chat(pipe, prompt), verbose=False).input_ids
    texts = [
        qwen.convert_tokens_to_string([piece]).replace("\n", LINE_END) for piece in qwen.convert_ids_to_tokens(ids)
    ]
    pieces = tuple(BEGINS + text[1:] if text.startswith(" ") else text for text in texts)
    return Tokenized(tuple(ids), pieces, len(whole) > len(ids), False)


def _t5(tokenizer: Any, prompt: str, length: int) -> tuple[tuple[int, ...], tuple[str, ...], bool]:
    whole = tokenizer(prompt, truncation=False, verbose=False).input_ids
    ids = tokenizer(prompt, truncation=True, max_length=length).input_ids
    return tuple(ids), tuple(tokenizer.convert_ids_to_tokens(ids)), len(whole) > len(ids)


def _clip_cuts(pipe: Any, prompt: str) -> bool:
    limit = int(pipe.tokenizer.model_max_length)
    return len(pipe.tokenizer(prompt, truncation=False, verbose=False).input_ids) > limit


def _chat(pipe: Any, prompt: str) -> str:
    """The prompt as the klein pipeline puts it to the text encoder."""
    messages = [{"role": "user", "content": prompt}]
    chat: str = pipe.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return chat


def _chat_ids(pipe: Any, prompt: str, length: int) -> list[int]:
    ids: list[int] = pipe.tokenizer(_chat(pipe, prompt), truncation=True, max_length=length).input_ids
    return ids


_TOKENIZE: Mapping[str, Callable[[Any, str, int], Tokenized]] = {FLUX.name: _flux, SD3.name: _sd3, FLUX2.name: _flux2}


def cuts_said(architecture: Architecture, tokenized: Sequence[Tokenized], max_sequence_length: int) -> tuple[str, ...]:
    """How many of these different prompts the encoders cut, in one sentence; nothing where they cut none."""
    cut, clip_cut = sum(t.cut for t in tokenized), sum(t.clip_cut for t in tokenized)
    if not cut and not clip_cut:
        return ()
    if architecture is FLUX2:
        return (
            f"of {len(tokenized)} different prompts {cut} are cut at {max_sequence_length} tokens of the whole chat",
        )
    return (
        f"of {len(tokenized)} different prompts {cut} are cut at {max_sequence_length} T5 tokens "
        f"and {clip_cut} at CLIP's 77",
    )


def is_guided(architecture: Architecture, guidance: float) -> bool:
    """Whether the transformer runs on a batch twice as large, the unconditional half first."""
    return architecture.guided_half and guidance > 1


def apart(architecture: Architecture, guidance: float) -> tuple[tuple[str, ...], ...]:
    """What has to be encoded besides the prompts, each by itself: the empty prompt that guidance leads away from, or nothing."""
    return ((UNCONDITIONAL,),) if is_guided(architecture, guidance) else ()


def encode(
    pipe: Any,
    prompts: Sequence[str],
    max_sequence_length: int,
    moved: bool | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, ...]:
    """What the pipeline takes of the prompts, in the order of `Architecture.embeddings`; a row a prompt.

    FLUX.1 and SD3: (prompt_embeds, pooled_prompt_embeds).  FLUX.2: (prompt_embeds,).  `moved`: as `without_gradients` takes it;
    `device`: where the pipeline computes, where that is known: it is found by a look at every module.
    The pipeline would log a warning for each prompt that CLIP cuts at 77 tokens; we count those once, in `tokenize`, and the
    summary says how many there were.
    """
    row = family_of(pipe)
    asked: dict[str, Any] = {"device": device or pipe._execution_device, "max_sequence_length": max_sequence_length}
    with quiet(), without_gradients(pipe, moved):
        if row is SD3:
            embeds, _, pooled, _ = pipe.encode_prompt(
                list(prompts), None, None, do_classifier_free_guidance=False, **asked
            )
            return embeds, pooled
        if row is FLUX2:
            return (pipe.encode_prompt(list(prompts), **asked)[0],)
        embeds, pooled, _ = pipe.encode_prompt(prompt=list(prompts), prompt_2=None, **asked)
    return embeds, pooled
