"""All dictionaries of a folder, whoever trained them: our folders, and the `.pt` files of the published systems.

The folder may lie on the Hugging Face hub: `hf://OWNER/NAME/folder`.
"""

from collections.abc import Callable, Collection
from pathlib import Path

from store import labels
from store.errors import UnfinishedError, UsageError
from store.sites import Site
from train.dictionaries.checkpoint import CONFIG, COVERED, RESUME, load_dictionary, outline
from train.dictionaries.dictionary import Dictionary
from train.dictionaries.hub import fetch, on_hub
from train.dictionaries.published import import_file, is_published_name, outline_file

KINDS = ("transcoder", "sae")


def load_dictionaries(folder: str | Path, sites: Collection[Site] | None = None) -> list[Dictionary]:
    """Every dictionary in `folder`, by name: our folders, and published files such as `transcoder_img_6.pt`.

    `sites`: only those of these sites, told by their names, and no other is read.  A folder that is itself a dictionary
    gives that one.  `hf://OWNER/NAME[@REVISION]/folder` is fetched into the hub's cache: whole, or what is of `sites`.
    `UsageError` when there is none.
    """
    return _found(folder, sites, load_dictionary, import_file)


def outline_dictionaries(folder: str | Path, sites: Collection[Site] | None = None) -> list[Dictionary]:
    """The same dictionaries without their weights, on the meta device: what each says of itself, and where it lies."""
    return _found(folder, sites, outline, outline_file)


def _found(
    folder: str | Path,
    sites: Collection[Site] | None,
    ours: Callable[[Path], Dictionary],
    published: Callable[[Path], Dictionary],
) -> list[Dictionary]:
    place, stems = folder, None if sites is None else {f"{kind}_{site}" for kind in KINDS for site in sites}
    folder = fetch(place, _patterns(stems)) if on_hub(place) else Path(place)
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder {folder}: --dictionaries names a folder of dictionaries, as train --out made it"
        )
    if (folder / CONFIG).exists():
        return [ours(folder)]
    inside = [path for path in sorted(folder.iterdir()) if stems is None or path.name.removesuffix(".pt") in stems]
    unfinished = [path.name for path in inside if (path / RESUME).exists() and not (path / CONFIG).exists()]
    if unfinished:
        raise UnfinishedError(
            f"{folder}: {', '.join(unfinished)} did not finish training: run the same train command again"
        )
    found = [ours(path) for path in inside if (path / CONFIG).exists()]
    found += [published(path) for path in inside if path.is_file() and is_published_name(path.name)]
    if not found:
        models = sorted({str(path.parent.parent) for path in folder.glob(f"*/*/{CONFIG}")})
        if models:
            raise UsageError(
                f"{place} is a sweep of {len(models)} models: choose one of its folders, such as {models[0]}"
            )
        of = "" if sites is None else f" of {', '.join(map(str, sites))}"
        raise UsageError(
            f"{place} holds no dictionary{of}: neither folders such as transcoder_img_6/ "
            "nor files such as transcoder_img_6.pt"
        )
    names = [dictionary.name for dictionary in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"{folder} holds {', '.join(twice)} twice, as a folder and as a .pt file: remove one of them")
    return sorted(found, key=lambda dictionary: (dictionary.config.kind, dictionary.site))


def _patterns(stems: Collection[str] | None) -> list[str]:
    """What is fetched of a folder: all, or the files and folders of these names, and what makes the folder one itself."""
    if stems is None:
        return ["*"]
    inside = [f"{stem}{end}" for stem in sorted(stems) for end in (".pt", labels.BESIDE, "/*")]
    return [*inside, *COVERED, CONFIG, labels.FILE]
