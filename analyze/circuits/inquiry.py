"""What is explained from what: the store with its traces, the transcoders below the targets, the graphs that are wanted.

Everything that cannot be is refused here, before a trace is read: an image or step without a trace, a block above those traced,
a token or feature that does not exist, a site without a transcoder, an SAE, a dictionary of another model, or another one than the
scan that found the targets looked at.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analyze.circuits.settings import GraphSettings
from analyze.circuits.targets import Experiment, experiments
from analyze.inputs import Subject, check_fits, dictionary_identity, loaded
from store import Store, open_store
from store.errors import DamagedError, MismatchError, UsageError
from store.files import read_json
from store.sites import Site, spans
from store.sizes import many
from store.traces import Traced
from train import Dictionary
from train.dictionaries.collection import outline_dictionaries
from train.dictionaries.hub import on_hub
from train.dictionaries.provenance import check_same_model

LISTED = 20
"""images or steps that one message names"""


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
    untraced: tuple[Experiment, ...] = ()
    """Graphs of images or steps without a trace, which --skip-untraced lets pass."""
    scanned: bool = True
    """Whether the dictionaries that a CSV names are known to be these; true where it names none."""
    single: tuple[Site, ...] = ()
    """Sites of single-stream blocks that the store or the dictionaries have: graphs stop before them."""

    @property
    def alone(self) -> bool:
        """Whether one graph is wanted, which lies in OUT itself."""
        return self.settings.targets is None and len(self.experiments) + len(self.untraced) == 1

    @property
    def traces(self) -> dict[tuple[int, int], list[Experiment]]:
        """(image, step) -> the graphs that its trace explains: each trace is read once."""
        found: dict[tuple[int, int], list[Experiment]] = {}
        for experiment in self.experiments:
            found.setdefault((experiment.image, experiment.step), []).append(experiment)
        return found

    def identities(self, *wanted: Experiment) -> dict[str, str]:
        """Site -> SHA-256 of each transcoder that these graphs depend on."""
        there = self.needed(wanted)
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
    if traced is None and store.meta.model.get("architecture") is not None:
        raise UsageError(
            f"{store.path} is of {store.meta.model.get('id')}, which is no FLUX.1 model: graphs are made of the double blocks of "
            "FLUX.1 alone. Its dictionaries can be trained, scored and looked at all the same"
        )
    if traced is None:
        raise UsageError(
            f"{store.path} holds no traces, from which graphs are made: harvest with --trace --trace-images "
            "0-9 --trace-steps 1,3 (and the same prompts, seed and model as before)"
        )
    asked = experiments(settings, traced.images, traced.steps, store.n_images, store.meta.num_inference_steps)
    images, steps = set(traced.images), set(traced.steps)
    untraced: list[Experiment] = []
    wanted: list[Experiment] = []
    for each in asked:
        (wanted if each.image in images and each.step in steps else untraced).append(each)
    if untraced and not (wanted and settings.skip_untraced):
        raise UsageError(_untraced(store, traced, untraced, len(asked)))
    for experiment in wanted:
        _check_there(store, traced, experiment)
    found = outline_dictionaries(settings.dictionaries, sites_below(wanted) if on_hub(settings.dictionaries) else None)
    _refuse_inside(settings)
    subjects, unchecked = _transcoders(settings, store, found, wanted)
    for experiment in wanted:
        _check_features(experiment, subjects)
    scanned = settings.targets is None or _check_scanned(settings.targets, store, found, wanted, subjects)
    there = {*store.sites, *(dictionary.site for dictionary in found)}
    single = tuple(sorted(site for site in there if site.kind == "single"))
    return Inquiry(settings, store, traced, tuple(wanted), subjects, unchecked, tuple(untraced), scanned, single)


def _refuse_inside(settings: GraphSettings) -> None:
    """`UsageError` for an OUT among the dictionaries, which are shared and published as a folder."""
    place, out = settings.dictionaries, settings.out.resolve()
    if not on_hub(place) and Path(place).resolve() in (out, *out.parents):
        raise UsageError(f"--out {settings.out} lies in the folder of dictionaries {place}: choose a folder beside it")


def sites_below(wanted: Iterable[Experiment]) -> list[Site]:
    """Both streams of every block below the highest target, and the targets' own sites: what explaining them depends on."""
    asked: set[Site] = set()
    for experiment in wanted:
        asked |= {ask.site for ask in experiment.asks}
        asked |= {Site("double", layer, stream) for layer in range(experiment.top) for stream in ("img", "txt")}  # type: ignore[arg-type]
    return sorted(asked)


