"""The dictionaries that interventions name: what they say of themselves at once, their weights when they are first needed."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from analyze.inputs import dictionary_identity, loaded
from analyze.steering.canvas import Canvas
from analyze.steering.feature_changes import Key
from store.errors import MismatchError
from train import Dictionary
from train.dictionaries.collection import outline_dictionaries
from train.dictionaries.provenance import check_same_model, transformer_hash


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
    _moved: "Shelf | None" = field(default=None, repr=False)
    """the shelf that took the weights over"""

    def __getitem__(self, key: Key) -> Dictionary:
        if key not in self._held:
            self._held[key] = self._read(key).to(self.device)
        return self._held[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)

    def on(self, device: torch.device) -> "Shelf":
        """The same, its weights on `device`: those that are read already move there, and are held once."""
        held = {key: dictionary.to(device) for key, dictionary in self._held.items()}
        self._held = {}
        self._moved = replace(self, device=device, _held=held, _moved=None)
        return self._moved

    def identity(self, key: Key) -> str:
        """SHA-256 of a dictionary's weights and of what makes it compute what it computes; reads the weights, if need be."""
        if self._moved is not None:
            return self._moved.identity(key)
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


def checked_against(shelf: Shelf, keys: Iterable[Key], canvas: Canvas, transformer: str | None) -> Shelf:
    """The same where no store named the model: its dictionaries `keys` compared with the weights that draw, where they are known.

    `transformer`: their SHA-256, None where it is not known yet.  `MismatchError` for a dictionary of another model.
    """
    known = {"id": canvas.model_name, "weights_sha256": {"transformer": transformer}}
    remedy = "choose dictionaries of the model that draws, or draw in the dtype of their store (--dtype, or --store)"
    fitting = set()
    for outline in (shelf.outlines[key] for key in keys):
        parent = outline.config.parent
        if parent is not None and check_same_model(outline.name, parent.model, "the model that draws", known, remedy):
            fitting.add(outline.name)
    return replace(shelf, unchecked=tuple(name for name in shelf.unchecked if name not in fitting))


def nameless(outline: Dictionary) -> bool:
    """Whether a dictionary does not say which weights it was trained on."""
    return outline.config.parent is None or transformer_hash(outline.config.parent.model) is None


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
