"""What the report's page is filled with: plain values, already formatted where wording matters."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from analyze.inputs import Analysis, Subject
from analyze.pictures.contact import KINDS
from analyze.pictures.curves import sparkline
from analyze.pictures.words import percent
from analyze.prompts import prompt_texts
from analyze.report.findings import Truth, feature_link, figures
from analyze.truth.attributes import VALUES, Attribute
from analyze.truth.table import verdict_line
from store.sizes import picture_size

GROUPS = {"colour": "Colour", "shape": "Shape", "position": "Position", "background": "Background"}
MARKS = {
    "circle": "●", "square": "■", "triangle": "▲", "cross": "✚", "ring": "◯",
    "centre": "·", "top": "↑", "bottom": "↓", "left": "←", "right": "→",
    "top left": "↖", "top right": "↗", "bottom left": "↙", "bottom right": "↘",
}  # fmt: skip
TRAINING_WORDS = {"l1": "L1", "lr": "learning rate", "batch": "batch", "seed": "seed"}
ACTIVATIONS = {"relu": "ReLU", "topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU"}
DENSITY_EDGES = tuple(10.0 ** (place / 4) for place in range(-24, 1))
"""quarters of a decade from 1e-6 to 1; smaller ones count in the first"""
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
            f"{store.n_images:,} of {picture_size(meta.width, meta.height, ' × ')}, {meta.grid[1]} × {meta.grid[0]} image tokens",
        ),
        ("Prompts", f"{n_prompts:,} different; {held_out:,} images of held-out prompts"),
        ("Sampling", f"{meta.num_inference_steps} steps, guidance {meta.guidance:g}, seed {meta.seed}"),
        (
            "Analyzed",
            f"{len(analysis.subjects)} dictionaries at {'steps' if len(analysis.steps) > 1 else 'step'} {steps}",
        ),
        (
            "Tokens kept",
            tokens
            + ("; padding counted" if padding else "; text padding not counted" if set(meta.tokens) - {"img"} else ""),
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
        measured = [row for row in overview if row["stream"] == stream and row["fvu_tile"] is not None]
        for kind in sorted({row["kind"] for row in measured}, reverse=True)[:1]:  # transcoders where there are any
            values = [row["fvu_tile"] for row in measured if row["kind"] == kind]
            spread = (
                f"{len(values)} {kind}s, {min(values):.3f} to {max(values):.3f}" if len(values) > 1 else f"1 {kind}"
            )
            more = f"{spread} on held-out rows"
            name = f"median FVU, {stream_words(stream)}"
            found.append({"value": f"{statistics.median(values):.3f}", "name": name, "more": more})
    for stream, verdict in truth.table["verdict"].items() if truth else []:
        judged = len({row["dictionary"] for row in truth.table["by_dictionary"]}) if truth else 0
        more = f"have a feature with AUROC ≥ {truth.threshold:g}" if truth else ""
        if judged > len(overview):  # the truth table is of more dictionaries than this report shows
            more += f" in all {judged} dictionaries judged"
        count = f"{verdict['with_feature']} of {verdict['of']}"
        found.append({"value": count, "name": f"attributes, {stream_words(stream)}", "more": more})
    return found


def stream_words(stream: str) -> str:
    """What figures of a stream are of: those of joint sites are of image tokens alone, for how much text there is the store decides."""
    return STREAM_NAMES[stream] + (", image tokens" if stream == "joint" else "")


def dictionary_rows(analysis: Analysis) -> list[dict[str, Any]]:
    """One row for each dictionary: what it is, and how good on held-out rows.

    Of text that is on real tokens, padding beside; of joint sites on all tokens, each kind beside.
    """
    rows = [_overview_row(analysis, subject) for subject in analysis.subjects]
    highest = max((value for row in rows for value in row["fvu_steps"].values()), default=0.0)
    for row in rows:
        row["curve"] = (
            sparkline(row["fvu_steps"], highest, f"FVU of {row['name']} by step") if row["fvu_steps"] else None
        )
    return rows


def _overview_row(analysis: Analysis, subject: Subject) -> dict[str, Any]:
    config = subject.outline.config
    measured = subject.outline.metrics or {}
    joint = subject.site.stream == "joint"
    main = measured if joint else measured.get("real") or measured
    padding = None if joint else measured.get("padding")
    alive = np.zeros(subject.n_features, bool)
    densities = []
    for step in analysis.steps:
        table = figures(analysis, subject, step, "alive", "density")
        alive |= table["alive"].to_numpy(zero_copy_only=False)
        densities.append(table["density"].to_numpy())
    steps = {
        int(step): values["fvu"]
        for step, values in (main.get("steps") or {}).items()
        if values and values.get("fvu") is not None
    }
    return {
        "name": subject.name,
        "link": f"#/features?dictionary={subject.name}",
        "stream": subject.site.stream,
        "kind": {"transcoder": "transcoder", "sae": "SAE"}[config.kind],
        "activation": ACTIVATIONS[config.activation] + ("" if config.k is None else f" {config.k}"),
        "n_features": config.n_features,
        "alive": percent(int(alive.sum()) / config.n_features),
        "fvu_value": main.get("fvu"),
        "fvu_tile": (measured.get("image") or {}).get("fvu") if joint else main.get("fvu"),
        "fvu": _shown(main.get("fvu"), "{:.3f}"),
        "l0_value": main.get("l0"),
        "l0": _shown(main.get("l0"), "{:.1f}"),
        "l0_share": percent(main["density"]) if main.get("density") is not None else None,
        "dead": percent(main["dead"]) if main.get("dead") is not None else "–",
        "cosine": _shown(main.get("cosine"), "{:.3f}"),
        "padding": _shown(padding.get("fvu"), "{:.3f}") if padding else None,
        "fvu_steps": dict(sorted(steps.items())),
        "density": density_counts(densities),
        "training": training_words(subject),
        **({"kinds": _fvu_by_kind(measured)} if joint else {}),
    }


def _fvu_by_kind(measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of a joint dictionary, the FVU over each kind of token, as name and value; none where nobody measured them apart."""
    return [(name, _shown(measured[kind].get("fvu"), "{:.3f}")) for kind, name in KINDS.items() if measured.get(kind)]