def _untraced(store: Store, traced: Traced, untraced: Sequence[Experiment], of: int) -> str:
    """All images and steps that are not traced, each with how many targets want it, in one message."""
    said, flags, none = [], [], []
    for what, there, count, wanted in (
        ("image", traced.images, store.n_images, Counter(each.image for each in untraced)),
        ("step", traced.steps, store.meta.num_inference_steps, Counter(each.step for each in untraced)),
    ):
        missing = sorted(set(wanted) - set(there))
        if missing:
            counts = [f"{what} {each}" + (f" ({wanted[each]} targets)" if wanted[each] > 1 else "") for each in missing]
            more = f" and {len(counts) - LISTED:,} more" if len(counts) > LISTED else ""
            said.append(f"no trace of {', '.join(counts[:LISTED])}{more}; traced {what}s are {spans(there)}")
        if any(each >= count for each in missing):
            none.append(f"there are {many(count, what)}")
        flags.append(f"--trace-{what}s {spans(sorted({*there, *(each for each in missing if each < count)}))}")
    skip = (
        "" if len(untraced) == of else f", or leave {many(len(untraced), 'target')} of {of:,} out with --skip-untraced"
    )
    beyond = f" ({', '.join(none)})" if none else ""
    return (
        f"{untraced[0].where}: {store.path} has {', and '.join(said)}{beyond}: choose of them, harvest a new store with "
        f"{' '.join(flags)}{skip}"
    )


def _check_there(store: Store, traced: Traced, experiment: Experiment) -> None:
    """`UsageError` for a block or a token of which there is no trace."""
    where = experiment.where
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


def _check_scanned(
    path: Path,
    store: Store,
    found: Iterable[Dictionary],
    wanted: Iterable[Experiment],
    subjects: Mapping[Site, Subject],
) -> bool:
    """Whether the dictionaries that a CSV names are known to be these, by the record that `analyze scan` writes beside it.

    `MismatchError` for a scan of another store or of another dictionary, `UsageError` for one of an SAE.
    """
    record = _scan_record(path)
    if record is None:
        return not any(experiment.dictionaries for experiment in wanted)
    if record.get("store") != store.id:
        raise MismatchError(
            f"{path} is a scan of store {str(record.get('store'))[:23]}…, and {store.path} is {store.id[:23]}…: give the store that "
            "was scanned, or scan this one"
        )
    known = True
    for experiment in wanted:
        for site, name in experiment.dictionaries:
            scanned, subject = record["dictionaries"].get(name), subjects[site]
            if scanned is None:
                known = False
            elif scanned != subject.identity:
                _refuse_scanned(experiment.where, name, scanned, found, subject)
    return known


def _refuse_scanned(where: str, name: str, scanned: str, found: Iterable[Dictionary], subject: Subject) -> None:
    """Say of a scanned dictionary that is not the one here what it is."""
    for dictionary in found:
        if dictionary.site == subject.site and dictionary.config.kind == "sae" and _identity(dictionary) == scanned:
            raise UsageError(
                f"{where}: {name} was scanned as {dictionary.name}, an SAE: only transcoders make graphs; scan {subject.outline.name}"
            )
    raise MismatchError(
        f"{where}: the scan looked at {name} {scanned[:16]}…, and {subject.place} is {subject.identity[:16]}…, another dictionary "
        "in which that feature is not the same: give --dictionaries that were scanned (transcoders), or scan these"
    )


def _scan_record(path: Path) -> dict[str, Any] | None:
    """What `analyze scan` wrote beside a CSV of its; None where there is nothing of that kind."""
    beside = path.with_suffix(".json")
    try:
        record = read_json(beside) if beside.is_file() else None
    except DamagedError:
        return None
    if not isinstance(record, dict) or record.get("format") != "granary scan":
        return None
    return record if isinstance(record.get("dictionaries"), dict) else None


def _transcoders(
    settings: GraphSettings, store: Store, found: Sequence[Dictionary], wanted: Sequence[Experiment]
) -> tuple[dict[Site, Subject], tuple[str, ...]]:
    """The transcoder of each site, and the names of those that do not say which model they are of.

    `UsageError` for SAEs and for sites without a transcoder (targets always, others without --allow-missing); `MismatchError` for a
    transcoder of another model.
    """
    needed, targets = sites_below(wanted), {ask.site for experiment in wanted for ask in experiment.asks}
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


def further_subjects(settings: GraphSettings, identities: Mapping[Site, str]) -> dict[Site, Subject]:
    """The transcoders of these sites among --dictionaries, of those that are the ones meant: site -> identity.

    Graphs that an earlier run left in OUT may reach sites that this one does not need.
    """
    wanted = sorted(identities)
    found = outline_dictionaries(settings.dictionaries, wanted if on_hub(settings.dictionaries) else None)
    at = {outline.site: outline for outline in found if outline.config.kind == "transcoder" and outline.site in wanted}
    subjects = {site: Subject(str(site), outline, _identity(outline)) for site, outline in at.items()}
    return {site: subject for site, subject in subjects.items() if subject.identity == identities[site]}


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
