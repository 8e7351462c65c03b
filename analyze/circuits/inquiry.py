"""What is explained from what: the store with its traces, the transcoders below the targets, the graphs that are wanted.

Everything that cannot be is refused here, before a trace is read: an image or step without a trace, a block above those traced,
a token or feature that does not exist, a site without a transcoder, an SAE, a dictionary of another model.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from analyze.circuits.settings import GraphSettings
from analyze.circuits.targets import Experiment, experiments
from analyze.inputs import Subject, check_fits, dictionary_identity, loaded
from store import Store, open_store
from store.errors import MismatchError, UsageError
from store.sites import Site, spans
from store.traces import Traced
from train import Dictionary
from train.dictionaries.collection import outline_dictionaries
from train.dictionaries.hub import on_hub
from train.dictionaries.provenance import check_same_model


@dataclass(frozen=True)
class Inquiry:
    """A store with traces, transcoders that belong to it, and the graphs that are wanted."""

    settings: GraphSettings
    store: Store
    traced: Traced
    experiments: tuple[Experiment, ...]
    subjects: dict[Site, Subject]
    """The transcoders of the sites below the targets and of the targets themselves."""
    unchecked: tuple[str, ...]
    """Transcoders of which it is not known whether they belong to the store's model."""

    @property
    def alone(self) -> bool:
        """Whether one graph is wanted, which lies in OUT itself."""
        return self.settings.targets is None and len(self.experiments) == 1

    @property
    def traces(self) -> dict[tuple[int, int], list[Experiment]]:
        """(image, step) -> the graphs that its trace explains: each trace is read once."""
        found: dict[tuple[int, int], list[Experiment]] = {}
        for experiment in self.experiments:
            found.setdefault((experiment.image, experiment.step), []).append(experiment)
        return found

    def identities(self, experiment: Experiment) -> dict[str, str]:
        """Site -> SHA-256 of each transcoder that a graph depends on."""
        there = self.needed([experiment])
        return {str(site): self.subjects[site].identity for site in there}

    def needed(self, wanted: Iterable[Experiment]) -> list[Site]:
        """The sites whose transcoders these graphs depend on, of those that have one."""
        return [site for site in sites_below(wanted) if site in self.subjects]


def open_inquiry(settings: GraphSettings) -> Inquiry:
    """What `settings` ask for, checked against the store and its dictionaries; every refusal is a `GranaryError`."""
    if settings.out.exists() and not settings.out.is_dir():
        raise UsageError(f"--out {settings.out} is a file: name a folder, which may be new")
    store = open_store(settings.store)
    traced = store.traced
    if traced is None:
        raise UsageError(
            f"{store.path} holds no traces, from which graphs are made: harvest with --trace --trace-images "
            "0-9 --trace-steps 1,3 (and the same prompts, seed and model as before)"
        )
    wanted = experiments(settings, traced.images, traced.steps)
    for experiment in wanted:
        _check_traced(store, traced, experiment)
    subjects, unchecked = _transcoders(settings, store, sites_below(wanted), {a.site for e in wanted for a in e.asks})
    for experiment in wanted:
        _check_features(experiment, subjects)
    return Inquiry(settings, store, traced, tuple(wanted), subjects, unchecked)


def sites_below(wanted: Iterable[Experiment]) -> list[Site]:
    """Both streams of every block below the highest target, and the targets' own sites: what explaining them depends on."""
    asked: set[Site] = set()
    for experiment in wanted:
        asked |= {ask.site for ask in experiment.asks}
        asked |= {Site("double", layer, stream) for layer in range(experiment.top) for stream in ("img", "txt")}  # type: ignore[arg-type]
    return sorted(asked)


