"""The transcoders that stand in for the MLPs of a frozen model: one a site, of the store's own model."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from analyze.inputs import Analysis, Subject, check_fits
from store import Store
from store.errors import UsageError
from store.sites import Site
from train import Dictionary
from train.dictionaries.collection import load_dictionaries


class Transcoders(Mapping[Site, Dictionary]):
    """Transcoders by site; one of an analysis is read when it is asked for, and few are kept at once."""

    def __init__(self, found: Mapping[Site, Subject | Dictionary]) -> None:
        self._found = dict(sorted(found.items()))

    def __getitem__(self, site: Site) -> Dictionary:
        found = self._found[site]
        return found.dictionary if isinstance(found, Subject) else found

    def __contains__(self, site: object) -> bool:
        return site in self._found  # without reading it

    def __iter__(self) -> Iterator[Site]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def frozen_transcoders(
    given: Analysis | Iterable[Dictionary] | str | Path,
    sites: Iterable[Site],
    allow_missing: bool = False,
    store: Store | None = None,
) -> Transcoders:
    """The transcoder of each of `sites`.

    `given`: a folder of dictionaries, an analysis, whose dictionaries were checked when it was opened, or dictionaries, which are
    checked here when `store` is given.  With `allow_missing` a site may have none: all that its MLP writes is then an error node.
    `UsageError` names SAEs, sites without a transcoder and sites with several; `MismatchError` a dictionary of another model.
    """
    wanted = set(sites)
    if isinstance(given, str | Path):
        given = load_dictionaries(Path(given), wanted)
    everything: list[Subject | Dictionary] = list(given.subjects if isinstance(given, Analysis) else given)
    here = [one for one in everything if one.site in wanted]
    outlines = [one.outline if isinstance(one, Subject) else one for one in here]
    refused = [outline.name for outline in outlines if outline.config.kind != "transcoder"]
    found: dict[Site, Subject | Dictionary] = {}
    for one, outline in zip(here, outlines, strict=True):
        if outline.config.kind != "transcoder":
            continue
        if one.site in found:
            raise UsageError(
                f"there are several transcoders of {one.site}: a graph needs one; choose a folder that has one"
            )
        if store is not None and isinstance(one, Dictionary):
            check_fits(one, store)
        found[one.site] = one
    missing = [str(site) for site in sorted(wanted) if site not in found]
    if missing and not allow_missing:
        saes = (
            f" ({', '.join(refused)}: an SAE does not say what the MLP computes, so it makes no graph)"
            if refused
            else ""
        )
        raise UsageError(
            f"no transcoder for {', '.join(missing)}{saes}: train transcoders of these sites, or allow missing ones, "
            "whose whole mlp_out then counts as error"
        )
    return Transcoders(found)
