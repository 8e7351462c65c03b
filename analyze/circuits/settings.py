"""What `graph` can be told."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from store.errors import UsageError
from store.sizes import parse_size

Ranking = Literal["influence", "difract"]
DType = Literal["float32", "float64"]
Device = Literal["auto", "cpu", "cuda"]
EXPORTS = ("difract", "circuit-tracer", "graphml")
"""forms that other programs read"""


@dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """Attribution graphs of features, from stored traces and transcoders: FLUX is not run."""

    store: Annotated[str | Path, tyro.conf.arg(metavar="STORE")]
    """The store with the traces (harvest --trace), a folder or a URL (s3://, hf://, https://)."""
    dictionaries: Path
    """Folder of transcoders: ours (`transcoder_img_6/`), or published `.pt` files."""
    out: Path
    """Folder of the graphs; the same command goes on in it where it was stopped."""

    image: int | str | None = None
    """Traced image to explain; several make a graph each: 0-9,12, or all that are traced."""
    step: int | str | None = None
    """Traced denoising step; several make a graph each: 0-3, or all that are traced."""
    target: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What to explain, site:token:feature such as img_3:12:66; token `max` is the one where the feature is most active, padding
    aside. Several --target make a graph each."""
    supernode: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Several features as one target, name=img_3:12:66+img_3:13:66; a weight may stand before each, as in 0.5*img_3:12:66."""
    targets: Path | None = None
    """Many targets: CSV with the columns image,step,site,token,feature, such as `analyze scan` writes; rows of one `group` (a further
    column) make one supernode."""
    together: bool = False
    """Make one graph of all --target and --supernode (for each image and step), not one each."""
    skip_inactive: bool = False
    """A target that is not active in a trace gets a line in the summary and no graph; by default the command fails at its end."""
    skip_untraced: bool = False
    """A target of an image or a step that is not traced gets a line in the summary and no graph; by default nothing is made."""
    padding: bool = False
    """Token `max` may be padding of the text; by default it is a real token of the prompt."""

    nodes: int = 40
    """How many nodes of a graph to expand at most, targets included."""
    batch: int = 10
    """How many nodes to expand before the rest are ranked again."""
    min_attribution: float = 1e-4
    """Edges under this are not kept; what they add up to is, as `dropped`."""
    edges: int | None = None
    """How many edges of a graph to keep at most, those that pass on most to the targets; the others count as `dropped`. Default: all."""
    ranking: Ranking = "influence"
    """What is expanded next: by influence on the targets, or by the rule of DifFRACT."""
    node_threshold: float = 0.8
    """The pruned graph keeps features with this share of the influence of their stream."""
    edge_threshold: float = 0.98
    """The pruned graph keeps edges with this share of the score of their stream."""
    allow_missing: bool = False
    """Go on without a transcoder at some site: what its MLP adds is an error node wholly."""

    export: str | None = None
    """Write further forms, of difract, circuit-tracer and graphml: such as circuit-tracer,graphml."""
    page: bool = True
    """Write index.html, where the graphs can be looked at; it opens from disk."""
    check: bool = False
    """Check the graphs: conservation, replay of the trace, and edges against perturbations of the frozen model; exit 1 over the bounds."""
    check_edges: int = 20
    """How many edges of each graph --check compares with a perturbation, drawn at random."""
    seed: int = 0
    """Seed of that draw."""

    dtype: DType = "float32"
    """What attributions are computed in; float64 conserves to 1e-12 and takes about twice the time."""
    device: Device = "auto"
    """Where: auto (a GPU where there is one), cpu or cuda."""
    memory: str = "2GB"
    """About what is held at once of a trace and its gradients (Python, its libraries, the transcoders and, at about 64 bytes each, the
    edges that are found come on top)."""
    plan: bool = False
    """Print what would be read, computed and written, and stop."""

    def __post_init__(self) -> None:
        for flag in ("nodes", "batch", "edges", "check_edges"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise UsageError(f"--{flag.replace('_', '-')} is {value}: give at least 1")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"--seed is {self.seed}: give a whole number from 0 to 18446744073709551615")
        if not (math.isfinite(self.min_attribution) and self.min_attribution >= 0):
            raise UsageError(f"--min-attribution is {self.min_attribution}: give 0 or more")
        for flag in ("node_threshold", "edge_threshold"):
            if not 0 < getattr(self, flag) <= 1:
                raise UsageError(f"--{flag.replace('_', '-')} is {getattr(self, flag)}: a share above 0 and up to 1")
        parse_size(self.memory)
        _ = self.exports
        _check_choice(self)

    @property
    def exports(self) -> tuple[str, ...]:
        """The further forms that are asked for; `UsageError` for one that there is not."""
        words = () if self.export is None else tuple(word.strip() for word in self.export.split(","))
        for word in words:
            if word not in EXPORTS:
                raise UsageError(f"--export {word!r} is no form of a graph: choose of {', '.join(EXPORTS)}")
        return tuple(form for form in EXPORTS if form in words)

    @property
    def choices(self) -> dict[str, object]:
        """What decides the graphs, beside store, dictionaries and targets: what their records keep."""
        names = (
            "ranking", "nodes", "batch", "min_attribution", "edges", "node_threshold", "edge_threshold", "dtype",
            "allow_missing", "together",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    @property
    def held(self) -> int:
        """`memory` in bytes."""
        return parse_size(self.memory)


def _check_choice(settings: GraphSettings) -> None:
    """Refuse targets that are missing or given in two ways."""
    if settings.targets is not None:
        given = [flag for flag in ("image", "step", "target", "supernode") if getattr(settings, flag) not in (None, ())]
        if given:
            raise UsageError(f"--targets FILE.csv says image, step and target of each graph: leave out --{given[0]}")
        if settings.together:
            raise UsageError(
                "--together puts --target and --supernode into one graph; rows of --targets that belong together have "
                "the same text in a column named group"
            )
        return
    if not settings.target and not settings.supernode:
        raise UsageError(
            "no target: give --target site:token:feature such as img_3:12:66 (or img_3:max:66), --supernode, or --targets "
            "FILE.csv as python -m analyze scan writes it"
        )
    for flag in ("image", "step"):
        if getattr(settings, flag) is None:
            raise UsageError(f"--target needs --image and --step: --{flag} is missing")
