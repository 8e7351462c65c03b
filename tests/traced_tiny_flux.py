"""A store of tiny-flux with traces, and transcoders for all its sites: what graphs are made of."""

from pathlib import Path
from typing import Any

import torch

from harvest import HarvestSettings
from harvest import run as harvest
from store import Site
from train import DictionaryConfig
from train.dictionaries.checkpoint import save_dictionary
from train.dictionaries.dictionary import build

LAYERS = 3
FEATURES = 96


def traced_store(path: Path, **changes: Any) -> Path:
    """A harvest of three images, of which the first two are traced at steps 1 and 3 in blocks 0 to 2."""
    options: dict[str, Any] = {
        "images": 3, "layers": f"0-{LAYERS - 1}", "batch_size": 2, "threads": 1, "pictures": "png", "trace": True,
        "trace_images": "0-1", "trace_steps": "1,3", "store_dtype": "float32", **changes,
    }  # fmt: skip
    harvest(HarvestSettings(out=path, **options))
    return path


def transcoder(site: str, d_model: int = 128, n_features: int = FEATURES, **options: Any) -> Any:
    """A transcoder of random directions with about a third of its features active at each token."""
    dictionary = build(
        DictionaryConfig(
            **{"kind": "transcoder", "site": Site.parse(site), "d_model": d_model, "n_features": n_features, **options}
        )
    )
    seed = sum(map(ord, site))
    dictionary.initialise(seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        dictionary.encoder.bias.copy_(-0.4 * torch.rand(n_features, generator=generator))
        dictionary.output_bias.copy_(0.1 * torch.randn(d_model, generator=generator))
    return dictionary


def transcoders(folder: Path, layers: int = LAYERS, **options: Any) -> Path:
    """A folder with one for each site."""
    for layer in range(layers):
        for stream in ("img", "txt"):
            made = transcoder(f"{stream}_{layer}", **options)
            save_dictionary(folder / made.name, made, None, [])
    return folder


def traced_folder(folder: Path) -> Path:
    """A folder with both, as `store` and `dictionaries`."""
    traced_store(folder / "store")
    transcoders(folder / "dictionaries")
    return folder
