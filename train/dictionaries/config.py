"""What a dictionary says about itself: the content of `config.json`, enough to load it with no outside facts."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from store.errors import ForeignError, UsageError
from store.format import Targets
from store.sites import Point, Site

FORMAT = "granary-dictionary"
FORMAT_VERSION = 2
DEFAULTS_OF_VERSION_1: dict[str, Any] = {"skip": False, "nested": []}
"""keys that version 2 added, and what a dictionary of version 1 is in their words"""

Kind = Literal["transcoder", "sae"]
Family = Literal["difract", "flux-sae"]
Activation = Literal["relu", "topk", "batchtopk", "jumprelu"]

POINTS_OF_KIND: dict[Kind, tuple[Point, Point]] = {
    "transcoder": ("mlp_in", "mlp_out"),
    "sae": ("mlp_out", "mlp_out"),
}


@dataclass(frozen=True)
class Parent:
    """What a dictionary was trained on."""

    pack: str
    """content id of the pack"""
    store: str
    """content id of the store that the pack was made from"""
    model: dict[str, Any]
    """the model as the store names it: id, revision, hash of the weights"""
    targets: Targets = "stored"
    """whether mlp_out was read, or computed from mlp_in by the MLP of the site"""


@dataclass(frozen=True)
class DictionaryConfig:
    """Everything that is needed to build and to judge a dictionary; `UsageError` where fields contradict each other."""

    kind: Kind
    site: Site
    d_model: int
    n_features: int
    activation: Activation = "relu"
    k: int | None = None
    """TopK keeps the k greatest activations of a row, BatchTopK k a row on the average; None for other activations"""
    time_embed_dim: int | None = None
    """width of the sinusoidal embedding of sigma; None: not conditioned on it"""
    family: Family = "difract"
    """`difract`: scale and shift from sigma, decoder bias; `flux-sae`: one `pre_bias`, no conditioning"""
    skip: bool = False
    """a linear path from input to target beside the features"""
    nested: tuple[int, ...] = ()
    """widths of the inner prefixes that were trained to explain the target alone, rising; empty: not nested"""
    parent: Parent | None = None
    """None: trained by others, unknown"""
    training: dict[str, Any] | None = None
    """the resolved training settings; None: trained by others, or not at all"""
    steps: int = 0
    """optimizer steps taken"""
    rows: int = 0
    """rows seen, repeated ones counted again"""

    def __post_init__(self) -> None:
        for name, choices in (("kind", Kind), ("family", Family), ("activation", Activation)):
            if getattr(self, name) not in get_args(choices):
                raise UsageError(f"{name} {getattr(self, name)!r} is not one of {', '.join(get_args(choices))}")
        if self.d_model < 1 or self.n_features < 1:
            raise UsageError(f"d_model {self.d_model} and n_features {self.n_features} must be positive")
        if (self.activation in ("topk", "batchtopk")) != (self.k is not None):
            raise UsageError(
                f"activation {self.activation!r} with k = {self.k}: TopK and BatchTopK need a k, the others have none"
            )
        if self.k is not None and not 1 <= self.k <= self.n_features:
            raise UsageError(f"k = {self.k} must lie between 1 and the {self.n_features} features")
        if self.time_embed_dim is not None and self.time_embed_dim < 4:
            raise UsageError(f"time_embed_dim {self.time_embed_dim} is too small: it must be at least 4")
        if self.family == "flux-sae" and (self.kind != "sae" or self.time_embed_dim is not None):
            raise UsageError("the flux-sae family has only SAEs without timestep conditioning")
        if self.skip and self.kind == "sae":
            raise UsageError("an SAE has no skip connection: its target is its input, which it would hand through")
        widths = {width for width in self.nested if isinstance(width, int) and 0 < width < self.n_features}
        if list(self.nested) != sorted(widths):
            raise UsageError(
                f"nested {list(self.nested)} must be rising widths between 0 and the {self.n_features} features"
            )

    @property
    def name(self) -> str:
        """`transcoder_img_6`: the name of the folder, and of the published file."""
        return f"{self.kind}_{self.site}"

    @property
    def input_point(self) -> Point:
        return POINTS_OF_KIND[self.kind][0]

    @property
    def target_point(self) -> Point:
        return POINTS_OF_KIND[self.kind][1]

    def trained(self, steps: int, rows: int) -> "DictionaryConfig":
        """The same after `steps` optimizer steps over `rows` rows."""
        return replace(self, steps=steps, rows=rows)

    def to_json(self) -> dict[str, Any]:
        """As `config.json` carries it."""
        parent = "unknown" if self.parent is None else asdict(self.parent)
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"site": str(self.site), "parent": parent, "nested": list(self.nested)}
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_json(cls, found: dict[str, Any], where: str) -> "DictionaryConfig":
        """The inverse of `to_json`; `ForeignError` for what is not ours, or of a version that we do not read."""
        if found.get("format") != FORMAT:
            raise ForeignError(f"{where} describes no Granary dictionary (its format is {found.get('format')!r})")
        version = found.get("format_version")
        if version not in (1, FORMAT_VERSION):
            raise ForeignError(
                f"{where} has format version {version!r}; this Granary reads versions 1 to {FORMAT_VERSION}. "
                "Use the version of Granary that wrote it."
            )
        values = {key: value for key, value in found.items() if key not in ("format", "format_version")}
        expected = {f.name for f in fields(cls)} - (set(DEFAULTS_OF_VERSION_1) if version == 1 else set())
        if set(values) != expected:
            raise ForeignError(
                f"{where} does not have version {version}'s keys; missing or unknown: {sorted(expected ^ set(values))}"
            )
        if version == 1:
            values |= DEFAULTS_OF_VERSION_1
        try:
            values["site"] = Site.parse(values["site"])
            values["parent"] = None if values["parent"] == "unknown" else Parent(**values["parent"])
            values["nested"] = tuple(values["nested"])
            return cls(**values)
        except (TypeError, AttributeError, UsageError) as error:
            raise ForeignError(f"{where} is malformed: {error}") from None
