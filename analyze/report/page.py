"""What the report's page is filled with: plain values, already formatted where wording matters."""

import statistics
from collections.abc import Sequence
from typing import Any

from analyze.inputs import Analysis, Subject
from analyze.pictures.curves import sparkline
from analyze.pictures.words import percent
from analyze.prompts import prompt_texts
from analyze.report.findings import Spotlight, Truth
from analyze.truth.attributes import VALUES, Attribute
from analyze.truth.table import verdict_line

GROUPS = {"colour": "Colour", "shape": "Shape", "position": "Position", "background": "Background"}
MARKS = {
    "circle": "●", "square": "■", "triangle": "▲", "cross": "✚", "ring": "◯",
    "centre": "·", "top": "↑", "bottom": "↓", "left": "←", "right": "→",
    "top left": "↖", "top right": "↗", "bottom left": "↙", "bottom right": "↘",
}  # fmt: skip
TRAINING_WORDS = {"l1": "L1", "lr": "learning rate", "batch": "batch", "seed": "seed"}
STREAM_NAMES = {"img": "image", "txt": "text", "joint": "joint"}


def facts(analysis: Analysis, padding: bool) -> list[tuple[str, str]]:
    """What was run, as name and value, in the order in which a reader asks."""
    meta, store = analysis.store.meta, analysis.store
    prompts = store.prompts()
    n_prompts = len(set(prompt_texts(store)))
    held_out = sum(split == "val" for split in prompts["split"].to_pylist())
    weights = (
        (meta.model.get("weights_sha256") or {}).get("transformer")
        if isinstance(meta.model.get("weights_sha256"), dict)
        else None
    )
    model = str(meta.model.get("id")) + (f", transformer weights {weights[:12]}…" if weights else "")
    steps = ", ".join(map(str, analysis.steps))
    tokens = "; ".join(f"{stream}: {t.kept} of {t.total}" for stream, t in meta.tokens.items())
    return [
        ("Model", model),
        ("Store", f"{store.id[:23]}…" + ("; mlp_out recomputed from mlp_in" if store.recomputed else "")),
        (
            "Images",
            f"{store.n_images:,} of {meta.width} × {meta.height} pixels, {meta.grid[0]} × {meta.grid[1]} image tokens",
        ),
        ("Prompts", f"{n_prompts:,} different; {held_out:,} images of held-out prompts"),
        ("Sampling", f"{meta.num_inference_steps} steps, guidance {meta.guidance:g}, seed {meta.seed}"),
        (
            "Analyzed",
            f"{len(analysis.subjects)} dictionaries at {'steps' if len(analysis.steps) > 1 else 'step'} {steps}",
        ),
        (
            "Tokens kept",
            tokens + ("; padding counted" if padding else "; text padding not counted" if "txt" in meta.tokens else ""),
        ),
    ]