def _check_traced(store: Store, traced: Traced, experiment: Experiment) -> None:
    """`UsageError` for an image, a step, a block or a token of which there is no trace."""
    where = experiment.where
    for what, number, there in (("image", experiment.image, traced.images), ("step", experiment.step, traced.steps)):
        if number not in there:
            raise UsageError(
                f"{where}: {store.path} has no trace of {what} {number}; traced {what}s are {spans(there)}: choose one of "
                f"them, or harvest with --trace-{what}s {number}"
            )
    for ask in experiment.asks:
        if ask.site.layer not in traced.blocks:
            raise UsageError(
                f"{where}: block {ask.site.layer} is not traced; {store.path} traces blocks {spans(traced.blocks)}: choose "
                f"a target there, or harvest with --trace-blocks 0-{ask.site.layer}"
            )
        count = tokens_of(store)[ask.site.stream]
        if ask.token is not None and ask.token >= count:
            raise UsageError(f"{where}: {ask.site} has no token {ask.token}; it has {count}, 0 to {count - 1}")


def tokens_of(store: Store) -> dict[str, int]:
    """How many tokens each stream has, whether or not activations of it are kept: {"txt": 512, "img": 1024}."""
    meta = store.meta
    return {"txt": meta.max_sequence_length, "img": meta.grid[0] * meta.grid[1]}


def _check_features(experiment: Experiment, subjects: dict[Site, Subject]) -> None:
    for ask in experiment.asks:
        subject = subjects[ask.site]
        if ask.feature >= subject.n_features:
            raise UsageError(
                f"{experiment.where}: {subject.outline.name} has no feature {ask.feature}; it has {subject.n_features:,}, 0 to "
                f"{subject.n_features - 1}"
            )


def _transcoders(
    settings: GraphSettings, store: Store, needed: Sequence[Site], targets: Collection[Site]
) -> tuple[dict[Site, Subject], tuple[str, ...]]:
    """The transcoder of each site, and the names of those that do not say which model they are of.

    `UsageError` for SAEs and for sites without a transcoder (targets always, others without --allow-missing); `MismatchError` for a
    transcoder of another model.
    """
    found = outline_dictionaries(settings.dictionaries, needed if on_hub(settings.dictionaries) else None)
    at = {dictionary.site: dictionary for dictionary in found if dictionary.config.kind == "transcoder"}
    saes = sorted({d.site for d in found if d.config.kind == "sae" and d.site in needed and d.site not in at})
    missing = [site for site in needed if site not in at]
    if settings.allow_missing:
        missing = [site for site in missing if site in targets]
        saes = [site for site in saes if site in targets]
    if saes:
        raise UsageError(
            f"{settings.dictionaries} has SAEs of {_listed(saes)}: graphs need transcoders, which say how an MLP turns its input "
            "into its output; train with --kind transcoder"
        )
    if missing:
        more = "" if set(missing) <= set(targets) else ", or take their MLPs for unexplained with --allow-missing"
        raise UsageError(
            f"{settings.dictionaries} has no transcoder of {_listed(missing)}; these targets need {_listed(needed)}: train them{more}"
        )
    chosen = {site: at[site] for site in needed if site in at}
    unchecked = tuple(dictionary.name for dictionary in chosen.values() if not _fits(dictionary, store))
    subjects = {site: Subject(str(site), outline, _identity(outline)) for site, outline in chosen.items()}
    return subjects, unchecked


def _fits(dictionary: Dictionary, store: Store) -> bool:
    """As `check_fits`, also for a site of which the store keeps traces and no activations."""
    if dictionary.site in store.sites:
        return check_fits(dictionary, store)
    if dictionary.config.d_model != store.meta.d_model:
        raise MismatchError(
            f"{dictionary.name} has d_model {dictionary.config.d_model}, the traces of {store.path} have {store.meta.d_model}: it was "
            "trained on another model; use it with a store of its own"
        )
    if dictionary.config.parent is None:
        return False
    remedy = "use it with a store of its own model"
    return check_same_model(dictionary.name, dictionary.config.parent.model, store.path, store.meta.model, remedy)


def _identity(outline: Dictionary) -> str:
    """The identity of a dictionary whose weights are read, checked, and let go again."""
    place: Path | None = outline.place
    if place is None:
        raise MismatchError(f"{outline.name} was never saved: save it to a folder first")
    return dictionary_identity(loaded(place))


def _listed(sites: Iterable[Site]) -> str:
    return ", ".join(map(str, sites))
