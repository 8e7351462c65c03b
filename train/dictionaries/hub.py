"""Dictionaries on the Hugging Face hub: a folder of a model repository, fetched into the hub's own cache.

`hf://OWNER/NAME[@REVISION][/FOLDER]`, the address that the hub's own tools use; a revision is a branch, a tag, a commit, or
`refs/pr/1` and `refs/convert/…`, the only ones with slashes.  Only what is asked for is fetched: a
published transcoder of FLUX is a file of 1.2 GB.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from store.errors import UnreachableError, UsageError

_ADDRESS = re.compile(  # a Path has lost one of the slashes
    r"hf:/{1,2}([\w.-]+/[\w.-]+?)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(.*?))?/?"
)
_OTHER_KINDS = ("datasets", "spaces")
_BARE = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def on_hub(place: str | Path) -> bool:
    """Whether a place is an address on the hub: `hf://OWNER/NAME/…`."""
    return str(place).startswith("hf:/")


def may_be_on_hub(place: str | Path) -> bool:
    """Whether a place could be meant as `OWNER/NAME` on the hub: it looks like one, and nothing lies there."""
    return _BARE.fullmatch(str(place)) is not None and not Path(place).exists()


def fetch(place: str | Path, names: Sequence[str] = ("*",), revision: str | None = None) -> Path:
    """The local folder of a folder on the hub, after fetching those of its files that match `names`.

    What the cache holds already is not fetched again; offline it is all there is.  `UsageError` where there is no such
    repository or revision, `UnreachableError` where the hub does not answer or does not let us in.  What the disk refuses is
    an `OSError` as it is.
    """
    from huggingface_hub import errors, snapshot_download

    found = _ADDRESS.fullmatch(str(place))
    if found is None:
        raise UsageError(f"{place} is no address on the hub: it should look like hf://OWNER/NAME/folder")
    repository, said, folder = found[1], found[2], found[3] or ""
    if repository.split("/")[0] in _OTHER_KINDS:
        raise UsageError(
            f"{place} is in one of the hub's {repository.split('/')[0]}: dictionaries are fetched from model repositories, "
            "hf://OWNER/NAME/folder; download it with `hf download` and name the local folder"
        )
    if said and revision and said != revision:
        raise UsageError(f"{place} names the revision {said}, and revision={revision} is asked for: name one")
    prefix = f"{folder}/" if folder else ""
    page = f"https://huggingface.co/{repository}"
    try:
        root = snapshot_download(
            repository, revision=revision or said, allow_patterns=[prefix + name for name in names]
        )  # it has no folder for what is not there
    except errors.GatedRepoError:
        raise UnreachableError(
            f"{place} is gated: accept its terms at {page}, log in with `hf auth login`, and try again"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UsageError(
            f"the hub has no model repository {repository}, or not for you: check {page}, or log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UsageError(f"{repository} has no revision {revision or said}: see {page}/commits") from None
    except errors.HFValidationError as error:
        raise UsageError(f"{place} is no address on the hub: {error}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UnreachableError(
            f"{place} is not in the cache of the hub, and the hub cannot be reached: go online (HF_HUB_OFFLINE unset), or "
            f"fetch {page} elsewhere and name the local folder"
        ) from None
    except (
        errors.HTTPError,  # of the HTTP client, whichever this release of the hub's library uses
        errors.HfHubHTTPError, errors.FileMetadataError, errors.XetDownloadError, ConnectionError, TimeoutError,
    ) as error:  # fmt: skip
        raise UnreachableError(f"{place} could not be fetched ({error}): try again") from None
    return Path(root) / folder
