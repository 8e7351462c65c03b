"""`python -m store pull URL FOLDER`: brings a store, a part of it, a pack, dictionaries or results to this machine."""

import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from store.errors import UsageError
from store.places import Folder, place_of
from store.sharing.push import Sharing, send
from store.sharing.transfer import Tally


@dataclass(frozen=True)
class PullSettings(Sharing):
    """Copy a store or a part of it, or anything else that was pushed, from a server into a folder."""

    url: tyro.conf.Positional[str]
    """where it lies: s3://BUCKET/NAME, hf://datasets/OWNER/NAME, https://HOST/NAME, or a folder"""
    folder: tyro.conf.Positional[Path]
    """the new folder, or that of an interrupted pull of the same"""


def run(settings: PullSettings) -> Tally:
    """Pull; returns what was copied, kept and verified.  Errors and resuming as for `push`."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(settings.folder)):
        raise UsageError(f"{settings.folder} is no folder: pull copies to this machine; to copy to a URL, push")
    return send("pull", place_of(settings.url), Folder(settings.folder), settings, with_list=False)
