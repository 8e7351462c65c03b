"""The two tokenizers, made without downloads: every prompt in any script tokenizes, every caption word is one token.

transformers 5 rebuilds a T5 tokenizer from its pieces and drops any normaliser or byte fallback that was saved with it,
so upper case has pieces of its own (`twins` says whose embedding each one borrows) and a character outside Latin-1
becomes `<unk>`.  CLIP's tokenizer lower-cases by itself and falls back to bytes.
"""

from collections import Counter
from functools import cache
from itertools import pairwise

from transformers import CLIPTokenizer, T5TokenizerFast

from harvest.tiny_flux.scenes import captions, scenes

CLIP_LENGTH = 77
T5_LENGTH = 512
SHORT = 16
"""T5 tokens that hold every caption, its end mark and at least one token of padding."""


@cache
def words() -> tuple[str, ...]:
    """Every word that a caption uses, sorted; held-out pairs add none, so they are not looked at."""
    said = {
        word
        for kind in ("one", "two")
        for scene in scenes(kind)[::7]
        for text in captions(scene)
        for word in text.split()
    }
    return tuple(sorted({word.strip(",:") for word in said}))


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-ins of the 256 bytes, which byte-level BPE is written in."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(rest))]


def _merges() -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until each word is one token."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words()]
    merges = []
    while any(len(parts) > 1 for parts in spelled):
        pairs = Counter(pair for parts in spelled for pair in pairwise(parts))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in spelled:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE: 256 bytes, their word-final forms, and merges that make each caption word one token."""
    characters = _byte_characters()
    merges = _merges()
    pieces = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges)]
    vocabulary = {piece: i for i, piece in enumerate([*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def _pieces() -> dict[str, str | None]:
    """T5 pieces in order, each with the lower-case piece whose embedding it borrows (None: its own)."""
    latin = [chr(c) for c in [*range(33, 127), *range(161, 256)] if c != 173]
    pieces: dict[str, str | None] = {"▁": None}
    for word in words():
        pieces["▁" + word] = None
    for word in words():
        for form in (word.capitalize(), word.upper()):
            pieces.setdefault("▁" + form, "▁" + word)
    for c in latin:
        lower = c.lower()
        pieces[c] = lower if lower != c and lower in latin else None
    return pieces


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram: caption words (lower, capitalised and upper case), printable ASCII and Latin-1."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    scores = (-2.0 if piece == "▁" else -3.0 if len(piece) > 1 else -10.0 for piece in _pieces())
    vocabulary.extend(zip(_pieces(), scores, strict=True))
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=T5_LENGTH)


def twins() -> dict[int, int]:
    """Ids of upper-case pieces, each with the id of the lower-case piece that it must read like."""
    ids = {piece: 3 + i for i, piece in enumerate(_pieces())}
    return {ids[piece]: ids[twin] for piece, twin in _pieces().items() if twin is not None}
