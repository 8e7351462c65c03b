"""What `label` can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from store.errors import UsageError


@dataclass(frozen=True)
class LabelSettings:
    """Say what features are called: label one, list the labels, take one away, merge or export them."""

    feature: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[img_3/12]")] = None
    """The feature, or a site alone to list its labels; without it all labels are listed."""
    text: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar='["red circles"]')] = None
    """What to call it; without it everything that was ever said about the feature is listed."""
    dictionaries: Annotated[Path, tyro.conf.arg(metavar="DIR")] = field(kw_only=True)
    """Folder of dictionaries, ours or published `.pt` files: each keeps its own labels beside it."""
    author: str | None = None
    """Who says so; default: git's user.name, or the name of the account."""
    remove: bool = False
    """Take the feature's label away; what was said before is still in the file."""
    merge: Annotated[Path | None, tyro.conf.arg(metavar="FILE|-")] = None
    """Add the labels in a file that the report's page or --export wrote (`-`: standard input)."""
    export: Annotated[Path | None, tyro.conf.arg(metavar="FILE|-")] = None
    """Write the labels of all dictionaries into one file (`-`: standard output)."""

    def __post_init__(self) -> None:
        if self.merge is not None and self.export is not None:
            raise UsageError("--merge and --export contradict each other: run one after the other")
        for name, value in (("--merge", self.merge), ("--export", self.export)):
            if value is not None and (self.feature is not None or self.remove):
                raise UsageError(
                    f"{name} is about all labels, and {self.feature or '--remove'} about one: leave one out"
                )
        if self.remove and self.feature is None:
            raise UsageError("--remove needs the feature whose label goes, such as img_3/12")
        if self.remove and self.text is not None:
            raise UsageError(f"--remove takes the label away, and {self.text!r} would be a new one: leave one out")
        if self.text is not None and not self.text.strip():
            raise UsageError("the label is empty: to take a label away, say --remove")
        if self.author is not None and not self.author.strip():
            raise UsageError("--author is empty: give a name, or leave it out")
