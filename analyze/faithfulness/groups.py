"""Which dictionaries stand in together, where and when: the lines of the tables, settled before a model is loaded.

A group is what one folder holds of one kind; `k-8/` with transcoders and SAEs makes two.  The baseline is a group too, without
dictionaries.  A splicing is some sites of a group, at some steps.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from analyze.faithfulness.settings import FaithfulnessSettings, Scope
from analyze.steering.canvas import Canvas
from analyze.steering.shelf import Shelf, shelf_of
from store.errors import UsageError
from store.sites import Site, choose_sites, parse_numbers, spans
from train import Dictionary
from train.results.differences import sparsity_of

MEAN = "mean"
"""kind of the baseline: each MLP's mean output in its place"""
FILE_NAME = re.compile(r"[^A-Za-z0-9.,_-]+")


@dataclass(frozen=True)
class Group:
    """Dictionaries of one kind from one folder, one a site; or the baseline, kind `mean`, which has none."""

    label: str
    """kind and sparsity, `transcoder k 8`; the same for no other group"""
    kind: str
    sparsity: str
    """`k 8`, `l1 3e-4`; empty where the dictionaries do not say"""
    shelf: Shelf
    sites: tuple[Site, ...]
    """those that are spliced: block by block, img first"""

    def dictionary(self, site: Site) -> Dictionary:
        """The dictionary of a site with its weights."""
        return self.shelf[site, self.kind]

    @property
    def outlines(self) -> dict[Site, Dictionary]:
        """Site -> its dictionary without weights; empty for the baseline."""
        return {} if self.kind == MEAN else {site: self.shelf.outlines[site, self.kind] for site in self.sites}


@dataclass(frozen=True)
class Splicing:
    """Dictionaries of a group in the place of MLPs at some sites and steps."""

    group: Group
    sites: tuple[Site, ...]
    steps: tuple[int, ...]
    every_step: bool
    """whether these are all the steps that were asked for, not one of them alone"""
    scopes: tuple[Scope, ...]
    """what it is one of: a splicing of the only site of a group is `site` and `all`"""

    @property
    def name(self) -> str:
        """`transcoder k 8, img_3, steps 0-3`: the same for no other splicing of a run."""
        return f"{self.group.label}, {sites_text(self.sites)}, {steps_text(self.steps)}"

    @property
    def file_name(self) -> str:
        """The name as a folder has it."""
        return FILE_NAME.sub("-", self.name.replace(", ", "_"))


def sites_text(sites: Iterable[Site]) -> str:
    """`img_0-4,txt_3` for sites in any order."""
    layers: dict[str, list[int]] = {}
    for site in sorted(sites, key=lambda site: (site.stream, site.layer)):
        layers.setdefault(site.stream, []).append(site.layer)
    return ",".join(f"{stream}_{word}" for stream, found in layers.items() for word in spans(found).split(","))


def steps_text(steps: Sequence[int]) -> str:
    """`step 2`, `steps 0-3`."""
    return f"step{'s' if len(steps) > 1 else ''} {spans(steps)}"


def groups_of(settings: FaithfulnessSettings, canvas: Canvas) -> list[Group]:
    """The baseline, then the groups in the order of the folders, transcoders first; only outlines are read.

    Errors: `UsageError` for a folder without dictionaries, sites that no folder has, sites that cannot be spliced; `MismatchError` for
    dictionaries of another model.
    """
    shelves = [(folder, shelf_of(folder, canvas)) for folder in settings.dictionaries]
    there = sorted({site for _, shelf in shelves for site, _ in shelf}, key=_in_order)
    where = " and ".join(str(folder) for folder in settings.dictionaries)
    wanted = set(choose_sites(settings.sites, there, where))
    spliced = {site for site in wanted if site.kind == "double"}
    if _takes_every_site(settings) and spliced:
        wanted = spliced  # `left_out` says so
    found: list[Group] = []
    for folder, shelf in shelves:
        for kind in ("transcoder", "sae"):
            sites = tuple(sorted((site for site, k in shelf if k == kind and site in wanted), key=_in_order))
            if sites:
                found.append(_group(folder, shelf, kind, sites, [group.label for group in found]))
    for group in found:
        _refuse_single(group)
    if settings.baseline:
        every = tuple(sorted({site for group in found for site in group.sites}, key=_in_order))
        found.insert(0, Group("mean output", MEAN, "", Shelf({}), every))
    return found


def _group(folder: Path, shelf: Shelf, kind: str, sites: tuple[Site, ...], taken: list[str]) -> Group:
    said = dict.fromkeys(sparsity_of(shelf.outlines[site, kind]) for site in sites)
    sparsity = " / ".join(word for word in said if word)
    label = name = f"{kind} {sparsity}".strip()
    number = 2
    while label in taken:  # the folder's name may change; its place among the folders is part of the command
        label, number = f"{name} ({number})", number + 1
    return Group(label, kind, sparsity, shelf, sites)


def _refuse_single(group: Group) -> None:
    single = [site for site in group.sites if site.kind != "double"]
    if single:
        raise UsageError(
            f"{group.label}: {', '.join(map(str, single))} cannot be spliced: single-stream blocks cannot be changed yet; choose "
            "double blocks with --sites"
        )


def left_out(settings: FaithfulnessSettings, groups: Sequence[Group]) -> tuple[Site, ...]:
    """The sites of single-stream blocks whose dictionaries lie beside the others, where no sites were named."""
    there = {site for group in groups for site, _ in group.shelf.outlines if site.kind != "double"}
    return tuple(sorted(there, key=_in_order)) if _takes_every_site(settings) else ()


def _takes_every_site(settings: FaithfulnessSettings) -> bool:
    return settings.sites.strip() == "all"


def _in_order(site: Site) -> tuple[str, int, str]:
    return site.kind, site.layer, site.stream


def splicings_of(settings: FaithfulnessSettings, groups: Sequence[Group], num_steps: int) -> list[Splicing]:
    """Every splicing that is asked for, each once; `UsageError` for a step that the sampler has not."""
    steps = parse_numbers(settings.steps, num_steps, "step")
    moments = [(steps, True)]
    if settings.each_step and len(steps) > 1:
        moments += [((step,), False) for step in steps]
    found: dict[tuple[str, tuple[Site, ...], tuple[int, ...]], Splicing] = {}
    for group in groups:
        for scope in settings.scopes:
            for sites in _sets_of(scope, group, groups):
                for chosen, every in moments:
                    key = group.label, sites, chosen
                    scopes = (*found[key].scopes, scope) if key in found else (scope,)
                    found[key] = Splicing(group, sites, chosen, every, scopes)
    return list(found.values())


def _sets_of(scope: Scope, group: Group, groups: Sequence[Group]) -> list[tuple[Site, ...]]:
    """The sets of sites of a group; the baseline has those of every other group."""
    if group.kind != MEAN:
        return _sites_of(scope, group.sites)
    return list(
        dict.fromkeys(sites for other in groups if other.kind != MEAN for sites in _sites_of(scope, other.sites))
    )


def _sites_of(scope: Scope, sites: tuple[Site, ...]) -> list[tuple[Site, ...]]:
    match scope:
        case "site":
            return [(site,) for site in sites]
        case "cumulative":
            layers = sorted({site.layer for site in sites})
            return [tuple(site for site in sites if site.layer <= layer) for layer in layers]
        case "all":
            return [sites]
