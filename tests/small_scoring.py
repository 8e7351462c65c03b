"""Small stores and dictionaries to score, and what a slow reading in NumPy finds in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analyze.inputs import Subject
from analyze.scoring import encoding, matrices, plan, scores
from analyze.scoring.settings import ScoresSettings
from analyze.scoring.statistics import HISTOGRAM_EDGES, interest
from store import Store, files, open_store
from store.sites import Site
from store.split import normalise
from store.writer import StoreWriter
from tests.small_store import small_meta, small_part
from train import Dictionary, DictionaryConfig
from train.dictionaries.checkpoint import frozen, save_dictionary
from train.dictionaries.dictionary import build

D_MODEL, FEATURES = 8, 22


ACTIVATIONS = ("relu", "topk", "batchtopk", "jumprelu")


def whole_store(
    path: Path,
    seed: int = 0,
    n_images: int = 11,
    lengths: Sequence[int] | None = None,
    rough: bool = False,
    **changes: Any,
) -> Store:
    """A store whose activations are whole numbers from -3 to 3, or `rough`, of few different prompts."""
    rng = np.random.default_rng(seed)
    meta = small_meta(n_images, d_model=D_MODEL, pictures="none", seed=seed, **changes)
    words = [str(rng.choice(["a", "A ", "b", "c --ar 16:9", "c"])) for _ in range(n_images)]
    values = {
        (site, step, point): (rng.normal(size=shape) if rough else rng.integers(-3, 4, shape)).astype(meta.carrier.logical)
        for site in meta.site_objects
        for step in meta.steps
        for point in meta.points
        for shape in [(n_images, meta.tokens[site.stream].kept, D_MODEL)]
    }  # fmt: skip
    writer = StoreWriter.open_or_create(path, meta)
    for part in writer.missing():
        writer.write_part(part, small_part(meta, part, values, words, None, lengths))
    assert writer.seal()
    return open_store(path)


def whole_dictionary(
    site: str, seed: int, kind: str = "transcoder", n_features: int = FEATURES, **changes: Any
) -> Dictionary:
    """A dictionary of whole numbers, but that no two features of a row are ever equal: so TopK has no ties to break."""
    dictionary = build(DictionaryConfig(kind, Site.parse(site), D_MODEL, n_features, **changes))  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)

    def whole(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(low, high + 1, shape).astype(np.float32))

    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.zero_()
        dictionary.encoder.weight.copy_(whole(-1, 1, n_features, D_MODEL))
        dictionary.encoder.bias.copy_(whole(-4, 1, n_features) + torch.arange(n_features) / 1024)
        dictionary.decoder.weight.copy_(whole(-1, 1, D_MODEL, n_features))
        if dictionary.config.time_embed_dim is not None:
            dictionary.mod_linear.bias.copy_(torch.cat([whole(0, 1, D_MODEL), whole(-1, 1, D_MODEL)]))
        if dictionary.config.family == "flux-sae":
            dictionary.pre_bias.copy_(whole(-1, 1, D_MODEL))
        if dictionary.config.activation == "batchtopk":
            dictionary.threshold.fill_(1.5 + 1 / 2048)
        if dictionary.config.activation == "jumprelu":
            dictionary.log_threshold.fill_(float(np.log(2.5 + 1 / 2048)))
    return frozen(dictionary)


def rough_dictionary(*words: Any, **changes: Any) -> Dictionary:
    """The same with random encoder weights, which are no whole numbers."""
    dictionary = whole_dictionary(*words, **changes)
    with torch.no_grad():
        dictionary.encoder.weight.normal_(generator=torch.Generator().manual_seed(0))
    return dictionary


def slow_z(dictionary: Dictionary, x: np.ndarray) -> np.ndarray:
    """z of one row, float64, as the formulas say it."""
    p = {name: value.numpy().astype(np.float64) for name, value in dictionary.state_dict().items()}
    config = dictionary.config
    if config.family == "flux-sae":
        x = x - p["pre_bias"]
    elif config.time_embed_dim is not None:
        scale, shift = np.split(p["mod_linear.bias"], 2)
        x = x * (1 + scale) + shift
    pre = p["encoder.weight"] @ x + p["encoder.bias"]
    if config.activation == "jumprelu":
        return np.where(pre > np.exp(p["log_threshold"]), pre, 0)
    z = np.maximum(pre, 0)
    if config.activation == "batchtopk":
        return np.where(z > p["threshold"], z, 0)
    if config.k is not None:
        z[np.argsort(-z)[config.k :]] = 0
    return z


@dataclass
class Slow:
    """What the pass must find."""

    scores: np.ndarray
    tokens: np.ndarray
    table: dict[str, list[Any]]


def slow(store: Store, subject: Subject, step: int, options: ScoresSettings) -> Slow:
    """The same, row by row."""
    prompts, n_features = store.prompts().to_pylist(), subject.n_features
    x, positions = (
        store.read(subject.site, step, subject.point).astype(np.float64),
        store.tokens(subject.site.stream, step),
    )
    best = np.zeros((store.n_images, n_features))
    token = np.full((store.n_images, n_features), -1)
    rows: list[np.ndarray] = []
    words: list[dict[str, float]] = [{} for _ in range(n_features)]
    for image, prompt in enumerate(prompts):
        for slot, position in enumerate(positions[image]):
            real = position < prompt["text_length"]
            if position < 0 or (subject.site.stream == "txt" and not real and not options.padding):
                continue
            z = slow_z(subject.dictionary, x[image, slot])
            better = (z > best[image]) | (token[image] < 0)
            best[image], token[image] = np.where(better, z, best[image]), np.where(better, position, token[image])
            rows.append(z)
            for feature in np.flatnonzero(z > options.active_above) if subject.site.stream == "txt" and real else ():
                piece = prompt["text_pieces"][position]
                words[feature][piece] = max(words[feature].get(piece, 0.0), float(z[feature]))
    return Slow(
        best, token, slow_table(np.asarray(rows).reshape(-1, n_features), best, token, words, prompts, subject, options)
    )


def slow_table(
    z: np.ndarray, best: np.ndarray, token: np.ndarray, words: list[dict[str, float]], prompts: list[dict[str, Any]],
    subject: Subject, options: ScoresSettings,
) -> dict[str, list[Any]]:  # fmt: skip
    """The table, feature by feature."""
    table: dict[str, list[Any]] = {}
    edges = [-np.inf, *HISTOGRAM_EDGES, np.inf]
    for feature in range(subject.n_features):
        active = z[:, feature][z[:, feature] > options.active_above]
        order = [
            i for i in np.lexsort((np.arange(len(best)), -best[:, feature])) if best[i, feature] > options.active_above
        ]
        groups: dict[str, int] = {}
        for image in order:
            groups.setdefault(normalise(prompts[image]["prompt"]), int(image))
        top, unique = order[: options.top], list(groups.values())[: options.top]
        row = {
            "rows_active": len(active), "density": len(active) / max(len(z), 1), "images_active": len(order),
            "image_share": len(order) / len(best), "alive": bool(order),
            "mean_active": active.mean() if len(active) else 0, "deviation_active": active.std() if len(active) else 0,
            "max": best[:, feature].max(), "histogram": np.histogram(active, edges)[0].tolist(),
            "top_image": [int(i) for i in top], "top_token": token[top, feature].tolist(), "top_score": best[top, feature].tolist(),
            "unique_image": unique, "unique_token": token[unique, feature].tolist(), "unique_score": best[unique, feature].tolist(),
        }  # fmt: skip
        if subject.site.stream == "txt":
            ranked = sorted(words[feature].items(), key=lambda item: (-item[1], item[0]))[: options.top]
            row |= {"word": [word for word, _ in ranked], "word_score": [value for _, value in ranked]}
        for name, value in row.items():
            table.setdefault(name, []).append(value)
    table["interest"] = interest(
        np.asarray(table["mean_active"], float), np.asarray(table["image_share"], float)
    ).tolist()
    return table


def small_pieces(patch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 images, panes of 12 features, chunks of 4 by 6: so that a small store has several of each, and ragged ones."""
    for module in (matrices, plan):
        patch.setattr(module, "IMAGE_BLOCK", 4)
    for module in (encoding, plan):
        patch.setattr(module, "PANE", 12)
    patch.setattr(matrices, "FEATURE_BLOCK", 6)
    patch.setattr(encoding, "ROWS", 10)
    patch.setattr(matrices, "fsync_file", lambda _path: None)
    patch.setattr(files, "fsync_file", lambda _path: None)
    patch.setattr(files, "fsync_folder", lambda _path: None)


def digests(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def options_of(folder: Path, out: str | Path, **changes: Any) -> ScoresSettings:
    return ScoresSettings(store=folder / "s", dictionaries=folder / "d", out=folder / out, **changes)


def scored_store(folder: Path) -> tuple[Path, dict[str, bytes]]:
    """A store, two dictionaries of one site, and the bytes of their scores, computed by one thread in one go."""
    whole_store(folder / "s", n_images=11, rough=True, steps=(0,), sites=("txt_0",))
    for dictionary in (rough_dictionary("txt_0", 0, activation="topk", k=3), rough_dictionary("txt_0", 1, "sae")):
        save_dictionary(folder / "d" / dictionary.name, dictionary, None, [])
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch)
        scores.run(options_of(folder, "alone", workers=1))
    return folder, digests(folder / "alone")
