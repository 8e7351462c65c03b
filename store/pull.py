"""`python -m store pull URL FOLDER`: brings a store, a part of it, a pack, dictionaries or results to this machine."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from store.places import Folder, place_of
from store.push import Sharing, send
from store.transfer import Tally


@dataclass(frozen=True)
class PullSettings(Sharing):
    """Copy a store or a part of it, or anything else that was pushed, from a server into a folder."""

    url: tyro.conf.Positional[str]
    """where it lies: s3://BUCKET/NAME, hf://datasets/OWNER/NAME, https://HOST/NAME, or a folder"""
    folder: tyro.conf.Positional[Path]
    """the new folder, or that of an interrupted pull of the same"""


def run(settings: PullSettings) -> Tally:
    """Pull; returns what was copied, kept and verified.  Errors and resuming as for `push`."""
    return send("pull", place_of(settings.url), Folder(settings.folder), settings, with_list=False)
