"""The parts of the page that are pictures and tables, as HTML that loads nothing: pictures are inside it.

Everything that comes from a store, a dictionary or a user is escaped.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO

import numpy as np
from PIL import Image

from analyze.explore.catalogue import Entry, Listing
from analyze.explore.studio import Seen
from analyze.pictures.contact import KINDS
from analyze.pictures.drawing import png_bytes
from analyze.pictures.examples import Example, peak_of, pictures_with_heat, strata_of
from analyze.pictures.words import percent
from analyze.steering.collages import differences
from store import Store
from store.sites import Stream

SMALL = 200
"""pixels up to which a picture is enlarged pixel by pixel"""
SIDE = 224
"""pixels of the longer side of a top image"""
QUALITY = 88
NAMES = {
    "psnr": ("PSNR", "dB", "equal pictures have no error: infinite"),
    "ssim": ("SSIM", "", "structural similarity: 1 is equal"),
    "flip": ("FLIP", "", "difference to the eye: 0 is equal"),
    "lpips": ("LPIPS", "", "perceptual distance: 0 is equal"),
    "latent_cosine": ("latent cosine", "", "1 is equal"),
    "latent_mse": ("latent MSE", "", "0 is equal"),
}


def figure(plain: Image.Image | None, changed: Image.Image | None, words: Sequence[str] = (), prompt: str = "") -> str:
    """Plain, changed and difference beside one another; `words`: what the first two show, where somebody can tell."""
    difference = None if plain is None or changed is None else differences([plain, changed])[1]
    said = [*words, "", ""][:2]
    cells = [
        _cell("plain", plain, said[0], f"without any change: {prompt}"),
        _cell("changed", changed, said[1], f"with the changes: {prompt}"),
        _cell("difference", difference, "dark where nothing changed" if difference else "", "where the two differ"),
    ]
    return f'<div class="triptych">{"".join(cells)}</div>'


def _cell(name: str, picture: Image.Image | None, said: str, alternative: str) -> str:
    if picture is None:
        shown = '<div class="empty"></div>'
    else:
        small = ' class="small"' if max(picture.size) <= SMALL else ""
        shown = f'<img{small} src="{_png(picture)}" width="{picture.width}" height="{picture.height}" alt="{escape(alternative)}">'
    return f'<figure data-of="{name}"><figcaption>{name}</figcaption>{shown}<p>{escape(said)}</p></figure>'


def report(seen: Seen) -> str:
    """The distances of a drawing, and what it cost."""
    tiles = "".join(
        f'<div title="{escape(NAMES[name][2])}"><dt>{NAMES[name][0]}</dt><dd data-distance="{name}">{_number(name, value)}'
        f"{f' <small>{NAMES[name][1]}</small>' if NAMES[name][1] else ''}</dd></div>"
        for name, value in seen.distances.items() if name in NAMES
    )  # fmt: skip
    cost = f"{seen.forwards} runs of the transformer in {seen.seconds:.2f} s"
    return f'<dl class="tiles">{tiles}</dl><p class="cost" role="status">{cost}</p>'


def message(text: str, kind: str = "bad", command: str = "") -> str:
    """One message: of kind `bad` where something could not be done, `good` or `note` otherwise; a command to be copied below it."""
    code = f"<code>{escape(command)}</code>" if command else ""
    return f'<p class="message {kind}" role="{"alert" if kind == "bad" else "status"}">{escape(text)}{code}</p>'


def listing(found: Sequence[Entry], total: int, of: Listing, chosen: int | None) -> str:
    """The table of features; a press on a row tells its number."""
    if not found:
        return message("No active feature matches: try fewer words, another dictionary or another step.", "note")
    rows = "".join(_row(entry, of.example(entry.feature), entry.feature == chosen) for entry in found)
    more = (
        f"{len(found)} of {total:,} features" if total > len(found) else f"{total:,} feature{'' if total == 1 else 's'}"
    )
    return (
        '<div class="scroll"><table class="features"><thead><tr><th>feature</th><th>what it is, or its top image</th>'
        '<th class="num less">interest</th><th class="num less">on tokens</th><th class="num less">on images</th><th class="num">max</th>'
        "</tr></thead>"
        f'<tbody>{rows}</tbody></table></div><p class="cost">{more} of {escape(of.subject.name)} at step {of.step}</p>'
    )


def _row(entry: Entry, example: str, chosen: bool) -> str:
    number = entry.numbers
    what = escape(entry.label or entry.says or "")
    if not what:
        seen = [f"<q>{escape(word)}</q>" for word in dict.fromkeys(entry.words[:6])]
        what = f"<small>{' '.join(seen) or escape(example)}</small>"
    current = ' aria-current="true"' if chosen else ""
    return (
        f'<tr data-feature="{entry.feature}"{current}><td><button type="button">{entry.feature}</button></td><td class="what">{what}</td>'
        f'<td class="num less">{_short(number["interest"])}</td><td class="num less">{percent(number["density"])}</td>'
        f'<td class="num less">{percent(number["image_share"])}</td><td class="num">{_short(number["max"])}</td></tr>'
    )


def feature(entry: Entry, of: Listing) -> str:
    """One feature: its name and its numbers."""
    number, name = entry.numbers, f"{of.subject.name}/{entry.feature}"
    on = {
        f"active on {KINDS[kind]}": percent(each["density"][entry.feature]) for kind, each in of.columns.kinds.items()
    }
    facts = {
        **(on or {"active on tokens": percent(number["density"])}), "on images": percent(number["image_share"]),
        "greatest activation": _short(number["max"]), "mean where active": _short(number["mean_active"]),
        "coherence": _short(number["coherence"]),
    }  # fmt: skip
    shown = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in facts.items() if value)
    title = f"<h3>{escape(name)} <small>step {of.step}</small></h3>"
    title += "".join(f'<p class="says">{escape(text)}</p>' for text in (entry.label, entry.says) if text)
    return f'<article class="feature">{title}<dl class="facts">{shown}</dl></article>'


def top_images(of: Listing, examples: Sequence[Example], store: Store) -> str:
    """Its top images with the heat over them; of text, the prompts with their words marked."""
    if not examples:
        return message("It is active on no image of this analysis.", "note")
    stream = of.subject.site.stream
    pairs = (
        pictures_with_heat(store, stream, examples, SIDE) if stream != "txt" and store.meta.pictures != "none" else []
    )
    if not pairs:
        lines = "".join(
            f"<li>{_words(example)} <small>{_most(store, stream, example)}</small></li>" for example in examples
        )
        return f'<ol class="prompts">{lines}</ol>'
    cells = "".join(_example(store, stream, example, *pair) for example, pair in zip(examples, pairs, strict=True))
    return f'<div class="strip">{cells}</div><p class="cost">Heat: where the feature is active. Point at a picture to see it without.</p>'


def _example(store: Store, stream: Stream, example: Example, picture: Image.Image, hot: Image.Image) -> str:
    """One picture with its heat, and without where it is pointed at; where words alone are hot it stays as it is."""
    image = example.heat.image
    shown = hot if stream != "joint" or peak_of(strata_of(store, stream, example.heat)[0]) > 0 else picture
    kinds = ' class="kinds"' if stream == "joint" else ""
    return (
        f'<figure><div class="pair"><img src="{_webp(shown)}" alt="where it is active in image {image}" loading="lazy">'
        f'<img src="{_webp(picture)}" alt="image {image}" loading="lazy"></div><figcaption><b{kinds}>{_most(store, stream, example)}</b> '
        f"{_words(example)} <small>image {image}</small></figcaption></figure>"
    )


def _most(store: Store, stream: Stream, example: Example) -> str:
    """The greatest activation on the image; of a joint site, whose tokens are of two kinds, that of each."""
    if stream != "joint":
        return f"{example.score:.3g}"
    image, text = (peak_of(part) for part in strata_of(store, stream, example.heat))
    return f"{image:.3g} on image tokens, {text:.3g} on text tokens"


def _words(example: Example) -> str:
    """The prompt with its tokens marked by their heat."""
    if example.pieces is None:
        return escape(example.prompt)
    return "".join(
        f'{" " if piece.space else ""}<mark style="--heat:{piece.heat:.2f}">{escape(piece.text)}</mark>' if piece.heat > 0
        else f'{" " if piece.space else ""}{escape(piece.text)}'
        for piece in example.pieces
    )  # fmt: skip


def header(facts: Mapping[str, str], links: Mapping[str, str]) -> str:
    """The head of the page: what is explored, where else to look, and the switch between light and dark."""
    shown = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    anchors = "".join(f'<a href="{escape(url)}" target="_blank">{escape(name)}</a>' for name, url in links.items())
    return (
        '<header class="head"><div class="line"><p class="brand">Granary <span>explore</span></p>'
        f'<nav>{anchors}<button type="button" class="theme" aria-label="light or dark">◐</button></nav></div>'
        f'<h1>Change a feature, see the picture</h1><dl class="facts">{shown}</dl></header>'
    )


def _short(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3g}"


def _number(name: str, value: float) -> str:
    if np.isinf(value):
        return "∞"
    digits = 6 if name in ("ssim", "latent_cosine") else 4  # those near 1 differ from it in their last digits
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.{digits}g}"


def _png(picture: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png_bytes(picture)).decode()}"


def _webp(picture: Image.Image) -> str:
    buffer = BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
