"""Dictionaries of FLUX activations, trained from a pack: no FLUX weights, no diffusers, mostly no GPU.

What stands here is imported when it is first asked for: `import train` alone loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.dictionaries.checkpoint import load_dictionary
    from train.dictionaries.collection import load_dictionaries
    from train.dictionaries.config import DictionaryConfig
    from train.dictionaries.dictionary import SAE, Dictionary, Transcoder
    from train.dictionaries.temporal_aware import TemporalAwareSAE, TemporalAwareTranscoder, load_transcoders
    from train.settings import TrainSettings
    from train.trainer import run

__all__ = [
    "SAE",
    "Dictionary",
    "DictionaryConfig",
    "TemporalAwareSAE",
    "TemporalAwareTranscoder",
    "TrainSettings",
    "Transcoder",
    "load_dictionaries",
    "load_dictionary",
    "load_transcoders",
    "run",
]
PLACES = {
    "train.dictionaries.checkpoint": ("load_dictionary",),
    "train.dictionaries.collection": ("load_dictionaries",),
    "train.dictionaries.config": ("DictionaryConfig",),
    "train.dictionaries.dictionary": ("SAE", "Dictionary", "Transcoder"),
    "train.dictionaries.temporal_aware": ("TemporalAwareSAE", "TemporalAwareTranscoder", "load_transcoders"),
    "train.settings": ("TrainSettings",),
    "train.trainer": ("run",),
}
"""where each of them lives"""


def __getattr__(name: str) -> Any:
    for module, names in PLACES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'train' has no attribute {name!r}")
