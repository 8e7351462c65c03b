"""All dictionaries of a folder, whoever trained them: our folders, and the `.pt` files of the published systems.

The folder may lie on the Hugging Face hub: `hf://OWNER/NAME/folder`.
"""

from pathlib import Path

from store.errors import UnfinishedError, UsageError
from train.dictionaries.checkpoint import CONFIG, RESUME, load_dictionary
from train.dictionaries.dictionary import Dictionary
from train.dictionaries.hub import fetch, on_hub
from train.dictionaries.published import import_file, is_published_name


def load_dictionaries(folder: str | Path) -> list[Dictionary]:
    """Every dictionary in `folder`, by name: our folders, and published files such as `transcoder_img_6.pt`.

    A folder that is itself a dictionary gives that one.  `hf://OWNER/NAME[@REVISION]/folder` is fetched whole, into the
    hub's cache.  `UsageError` when there is none.
    """
    folder = fetch(folder) if on_hub(folder) else Path(folder)
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder {folder}: --dictionaries names a folder of dictionaries, as train --out made it"
        )
    if (folder / CONFIG).exists():
        return [load_dictionary(folder)]
    inside = sorted(folder.iterdir())
    unfinished = [path.name for path in inside if (path / RESUME).exists() and not (path / CONFIG).exists()]
    if unfinished:
        raise UnfinishedError(
            f"{folder}: {', '.join(unfinished)} did not finish training: run the same train command again"
        )
    found = [load_dictionary(path) for path in inside if (path / CONFIG).exists()]
    found += [import_file(path) for path in inside if path.is_file() and is_published_name(path.name)]
    if not found:
        raise UsageError(
            f"{folder} holds no dictionary: neither folders such as transcoder_img_6/ "
            "nor files such as transcoder_img_6.pt"
        )
    names = [dictionary.name for dictionary in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"{folder} holds {', '.join(twice)} twice, as a folder and as a .pt file: remove one of them")
    return sorted(found, key=lambda dictionary: (dictionary.config.kind, dictionary.site))
