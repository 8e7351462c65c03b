"""The dictionaries that interventions name: what they say of themselves at once, their weights when they are first needed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from analyze.inputs import dictionary_identity, loaded
from analyze.steering.canvas import Canvas
from store import Site
from store.errors import MismatchError
from train import Dictionary
from train.dictionaries.collection import outline_dictionaries
from train.dictionaries.provenance import check_same_model

Key = tuple[Site, str]
"""(site, kind), kind `transcoder` or `sae`"""


@dataclass
class Shelf(Mapping[Key, Dictionary]):
    """(site, kind) -> dictionary, float32, on `device`; weights are read, and kept, when a dictionary is first asked for."""

    outlines: dict[Key, Dictionary]
    """the same without weights: sites, widths, kinds, activations, places"""
    unchecked: tuple[str, ...] = ()
    """dictionaries of which it is not known whether they belong to the model, because they or the store do not say"""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _held: dict[Key, Dictionary] = field(default_factory=dict, repr=False)
    _identities: dict[Key, str] = field(default_factory=dict, repr=False)

    def __getitem__(self, key: Key) -> Dictionary:
        if key not in self._held:
            self._held[key] = self._read(key).to(self.device)
        return self._held[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)

    def on(self, device: torch.device) -> "Shelf":
        """The same, its weights on `device`."""
        return replace(self, device=device, _held={}, _identities=dict(self._identities))

    def identity(self, key: Key) -> str:
        """SHA-256 of a dictionary's weights and of what makes it compute what it computes; reads the weights, if need be."""
        if key not in self._identities:
            self._identities[key] = dictionary_identity(self[key])
        return self._identities[key]

    def _read(self, key: Key) -> Dictionary:
        """The dictionary with its weights; `MismatchError` where another lies at its place than when it was first read."""
        outline = self.outlines[key]
        if outline.place is None:
            return outline
        found = loaded(outline.place)
        if key in self._identities and (identity := dictionary_identity(found)) != self._identities[key]:
            raise MismatchError(
                f"{outline.place} holds another dictionary than when this command began: {identity[:16]}…, expected "
                f"{self._identities[key][:16]}…: run it again"
            )
        return found


def shelf_of(folder: str | Path | None, canvas: Canvas) -> Shelf:
    """The dictionaries of a folder, checked against the model that is drawn with; empty for None.

    Errors: `UsageError` for a folder without dictionaries, `MismatchError` for a dictionary of another model or width, or of a
    block that the model has not.
    """
    if folder is None:
        return Shelf({})
    outlines = outline_dictionaries(folder)
    unchecked = [outline.name for outline in outlines if not _fits(outline, canvas)]
    return Shelf({(outline.site, outline.config.kind): outline for outline in outlines}, tuple(unchecked))


def _fits(outline: Dictionary, canvas: Canvas) -> bool:
    """Whether a dictionary is known to be of the model; `MismatchError` when it cannot be.  It need not be of a site in the store."""
    if outline.config.d_model != canvas.d_model:
        raise MismatchError(
            f"{outline.name} has d_model {outline.config.d_model}, {canvas.model} has {canvas.d_model}: it was trained on another model"
        )
    if outline.site.kind == "double" and outline.site.layer >= canvas.n_blocks:
        raise MismatchError(
            f"{outline.name} is of block {outline.site.layer}, {canvas.model} has double blocks 0 to {canvas.n_blocks - 1}: "
            "it was trained on another model"
        )
    if outline.config.parent is None or not canvas.known_as:
        return False
    remedy = "choose dictionaries of the model that draws"
    return check_same_model(outline.name, outline.config.parent.model, "the store", dict(canvas.known_as), remedy)