def tiles(analysis: Analysis, truth: Truth | None, overview: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Summary figures: value, what it is, and a word more."""
    n_prompts = len(set(prompt_texts(analysis.store)))
    n_features = sum(row["n_features"] for row in overview)
    found = [
        {"value": f"{analysis.store.n_images:,}", "name": "images", "more": f"{n_prompts:,} prompts"},
        {"value": str(len(overview)), "name": "dictionaries", "more": f"{n_features:,} features"},
    ]
    for stream in analysis.streams():
        measured = [row for row in overview if row["stream"] == stream and row["fvu_value"] is not None]
        for kind in sorted({row["kind"] for row in measured}, reverse=True)[:1]:  # transcoders where there are any
            values = [row["fvu_value"] for row in measured if row["kind"] == kind]
            more = f"{len(values)} {kind}s, {min(values):.3f} to {max(values):.3f} on held-out rows"
            name = f"median FVU, {STREAM_NAMES[stream]}"
            found.append({"value": f"{statistics.median(values):.3f}", "name": name, "more": more})
    for stream, verdict in truth.table["verdict"].items() if truth else []:
        more = f"have a feature with AUROC ≥ {truth.threshold:g}" if truth else ""
        count = f"{verdict['with_feature']} of {verdict['of']}"
        found.append({"value": count, "name": f"attributes, {STREAM_NAMES[stream]}", "more": more})
    return found


def overview_rows(analysis: Analysis) -> list[dict[str, Any]]:
    """One row for each dictionary: what it is, and how good on held-out rows (text: on real tokens, padding beside)."""
    rows = [_overview_row(analysis, subject) for subject in analysis.subjects]
    highest = max((value for row in rows for value in row["fvu_steps"].values()), default=0.0)
    for row in rows:
        row["curve"] = (
            sparkline(row["fvu_steps"], highest, f"FVU of {row['name']} by step") if row["fvu_steps"] else None
        )
    return rows


def _overview_row(analysis: Analysis, subject: Subject) -> dict[str, Any]:
    config = subject.dictionary.config
    figures = subject.dictionary.metrics or {}
    main, padding = figures.get("real") or figures, figures.get("padding")
    alive: set[int] = set()
    for step in analysis.steps:
        table = analysis.matrix(subject, step).features()
        alive.update(table.filter(table["alive"])["feature"].to_pylist())
    steps = {
        int(step): values["fvu"]
        for step, values in (main.get("steps") or {}).items()
        if values and values.get("fvu") is not None
    }
    return {
        "name": subject.name,
        "anchor": f"dictionary-{subject.name}",
        "stream": subject.site.stream,
        "kind": {"transcoder": "transcoder", "sae": "SAE"}[config.kind],
        "activation": "ReLU" if config.k is None else f"TopK {config.k}",
        "n_features": config.n_features,
        "alive": percent(len(alive) / config.n_features),
        "fvu_value": main.get("fvu"),
        "fvu": _shown(main.get("fvu"), "{:.3f}"),
        "l0": _shown(main.get("l0"), "{:.1f}"),
        "l0_share": percent(main["density"]) if main.get("density") is not None else None,
        "dead": percent(main["dead"]) if main.get("dead") is not None else "–",
        "cosine": _shown(main.get("cosine"), "{:.3f}"),
        "padding": _shown(padding.get("fvu"), "{:.3f}") if padding else None,
        "fvu_steps": dict(sorted(steps.items())),
        "training": training_words(subject),
    }


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def training_words(subject: Subject) -> str:
    """How the dictionary came to be: settings that matter, or that nobody knows."""
    config = subject.dictionary.config
    if config.parent is None or config.training is None:
        return "trained elsewhere; settings unknown"
    words = [f"{config.steps:,} steps over {config.rows:,} rows"]
    for key, name in TRAINING_WORDS.items():
        value = config.training.get(key)
        if value is not None:
            words.append(f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}")
    return ", ".join(words)


def truth_view(truth: Truth, anchors: set[str]) -> dict[str, Any]:
    """The truth table as groups of rows, each with bars."""
    streams = list(truth.table["verdict"])
    groups = []
    for group, title in GROUPS.items():
        entries = [entry for entry in truth.table["attributes"] if entry["group"] == group]
        groups.append(
            {"title": title, "rows": [_truth_row(entry, streams, truth.threshold, anchors) for entry in entries]}
        )
    without = {STREAM_NAMES[s]: v["without"] for s, v in truth.table["verdict"].items() if v["without"]}
    untested = {STREAM_NAMES[s]: v["untested"] for s, v in truth.table["verdict"].items() if v["untested"]}
    return {
        "streams": [{"key": stream, "name": STREAM_NAMES[stream]} for stream in streams],
        "groups": groups,
        "without": without,
        "untested": untested,
        "verdict": verdict_line(truth.table),
        "images": truth.table["images"],
        "settings": truth.table["settings"],
        "threshold": truth.threshold,
        "tokens": any(
            "tokens" in stream for entry in truth.table["attributes"] for stream in entry["streams"].values()
        ),
    }


def _truth_row(entry: dict[str, Any], streams: Sequence[str], threshold: float, anchors: set[str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "value": entry["value"],
        "mark": mark(Attribute(entry["group"], entry["value"])),
        "n": f"{entry['present']} of {entry['present'] + entry['absent']}",
        "streams": {},
        "tokens": None,
    }
    for stream in streams:
        row["streams"][stream] = _bar(entry["streams"][stream]["images"], threshold, anchors)
    tokens = entry["streams"].get("img", {}).get("tokens")
    if tokens:
        row["tokens"] = _bar(tokens["chosen_by_tokens"], threshold, anchors) | {
            "of_images": tokens["chosen_by_images"],
            "ceiling": tokens["ceiling"]["auroc"],
            "floor": tokens["floor"]["auroc"],
            "floor_width": _width(tokens["floor"]["auroc"]),
            "ceiling_width": _width(tokens["ceiling"]["auroc"]),
        }
    return row


def _bar(place: dict[str, Any] | None, threshold: float, anchors: set[str]) -> dict[str, Any]:
    if place is None:
        return {"auroc": None}
    anchor = f"{place['dictionary']}-step{place['step']}-f{place['feature']}"
    return {
        "auroc": place["auroc"],
        "width": _width(place["auroc"]),
        "good": place["auroc"] >= threshold,
        "label": f"{place['dictionary']} · step {place['step']} · {place['feature']}",
        "anchor": anchor if anchor in anchors else None,
    }


def _width(auroc: float) -> str:
    """Where an AUROC lies on a bar from 0.5 to 1, in percent."""
    return f"{max(0.0, min(1.0, (auroc - 0.5) * 2)) * 100:.1f}"


def mark(attribute: Attribute) -> dict[str, str]:
    """A small sign for the attribute: a colour to paint, or a character."""
    if attribute.group in ("colour", "background"):
        return {"swatch": attribute.value.replace("light grey", "lightgrey").replace(" ", "-"), "kind": attribute.group}
    return {"sign": MARKS.get(attribute.value, "·"), "kind": attribute.group}


def spotlight_view(spot: Spotlight, row: dict[str, Any], threshold: float, heat_inside: float | None) -> dict[str, Any]:
    """What a card says of its feature (`row` of the feature table); figures are name, value and what the value means."""
    stream = spot.subject.site.stream
    figures: list[tuple[str, str, str]] = []
    if spot.image_auroc is not None:
        figures.append(("AUROC images", f"{spot.image_auroc:.3f}", "over images of the scored half"))
    if spot.token_auroc is not None:
        what = "background tokens" if spot.attribute and spot.attribute.group == "background" else "object tokens"
        figures.append(("AUROC tokens", f"{spot.token_auroc:.3f}", f"over {what} of the scored half"))
    if heat_inside is not None:
        where = (
            "off the objects"
            if spot.attribute and spot.attribute.group == "background"
            else "on objects with the attribute"
        )
        figures.append(
            ("heat inside", f"{100 * heat_inside:.0f} %", f"share of the activation on these images that lies {where}")
        )
    figures += [
        ("on images", percent(row["image_share"]), "share of images on which it is active"),
        ("on tokens", percent(row["density"]), "share of tokens on which it is active"),
        ("mean active", f"{row['mean_active']:.3g}", "mean activation on the tokens where it is active"),
        ("max", f"{row['max']:.3g}", "largest activation on any image"),
    ]
    auroc = spot.image_auroc if spot.image_auroc is not None else spot.token_auroc
    return {
        "anchor": spot.anchor,
        "feature": spot.feature,
        "step": spot.step,
        "stream": stream,
        "attribute": None if spot.attribute is None else str(spot.attribute.value),
        "group": None if spot.attribute is None else spot.attribute.group,
        "mark": None if spot.attribute is None else mark(spot.attribute),
        "stands": auroc is not None and auroc >= threshold,
        "by_tokens": spot.attribute is not None and spot.image_auroc is None,
        "figures": figures,
        "sort": {
            "auroc": f"{auroc or 0:.6f}",
            "tokens": f"{spot.token_auroc or 0:.6f}",
            "share": f"{row['image_share']:.6f}",
            "interest": f"{row['interest']:.6f}",
        },
    }


assert set(MARKS) == {*VALUES["shape"], *VALUES["position"]}
