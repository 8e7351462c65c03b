"""What can be wrong with a store or a pack: one finding a file, with its sentence and what it costs, and the report of all.

kind         what was found
damaged      a file has another length or content than was committed
missing      a file that was committed is not there; a commit that a finished store lost is one
other-run    a commit, or the metadata, of a run with other settings
unlisted     a file that no commit lists: foreign
leftover     a temporary file of a process that was killed
unfinished   parts, or the creation, are still to be done
unsealed     every part is committed, and the seal is missing
unreadable   the file system or the server refuses: nothing is known of the file
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from store import layout
from store.format import StoreMeta
from store.sites import Site
from store.sizes import human_size
from store.traces import parse_trace_file

Kind = Literal["damaged", "missing", "other-run", "unlisted", "leftover", "unfinished", "unsealed", "unreadable"]
What = Literal[
    "activations", "scales", "tokens", "prompts", "pictures", "statistics", "traces",
    "part", "record", "seal", "root", "metadata", "weights", "matrices", "card", "nothing",
]  # fmt: skip

COUNTED: dict[Kind, tuple[str, str]] = {
    "damaged": ("file damaged", "files damaged"),
    "missing": ("file missing", "files missing"),
    "other-run": ("file of another run", "files of another run"),
    "unreadable": ("file that cannot be read", "files that cannot be read"),
    "unlisted": ("file that no commit lists", "files that no commit lists"),
    "leftover": ("temporary file of a killed process", "temporary files of killed processes"),
    "unfinished": ("store not finished", "stores not finished"),
    "unsealed": ("seal missing", "seals missing"),
}
"""in the order in which summaries name them"""
COSTS_SHOWN = 12

NOUNS: dict[What, str] = {
    "activations": "activations",
    "scales": "the scales of rows",
    "tokens": "kept positions",
    "prompts": "the prompts of a part",
    "pictures": "the pictures of a part",
    "statistics": "the statistics of a part",
    "traces": "a trace",
    "part": "the commit of a part",
    "record": "the record of what creation wrote",
    "seal": "the seal",
    "root": "the store's metadata",
    "metadata": "Zarr's metadata",
    "weights": "MLP matrices",
    "matrices": "attention matrices",
    "card": "the dataset card",
}

_ARRAY = re.compile(r"activations/(double|single)\.(\d+)/(img|txt|joint)/step\.(\d+)/(mlp_in|mlp_out)(_scale)?/")
_TOKENS = re.compile(r"tokens/(img|txt|joint)/step\.(\d+)/")
_TABLES: dict[str, What] = {"prompts": "prompts", "images": "pictures", "statistics": "statistics", "commits": "part"}


@dataclass(frozen=True)
class Costs:
    """What cannot be used while a file is as it is."""

    what: What = "nothing"
    images: tuple[int, int] | None = None
    """first and last; None where no images are concerned, or which cannot be known"""
    sites: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    points: tuple[str, ...] = ()

    def text(self) -> str:
        """`images 8-11 at img_3 step 2 mlp_in`"""
        return self.of(spans([self.images] if self.images else []))

    def of(self, images: str) -> str:
        """The same for the images that `images` names."""
        place = " ".join([*self.sites, *(f"step {step}" for step in self.steps), *self.points])
        match self.what:
            case "activations" | "scales":
                return f"{images} at {place}"
            case "tokens":
                return f"which tokens the rows of {images} are at {place}"
            case "prompts" | "pictures" | "statistics":
                return f"the {self.what} of {images}"
            case "traces":
                return f"the traces of {images} at {place}"
            case "part":
                return f"{images} at every site, step and point"
            case "metadata":
                return f"no value, but plain Zarr readers do not find {place or 'what lies below it'}"
            case "weights":
                return f"the MLP matrices of {', '.join(self.sites) or 'some sites'}"
            case "matrices":
                return f"the traces at {', '.join(self.sites)}, which need its attention matrices"
            case "root" | "record":
                return "no value, but the store cannot be opened"
            case "seal":
                return "no value, but the store has no id and cannot be opened"
        return "no value"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    kind: Kind
    name: str
    """the file, relative to the store"""
    part: int | None
    detail: str
    """what was found against what was expected, without the name"""
    costs: Costs = Costs()

    def text(self) -> str:
        """One line: the file, what is wrong with it, what that costs."""
        noun = NOUNS.get(self.costs.what)
        name = printable(self.name) + (f" ({noun})" if noun else "")
        return f"{name} {self.detail}".lstrip() + (
            "" if self.costs.what == "nothing" else f"; costs {self.costs.text()}"
        )


def costs_of(name: str, meta: StoreMeta | None, images: tuple[int, int] | None) -> Costs:
    """What the loss of a file costs; `images` are those of its part."""
    if match := _ARRAY.match(name):
        site = str(Site(match[1], int(match[2]), match[3]))  # type: ignore[arg-type]  # the pattern admits nothing else
        what: What = "metadata" if images is None else "scales" if match[6] else "activations"
        return Costs(what, images, (site,), (int(match[4]),), (match[5],))
    if match := _TOKENS.match(name):
        return Costs("metadata" if images is None else "tokens", images, (match[1],), (int(match[2]),))
    plain: dict[str, What] = {
        layout.ROOT: "root", layout.CARD: "card", layout.STORE_COMMIT: "record", layout.SEAL: "seal",
    }  # fmt: skip
    if name in plain:
        return Costs(plain[name])
    if (trace := parse_trace_file(name)) is not None:
        return Costs("traces", (trace[0], trace[0]), (f"block {trace[2]}",), (trace[1],))
    folder, _, file = name.partition("/")
    if folder == "weights" and meta is not None and meta.traced is not None and file in meta.traced.weights:
        blocks = (f"block {block}" for block, held in enumerate(meta.traced.weights) if held == file)
        return Costs("matrices", sites=tuple(blocks))
    if folder == "weights":
        files = {} if meta is None else meta.weights.get("files", {})
        return Costs("weights", sites=tuple(site for site, held in files.items() if held == file))
    if folder in _TABLES and file != layout.ROOT:
        return Costs(_TABLES[folder], images)
    return Costs("metadata")


def summary(findings: Iterable[Finding]) -> list[str]:
    """A line a kind: `2 files damaged: images 8-11 at img_3 step 2 mlp_in; the prompts of images 0-3`."""
    every, lines = list(findings), []
    for kind in COUNTED:
        if found := [each for each in every if each.kind == kind]:
            costs = costs_text(each.costs for each in found if each.costs.what != "nothing")
            lines.append(f"{_count(found)}: {costs}" if costs else _count(found))
    return lines


def counts(findings: Iterable[Finding]) -> str:
    """`2 files damaged, 1 file missing`"""
    every = list(findings)
    return ", ".join(_count(found) for kind in COUNTED if (found := [each for each in every if each.kind == kind]))


def _count(found: Sequence[Finding]) -> str:
    one, many = COUNTED[found[0].kind]
    return f"{len(found):,} {one if len(found) == 1 else many}"


def costs_text(costs: Iterable[Costs], shown: int = COSTS_SHOWN) -> str:
    """Several costs in words, the images of one array together: `images 0-3, 8-11 at img_3 step 2 mlp_in; the prompts of …`."""
    images: dict[Costs, list[tuple[int, int]]] = {}
    for each in costs:
        place = Costs(each.what, None, each.sites, each.steps, each.points)
        images.setdefault(place, []).extend([each.images] if each.images else [])
    texts = list(dict.fromkeys(place.of(spans(ranges)) for place, ranges in images.items()))
    more = [f"and {len(texts) - shown:,} more"] if len(texts) > shown else []
    return "; ".join([*texts[:shown], *more])


def spans(ranges: Iterable[tuple[int, int]], noun: str = "image") -> str:
    """`images 0-7, 12-15`: ranges, first and last number, put together where they meet."""
    merged: list[list[int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1][1] = max(last, merged[-1][1])
        else:
            merged.append([first, last])
    if not merged:
        return f"some {noun}s"
    words = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in merged)
    return f"{noun if merged[0][0] == merged[-1][1] else noun + 's'} {words}"


def printable(name: str) -> str:
    """A file name as text that any terminal takes: what is no Unicode, and line ends, are written out."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n").replace("\r", "\\r")


