"""Which tokens of each stream a scan looks at: a region of the picture, numbers, or words of the prompt."""

import numpy as np

from analyze.inputs import Analysis
from analyze.scan.images import compiled
from analyze.scan.passes import TokenChoice
from analyze.scan.region import inside_of, mask_cover, rectangle
from analyze.scan.settings import ScanSettings
from store.errors import UsageError
from store.sites import Stream, parse_numbers
from store.strata import RealText


def token_choices(analysis: Analysis, settings: ScanSettings) -> dict[Stream, TokenChoice] | None:
    """The tokens that count in each stream; None where whole images do.  Streams that cannot be looked at are not there."""
    streams: list[Stream] = list(analysis.streams())  # type: ignore[arg-type]
    if settings.region is not None or settings.mask is not None:
        return _of_region(analysis, settings, streams)
    if settings.tokens is not None:
        return {stream: _of_numbers(analysis, settings.tokens, stream) for stream in streams}
    if settings.words is not None:
        return _of_words(analysis, settings.words, streams)
    return None


def _of_region(analysis: Analysis, settings: ScanSettings, streams: list[Stream]) -> dict[Stream, TokenChoice]:
    grid, total = analysis.store.meta.grid, analysis.store.meta.text_tokens
    cover = rectangle(settings.region, grid) if settings.region is not None else mask_cover(settings.mask, grid)  # type: ignore[arg-type]
    what = f"--region {settings.region!r}" if settings.region is not None else f"--mask {settings.mask}"
    inside = inside_of(cover, settings.covered, what)
    compares = settings.kind == "spatial"
    if compares and inside.all():
        raise UsageError(
            f"{what} covers every token of the grid of {grid[0]} rows and {grid[1]} columns: nothing is outside to compare with"
        )
    found: dict[Stream, TokenChoice] = {}
    for stream in streams:
        if stream != "txt":
            text = np.zeros(total if stream == "joint" else 0, bool)
            outside = np.concatenate([text, ~inside]) if compares else None
            found[stream] = TokenChoice(np.concatenate([text, inside]), outside)
    if not found:
        raise UsageError(
            f"{what} is a region of the picture, and only txt dictionaries are chosen: choose img ones with --sites"
        )
    return found


def _of_numbers(analysis: Analysis, text: str, stream: Stream) -> TokenChoice:
    total = int(analysis.store.meta.tokens[stream].total)
    try:
        chosen = parse_numbers(text, total, "token")
    except UsageError as error:
        raise UsageError(f"--tokens of the stream {stream}: {error}") from None
    inside = np.zeros(total, bool)
    inside[list(chosen)] = True
    return TokenChoice(inside)


def _of_words(analysis: Analysis, pattern: str, streams: list[Stream]) -> dict[Stream, TokenChoice]:
    expression, table = compiled(pattern, "words"), analysis.store.prompts()
    if "text_pieces" not in table.column_names:
        raise UsageError("--words needs the pieces of the prompts, which this store does not have: choose --tokens")
    pieces = table["text_pieces"].to_pylist()
    length = int(analysis.store.meta.text_tokens)
    inside = np.zeros((len(pieces), length), bool)
    for image, row in enumerate(pieces):
        for place, piece in enumerate(row[:length]):
            inside[image, place] = expression.search(piece.replace("▁", " ").strip()) is not None
    inside &= RealText.of(table).at(np.arange(len(pieces))[:, None], np.arange(length))
    if not inside.any():
        raise UsageError(
            f"no piece of any prompt matches --words {pattern!r}; the first prompt's are {' '.join(pieces[0])}"
        )
    found: dict[Stream, TokenChoice] = {}
    for stream in streams:
        if stream != "img":
            more = int(analysis.store.meta.tokens[stream].total) - length
            found[stream] = TokenChoice(np.pad(inside, ((0, 0), (0, more))))
    if not found:
        raise UsageError(
            "--words looks at text tokens, and only img dictionaries are chosen: choose txt ones with --sites"
        )
    return found


def place_of(analysis: Analysis, stream: Stream, image: int, token: int) -> str:
    """Where a token is, for people: `row 3, column 5` of the picture, counted from 1, or the piece of the prompt."""
    length = int(analysis.store.meta.text_tokens)
    if stream == "img" or (stream == "joint" and token >= length):
        row, column = divmod(token - (length if stream == "joint" else 0), analysis.store.meta.grid[1])
        return f"row {row + 1}, column {column + 1}"
    table = analysis.store.prompts()
    pieces = table["text_pieces"][image].as_py() if "text_pieces" in table.column_names else []
    padding = {*RealText.of(table.slice(image, 1)).of_image(0)[1]}
    return str(pieces[token]).replace("▁", " ").strip() if token < len(pieces) and token not in padding else "padding"
