"""Small dictionaries with random weights, rows for them, and the formulas once more, slow and plain in float64."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from store.sites import Site
from train import DictionaryConfig
from train.dictionaries.dictionary import Dictionary, build
from train.recipe import Recipe

D_MODEL, N_FEATURES, WIDTH = 6, 24, 8


def random_dictionary(**changes: Any) -> Dictionary:
    """A transcoder of img_3 with normally distributed parameters and no gradients; `changes` are fields of its config."""
    settings: dict[str, Any] = {
        "kind": "transcoder",
        "site": Site.parse("img_3"),
        "d_model": D_MODEL,
        "n_features": N_FEATURES,
        "time_embed_dim": WIDTH,
    }
    dictionary = build(DictionaryConfig(**{**settings, **changes}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.normal_(generator=generator)
    return dictionary.requires_grad_(False)


def rows(count: int, d_model: int = D_MODEL, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Rows and the sigma of each, of four denoising steps by turns."""
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.tensor([1.0, 0.75390625, 0.5, 0.25])[torch.arange(count) % 4]
    return torch.randn(count, d_model, generator=generator), sigma


def recipe_of(dictionary: Dictionary, **changes: Any) -> Recipe:
    """A recipe that would have made this dictionary; `changes` are fields of it."""
    config = dictionary.config
    values: dict[str, Any] = {
        "kind": config.kind,
        "family": config.family,
        "activation": config.activation,
        "k": config.k,
        "expansion": config.n_features // config.d_model,
        "time_embed_dim": config.time_embed_dim,
        "skip": config.skip,
        "nested": tuple(width / config.n_features for width in config.nested),
        "schedule": "constant",
    }
    return Recipe(**{**values, **changes})


def prepared64(p: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> Tensor:
    """What the encoder's matrix is applied to, from float64 parameters under their published names."""
    x = x.double()
    if "pre_bias" in p:
        return x - p["pre_bias"]
    if "mod_linear.weight" not in p:
        return x
    half = p["time_mlp.0.weight"].shape[1] // 2
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0).double()) * torch.arange(half).double() / (half - 1))
    angles = sigma.double()[:, None] * frequencies
    h = torch.cat([angles.sin(), angles.cos()], dim=1)
    for layer in ("time_mlp.0", "time_mlp.2"):
        h = h @ p[f"{layer}.weight"].T + p[f"{layer}.bias"]
        h = h * h.sigmoid()
    scale, shift = (h @ p["mod_linear.weight"].T + p["mod_linear.bias"]).chunk(2, dim=1)
    return x * (1 + scale) + shift


def kept64(recipe: Recipe, p: Mapping[str, Tensor], pre: Tensor) -> Tensor:
    """Which features are active in training, by sorting: (row, n_features) bool."""
    z = pre.detach().clamp_min(0)
    if recipe.activation == "jumprelu":
        return pre.detach() > p["log_threshold"].detach().exp()
    if recipe.activation == "topk":
        assert recipe.k is not None
        return (z >= z.sort(dim=1, descending=True).values[:, recipe.k - 1 : recipe.k]) & (z > 0)
    if recipe.activation == "batchtopk":
        assert recipe.k is not None
        return (z >= z.flatten().sort(descending=True).values[recipe.k * len(z) - 1]) & (z > 0)
    return z > 0
