"""Graphs that `graph` has finished, read again to be looked at together: over tokens and pruned, where names mean the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analyze.circuits.folders import graph_folders
from analyze.circuits.graph import Graph
from analyze.circuits.nodes import Node
from store.errors import MismatchError, UsageError

Members = tuple[tuple[str, int, float, int | None], ...]
"""site, feature, weight and token of each member of a supernode, sorted"""
Features = tuple[tuple[str, int, float], ...]
"""the same without tokens, each once"""


@dataclass(frozen=True)
class Finished:
    """One finished graph, over tokens and pruned."""

    folder: Path
    graph: Graph
    image: int
    step: int
    prompt: str
    targets: tuple[str, ...]
    """the targets' names, with tokens"""
    store: str = ""
    """id of the store whose trace it explains"""
    members: tuple[Members, ...] = ()
    """of each target the features that make it a supernode, with tokens; nothing of one that is a feature"""

    @property
    def explained(self) -> tuple[str, ...]:
        """The targets' names without tokens."""
        return tuple(Node.parse(name).aggregated.name for name in self.targets)


def finished_folders(roots: Sequence[Path]) -> list[Path]:
    """The folders of all graphs below, once each."""
    found: dict[Path, None] = {}
    for root in roots:
        here = graph_folders(root)
        if not here:
            raise UsageError(f"{root} holds no graphs: give --graphs what python -m analyze graph wrote with --out")
        found |= dict.fromkeys(path.resolve() for path in here)
    return list(found)


def read_finished(folder: Path) -> Finished:
    """The aggregated graph of a folder, and what it is of."""
    graph = Graph.read(folder / "aggregated")
    facts: dict[str, Any] = graph.facts
    targets = facts.get("targets") or []
    names = [target.get("name") for target in targets]
    if not names or None in names:
        asked = graph.nodes.filter(graph.nodes["target"])
        names = asked["name"].to_pylist()
    return Finished(
        folder,
        graph,
        facts["image"],
        facts["step"],
        facts.get("prompt") or "",
        tuple(names),
        str(facts.get("store") or ""),
        tuple(_members(target) for target in targets),
    )


def _members(target: Mapping[str, Any]) -> Members:
    found = target.get("members") or []
    return tuple(
        sorted(
            (str(of.get("site")), int(of.get("feature", -1)), float(of.get("weight", 1)), of.get("token"))
            for of in found
        )
    )


def check_alike(members: Sequence[Finished]) -> None:
    """Refuse graphs whose features are not of the same dictionaries, as equal names would mean different things; and one graph twice."""
    known: dict[str, tuple[str | None, Path]] = {}
    for member in members:
        for site, of in (member.graph.facts.get("transcoders") or {}).items():
            identity = of.get("identity") if isinstance(of, dict) else str(of)
            before, folder = known.setdefault(site, (identity, member.folder))
            if before != identity:
                raise MismatchError(
                    f"{member.folder} and {folder} were made with different dictionaries of {site} ({str(identity)[:16]}… and "
                    f"{str(before)[:16]}…): features of one number are not the same there; give graphs of one set of dictionaries"
                )
    _check_supernodes(members)
    seen: dict[tuple[object, ...], Path] = {}
    for member in members:
        key = (member.store, member.image, member.step, member.targets, member.members)
        first = seen.setdefault(key, member.folder)
        if first != member.folder:
            raise UsageError(
                f"{first} and {member.folder} explain the same: {' and '.join(member.targets)} in image {member.image} at step "
                f"{member.step}; it would count twice: give --graphs one of them"
            )


def _check_supernodes(members: Sequence[Finished]) -> None:
    """Refuse supernodes of one name that are made of different features; where their tokens lie may differ."""
    known: dict[str, tuple[Features, Path]] = {}
    for member in members:
        for name, made_of in zip(member.targets, member.members, strict=False):
            features = tuple(sorted({(site, feature, weight) for site, feature, weight, _ in made_of}))
            before, folder = (
                known.setdefault(name, (features, member.folder)) if features else (features, member.folder)
            )
            if before != features:
                raise MismatchError(
                    f"{member.folder} and {folder} call different features {name}: "
                    f"{_features(features)} and {_features(before)}; give graphs whose supernodes of one name are the same"
                )


def _features(features: Features) -> str:
    return "+".join(("" if weight == 1 else f"{weight}*") + f"{site}:{feature}" for site, feature, weight in features)
