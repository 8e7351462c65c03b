"""A small store whose features are known: channel a of the activations is high where attribute a is, and a dictionary that reads it."""

import io
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageDraw

from analyze.truth.attributes import ATTRIBUTES, VALUES, Attribute
from store import Site, Store, open_store
from store.format import StoreMeta, StreamTokens
from store.split import split_of
from store.tokens import kept_positions
from store.writer import Part, StoreWriter
from train.dictionaries.checkpoint import save_dictionary
from train.dictionaries.config import DictionaryConfig
from train.dictionaries.dictionary import Dictionary, build

RGB = {
    "red": (220, 40, 40), "yellow": (250, 212, 40), "green": (48, 160, 70), "cyan": (40, 200, 220), "blue": (40, 80, 215),
    "purple": (130, 60, 185), "pink": (245, 130, 180), "white": (250, 250, 250), "black": (22, 22, 26), "light grey": (188, 188, 192),
}  # fmt: skip
PLACES = {"top": (0, 1), "bottom": (2, 1), "left": (1, 0), "right": (1, 2), "top left": (0, 0), "top right": (0, 2),
          "bottom left": (2, 0), "bottom right": (2, 2), "centre": (1, 1)}  # fmt: skip
MODEL = {"id": "planted", "revision": None, "weights_sha256": {"transformer": "ab" * 32}}


@dataclass(frozen=True)
class Plan:
    """What a planted store is like."""

    n_images: int = 60
    grid: tuple[int, int] = (6, 9)
    pixels: int = 8
    steps: int = 2
    sites: tuple[str, ...] = ("img_0", "txt_0")
    text_tokens: int = 24
    d_model: int = 32
    planted: tuple[Attribute, ...] = ATTRIBUTES
    noise: float = 0.3
    pictures: bool = True
    truth: bool = True
    seeds_per_prompt: int = 1
    tokens: dict[str, StreamTokens] = field(default_factory=dict)
    chunk_images: int = 8
    store_dtype: str = "bfloat16"
    seed: int = 0


