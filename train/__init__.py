"""Dictionaries of FLUX activations, trained from a pack: no FLUX weights, no diffusers, mostly no GPU."""

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