SHOWN = 20
"""findings of a kind that the text shows; `--json` has them all"""


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    store: str
    """the place, of a store or a pack"""
    id: str | None
    """the content id, where what carries it is whole"""
    findings: tuple[Finding, ...]
    files: int
    """how many were read"""
    bytes: int
    seconds: float
    unread: int
    """listed files that the sample left out"""
    unlisted: str
    """whether files that nothing lists were looked for, in words"""
    remedy: str

    @property
    def ok(self) -> bool:
        return not self.findings

    def text(self) -> str:
        """The findings a line each, what was read, and at the end what is lost and what to do."""
        lines = []
        for kind in COUNTED:
            found = [each for each in self.findings if each.kind == kind]
            lines += [f"{kind:>10}  {each.text()}" for each in found[:SHOWN]]
            if len(found) > SHOWN:
                lines.append(f"{kind:>10}  … and {len(found) - SHOWN:,} more (--json lists them all)")
        rate = f", {human_size(self.bytes / self.seconds)}/s" if self.seconds else ""
        left = f"; {self.unread:,} left out by the sample" if self.unread else ""
        lines.append(
            f"{self.files:,} files read, {human_size(self.bytes)} in {self.seconds:.1f} s{rate}{left}; {self.unlisted}"
        )
        if self.ok:
            return "\n".join([*lines, f"{self.store} is whole, id {self.id}"])
        return "\n".join([*lines, *summary(self.findings), f"Remedy: {self.remedy}"])

    def as_json(self) -> str:
        """The same for programs."""
        return json.dumps({**asdict(self), "ok": self.ok}, indent=1)
