"""Dictionaries of FLUX activations, trained from a pack: no FLUX weights, no diffusers, mostly no GPU."""

from train.checkpoint import load_dictionary
from train.collection import load_dictionaries
from train.config import DictionaryConfig
from train.dictionary import SAE, Dictionary, Transcoder
from train.settings import TrainSettings
from train.temporal_aware import TemporalAwareSAE, TemporalAwareTranscoder, load_transcoders
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