def density_counts(densities: Sequence[Float[np.ndarray, " feature"]]) -> list[list[int]]:
    """For each step, how many features have a density in each bin of `DENSITY_EDGES`; those that never fire are in none."""
    return [np.histogram(np.clip(d[d > 0], DENSITY_EDGES[0], 1), DENSITY_EDGES)[0].tolist() for d in densities]


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def training_words(subject: Subject) -> str:
    """How the dictionary came to be: settings that matter, or that nobody knows."""
    config = subject.outline.config
    if config.parent is None or config.training is None:
        return "trained elsewhere; settings unknown"
    words = [f"{config.steps:,} steps over {config.rows:,} rows"]
    for key, name in TRAINING_WORDS.items():
        value = config.training.get(key)
        if value is not None:
            words.append(f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}")
    return ", ".join(words)


def truth_view(truth: Truth) -> dict[str, Any]:
    """The truth table as groups of rows, each with bars."""
    streams = list(truth.table["verdict"])
    groups = []
    for group in dict.fromkeys(entry["group"] for entry in truth.table["attributes"]):
        entries = [entry for entry in truth.table["attributes"] if entry["group"] == group]
        title = GROUPS.get(group, str(group).capitalize())
        groups.append({"title": title, "rows": [_truth_row(entry, streams, truth.threshold) for entry in entries]})
    without = {STREAM_NAMES[s]: v["without"] for s, v in truth.table["verdict"].items() if v["without"]}
    untested = {STREAM_NAMES[s]: v["untested"] for s, v in truth.table["verdict"].items() if v["untested"]}
    return {
        "streams": [{"key": s, "name": STREAM_NAMES[s]} for s in streams],
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


def _truth_row(entry: dict[str, Any], streams: Sequence[str], threshold: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "value": entry["value"],
        "mark": mark(Attribute(entry["group"], entry["value"])),
        "n": f"{entry['present']} of {entry['present'] + entry['absent']}",
        "streams": {},
        "tokens": None,
    }
    for stream in streams:
        found = entry["streams"][stream]
        row["streams"][stream] = _bar(
            found["images"], threshold, found.get("images_floor"), found.get("images_ceiling")
        )
    told = [entry["streams"].get(stream, {}).get("tokens") for stream in ("img", "joint")]
    tokens = max(filter(None, told), key=lambda each: each["chosen_by_tokens"]["selection"], default=None)
    if tokens:
        row["tokens"] = {
            **_bar(tokens["chosen_by_tokens"], threshold, tokens["floor"], tokens["ceiling"]),
            "of_images": tokens["chosen_by_images"],
        }
    return row


def _bar(
    place: dict[str, Any] | None,
    threshold: float,
    floor: dict[str, Any] | None,
    ceiling: dict[str, Any] | None,
) -> dict[str, Any]:
    if place is None:
        return {"auroc": None}
    return {
        "auroc": place["auroc"],
        "f1": place.get("f1"),
        "width": _width(place["auroc"]),
        "good": place["auroc"] >= threshold,
        "label": f"{place['dictionary']}/{place['feature']} · step {place['step']}",
        "link": feature_link(place["dictionary"], place["step"], place["feature"]),
        **{name: None if of is None else of["auroc"] for name, of in (("floor", floor), ("ceiling", ceiling))},
        **{
            f"{name}_width": None if of is None else _width(of["auroc"])
            for name, of in (("floor", floor), ("ceiling", ceiling))
        },
    }


def _width(auroc: float) -> str:
    """Where an AUROC lies on a bar from 0.5 to 1, in percent."""
    return f"{max(0.0, min(1.0, (auroc - 0.5) * 2)) * 100:.1f}"


def mark(attribute: Attribute) -> dict[str, str]:
    """A small sign for the attribute: a colour to paint, or a character."""
    if attribute.group in ("colour", "background"):
        return {"swatch": attribute.value.replace("light grey", "lightgrey").replace(" ", "-"), "kind": attribute.group}
    return {"sign": MARKS.get(attribute.value, "·"), "kind": attribute.group}


assert set(MARKS) == {*VALUES["shape"], *VALUES["position"]}