def planted_store(path: Path, plan: Plan = Plan()) -> Store:
    """A finished store of random one-object scenes with the plan's attributes planted in its channels."""
    rng = np.random.default_rng(plan.seed)
    scenes = [_scene(rng, plan) for _ in range(-(-plan.n_images // plan.seeds_per_prompt))]
    scenes = [scenes[image // plan.seeds_per_prompt] for image in range(plan.n_images)]
    meta = _meta(plan)
    writer = StoreWriter.open_or_create(path, meta)
    for part in range(meta.n_parts):
        images = meta.part_images(part)
        writer.write_part(part, _part(rng, plan, meta, images, [scenes[image] for image in images]))
    assert writer.seal()
    return open_store(path)


def _scene(rng: np.random.Generator, plan: Plan) -> dict[str, Any]:
    colour, shape, place = (str(rng.choice(VALUES[group])) for group in ("colour", "shape", "position"))
    background = str(rng.choice([value for value in VALUES["background"] if value != colour]))
    rows, columns = plan.grid
    row, column = PLACES[place]
    top, left = row * (rows - 2) // 2, column * (columns - 3) // 2
    coverage = np.zeros(plan.grid)
    coverage[top : top + 2, left : left + 3] = 1
    truth = {
        "shape": shape,
        "colour": colour,
        "size": "medium",
        "position": place,
        "coverage": coverage.ravel().tolist(),
    }
    return {
        "kind": "one",
        "background": background,
        "relation": None,
        "drawn": True,
        "objects": [truth],
        "box": (top, left),
    }


def prompt_of(scene: dict[str, Any]) -> str:
    thing = scene["objects"][0]
    place = "" if thing["position"] == "centre" else f" at the {thing['position']}"
    ground = "" if scene["background"] == "light grey" else f" on a {scene['background']} background"
    return f"a {thing['colour']} {thing['shape']}{place}{ground}"


def _attributes(scene: dict[str, Any]) -> dict[str, str]:
    thing = scene["objects"][0]
    return {
        "colour": thing["colour"],
        "shape": thing["shape"],
        "position": thing["position"],
        "background": scene["background"],
    }


def _meta(plan: Plan) -> StoreMeta:
    n_img = plan.grid[0] * plan.grid[1]
    tokens = {
        "img": StreamTokens("all", n_img, n_img),
        "txt": StreamTokens("all", plan.text_tokens, plan.text_tokens),
        **plan.tokens,
    }
    streams = {Site.parse(site).stream for site in plan.sites}
    return StoreMeta(
        n_images=plan.n_images, chunk_images=plan.chunk_images, sites=plan.sites, points=("mlp_in", "mlp_out"),
        steps=tuple(range(plan.steps)), d_model=plan.d_model, store_dtype=plan.store_dtype,  # type: ignore[arg-type]
        codec="none", targets="stored",
        tokens={stream: policy for stream, policy in tokens.items() if stream in streams},  # type: ignore[misc]
        height=plan.grid[0] * plan.pixels, width=plan.grid[1] * plan.pixels, pixels_per_token=plan.pixels,
        num_inference_steps=plan.steps, max_sequence_length=plan.text_tokens, guidance=0.0, seed=plan.seed,
        seeds_per_prompt=plan.seeds_per_prompt, cycle=False, batch_size=1, threads=1, dtype="float32", device="cpu",
        pictures="png" if plan.pictures else "none", model=MODEL, scheduler={}, prompts={}, weights={"policy": "none"}, versions={},
    )  # fmt: skip


def _part(rng: np.random.Generator, plan: Plan, meta: StoreMeta, images: range, scenes: list[dict[str, Any]]) -> Part:
    pieces = [[f"▁{word}" for word in prompt_of(scene).split()] + ["</s>"] for scene in scenes]
    activations, tokens = {}, {}
    for site in meta.site_objects:
        for step in meta.steps:
            total = meta.tokens[site.stream].total
            full = np.stack(
                [
                    _signal(plan, site.stream, step, scene, words, total)
                    for scene, words in zip(scenes, pieces, strict=True)
                ]
            )
            full = (full + plan.noise * rng.standard_normal(full.shape)).astype(np.float32)
            policy, stream = meta.tokens[site.stream], site.stream
            slots = np.stack(
                [
                    kept_positions(policy, meta.seed, i, step, stream, len(w))
                    for i, w in zip(images, pieces, strict=True)
                ]
            )
            kept = np.take_along_axis(full, np.maximum(slots, 0)[..., None], axis=1)
            kept[slots < 0] = np.nan
            if not meta.tokens[site.stream].all_kept:
                tokens[site.stream, step] = slots
            for point in meta.points:
                activations[site, step, point] = kept.astype(meta.carrier.logical)
    return Part(activations, tokens, _prompts(plan, images, scenes, pieces), _pictures(plan, images, scenes))


def _signal(plan: Plan, stream: str, step: int, scene: dict[str, Any], words: list[str], total: int) -> np.ndarray:
    values = np.zeros((total, plan.d_model), np.float32)
    strength = 3.0 / (1 + step)
    inside = np.asarray(scene["objects"][0]["coverage"]) > 0.5
    for number, attribute in enumerate(ATTRIBUTES):
        if (
            attribute not in plan.planted
            or _attributes(scene)[attribute.group] != attribute.value
            or number >= plan.d_model
        ):
            continue
        if stream == "img":
            values[~inside if attribute.group == "background" else inside, number] = strength
        else:
            places = [i for i, word in enumerate(words) if word.strip("▁") in attribute.value.split()]
            values[places or [len(words) - 1], number] = strength
    return values


def _prompts(plan: Plan, images: range, scenes: list[dict[str, Any]], pieces: list[list[str]]) -> pa.Table:
    sigma = [[1.0 - step / plan.steps for step in range(plan.steps)]] * len(images)
    columns: dict[str, Any] = {
        "image": pa.array(images, pa.int64()),
        "prompt": [prompt_of(scene) for scene in scenes],
        "seed": pa.array([plan.seed + image for image in images], pa.int64()),
        "split": [split_of(prompt_of(scene)) for scene in scenes],
        "text_ids": pa.array([list(range(len(words))) for words in pieces], pa.list_(pa.int32())),
        "text_pieces": pieces,
        "text_length": pa.array([len(words) for words in pieces], pa.int32()),
        "sigma": pa.array(sigma, pa.list_(pa.float32())),
        "scheduler_sigma": pa.array(sigma, pa.list_(pa.float32())),
    }
    if plan.truth:
        columns["truth"] = [
            json.dumps({key: value for key, value in scene.items() if key != "box"}) for scene in scenes
        ]
    return pa.table(columns)


def _pictures(plan: Plan, images: range, scenes: list[dict[str, Any]]) -> pa.Table | None:
    if not plan.pictures:
        return None
    rows = []
    for image, scene in zip(images, scenes, strict=True):
        buffer = io.BytesIO()
        draw_scene(plan, scene).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": f"{image}.png"})
    return pa.table({"id": pa.array(images, pa.int64()), "image": rows})


def draw_scene(plan: Plan, scene: dict[str, Any]) -> Image.Image:
    picture = Image.new("RGB", (plan.grid[1] * plan.pixels, plan.grid[0] * plan.pixels), RGB[scene["background"]])
    draw, (top, left), p = ImageDraw.Draw(picture), scene["box"], plan.pixels
    box = (left * p, top * p, (left + 3) * p - 1, (top + 2) * p - 1)
    colour = RGB[scene["objects"][0]["colour"]]
    match scene["objects"][0]["shape"]:
        case "circle" | "ring":
            draw.ellipse(box, fill=colour)
            if scene["objects"][0]["shape"] == "ring":
                draw.ellipse((box[0] + p, box[1] + p // 2, box[2] - p, box[3] - p // 2), fill=RGB[scene["background"]])
        case "triangle":
            draw.polygon([((box[0] + box[2]) // 2, box[1]), (box[0], box[3]), (box[2], box[3])], fill=colour)
        case "cross":
            draw.rectangle((box[0] + p, box[1], box[2] - p, box[3]), fill=colour)
            draw.rectangle((box[0], box[1] + p // 2, box[2], box[3] - p // 2), fill=colour)
        case _:
            draw.rectangle(box, fill=colour)
    return picture


def reading_dictionary(
    site: str, d_model: int = 32, n_features: int = 48, kind: str = "transcoder", seed: int = 0
) -> Dictionary:
    """A dictionary whose feature f reads channel f (features from d_model on read random directions); active above 1."""
    config = DictionaryConfig(kind=kind, site=Site.parse(site), d_model=d_model, n_features=n_features)  # type: ignore[arg-type]
    dictionary = build(config, METRICS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = torch.randn(n_features, d_model, generator=generator) / d_model**0.5
        shared = min(d_model, n_features)
        weight[:shared] = torch.eye(d_model)[:shared]
        dictionary.encoder.weight.copy_(weight)
        dictionary.encoder.bias.fill_(-1.0)
        dictionary.decoder.weight.copy_(weight.T)
        dictionary.decoder.bias.zero_()
    return dictionary


METRICS: dict[str, Any] | None = None


def planted_dictionaries(folder: Path, plan: Plan = Plan(), **changes: Any) -> Path:
    """A folder with one reading dictionary for each site of the plan."""
    for site in plan.sites:
        dictionary = reading_dictionary(site, d_model=plan.d_model)
        dictionary.config = replace(dictionary.config, **changes)
        save_dictionary(folder / dictionary.name, dictionary, dictionary.metrics, [])
    return folder
