"""What an intervention is: data that say what is changed, where and when.  Nothing here computes.

    intervention    a named set of edits, and streams that are off
    edit            one set of features of one dictionary, one mode

With z a feature's activation at a token and z' what it is changed to, at the chosen tokens and steps:

    zero      z' = 0
    amplify   z' = strength * z
    invert    z' = -strength * z
    set       z' = strength, whether the feature was active there or not, and whatever TopK would have kept
    add       y' = y + strength * (the feature's decoder column): additive steering; z is neither read nor changed

Edits are carried out in their order, each on what the one before left of z; `add` comes after all others.  Tokens above a share
of a maximum are chosen by z as it was before any edit.  Two methods bring z' into the model:

    difference    mlp_out' = mlp_out + W_dec (z' - z): what the dictionary does not explain stays as it is, and a token where
                  z' = z keeps every bit
    replacement   mlp_out' = dictionary(x) with z' for z, at all tokens and at the steps of the edits; of an SAE this is
                  encode, modify, decode
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from analyze.steering.token_choice import ALL, TokenChoice
from harvest.replacing import PARTS, Part
from store.errors import UsageError
from store.sites import Site, Stream
from train.dictionaries.config import Kind

Mode = Literal["zero", "amplify", "invert", "set", "add"]
Method = Literal["difference", "replacement"]
Unit = Literal["absolute", "peak"]
MODES: tuple[Mode, ...] = get_args(Mode)
METHODS: tuple[Method, ...] = get_args(Method)
KINDS: tuple[Kind, ...] = get_args(Kind)
OF_PEAKS = ("set", "add")
"""modes whose strength is an activation, and may be counted in peaks"""


@dataclass(frozen=True)
class FeatureEdit:
    """A set of features of one dictionary, and what becomes of them.  `UsageError` for an edit that means nothing."""

    site: Site
    features: tuple[int, ...]
    mode: Mode
    strength: float = 1.0
    """factor of amplify and invert; activation of set and add; zero has none"""
    steps: tuple[int, ...] | None = None
    """0-based denoising steps; None: all"""
    tokens: TokenChoice = ALL
    kind: Kind | None = None
    """which dictionary of the site; None: the only one"""
    unit: Unit = "absolute"
    """`peak`: the strength of set and add counts in the feature's greatest activation in an analysis"""
    normalised: bool = False
    """add along columns of unit norm (those of a difract dictionary have it anyway)"""

    def __post_init__(self) -> None:
        _check_site(self.site)
        if not self.features:
            raise UsageError(f"{self.site}: an edit of no feature (an empty supernode?): name features such as 66,70")
        if min(self.features) < 0 or len(set(self.features)) < len(self.features):
            raise UsageError(f"{self.site}: features {list(self.features)} must be 0 or more, each once")
        for name, value, choices in (
            ("mode", self.mode, MODES),
            ("kind", self.kind, (None, *KINDS)),
            ("unit", self.unit, get_args(Unit)),
        ):
            if value not in choices:
                there = ", ".join(str(choice) for choice in choices if choice is not None)
                raise UsageError(f"{self}: {name} {value!r} is not one of {there}")
        if not math.isfinite(self.strength):
            raise UsageError(f"{self}: the strength {self.strength} is no finite number")
        if self.mode == "zero" and self.strength != 1:
            raise UsageError(f"{self}: zero takes no strength; amplify:{exact(self.strength)} would scale")
        if self.unit == "peak" and self.mode not in OF_PEAKS:
            raise UsageError(f"{self}: only set and add count in peaks; the strength of {self.mode} is a factor")
        if self.normalised and self.mode != "add":
            raise UsageError(f"{self}: only add has normalised columns, {self.mode} changes activations")
        _check_steps(str(self), self.steps)

    def __str__(self) -> str:
        """`amplify:4 txt_2:5,9`"""
        strength = "" if self.mode == "zero" else f":{exact(self.strength)}"
        return f"{self.mode}{strength} {self.site}:{','.join(map(str, self.features))}"

    @property
    def idle(self) -> bool:
        """Whether its strength leaves everything as it is: amplify:1, invert:-1, add:0."""
        return (self.mode, self.strength) in (("amplify", 1), ("invert", -1), ("add", 0))

    def at(self, step: int) -> bool:
        """Whether it is in force at a step."""
        return self.steps is None or step in self.steps


@dataclass(frozen=True)
class StreamOff:
    """A whole stream whose MLP or attention writes zeros at some layers and steps; the residual goes on past them."""

    stream: Stream
    layers: tuple[int, ...]
    steps: tuple[int, ...] | None = None
    """0-based denoising steps; None: all"""
    parts: tuple[Part, ...] = ("mlp",)

    def __post_init__(self) -> None:
        if self.stream not in ("img", "txt"):
            raise UsageError(f"stream {self.stream!r} cannot be switched off: there are img and txt")
        if not self.layers or min(self.layers) < 0:
            raise UsageError(f"{self.stream} off at layers {list(self.layers)}: name layers such as 0-3")
        unknown = [part for part in self.parts if part not in PARTS]
        if not self.parts or unknown:
            raise UsageError(f"{self.stream} off: parts {list(self.parts)}; there are {' and '.join(PARTS)}")
        _check_steps(f"{self.stream} off", self.steps)

    def spots(self) -> list[tuple[Site, Part]]:
        """What it switches off."""
        return [(Site("double", layer, self.stream), part) for layer in self.layers for part in self.parts]

    def at(self, step: int) -> bool:
        """Whether it is in force at a step."""
        return self.steps is None or step in self.steps


Splice = Site | tuple[Site, Kind]
"""a site whose MLP is replaced by its only dictionary, or by the one of a kind"""


@dataclass(frozen=True)
class Intervention:
    """A named set of changes; without edits, off and splice it changes nothing."""

    name: str
    edits: tuple[FeatureEdit, ...] = ()
    off: tuple[StreamOff, ...] = ()
    """comes after all edits of a site"""
    method: Method = "difference"
    splice: tuple[Splice, ...] = ()
    """sites whose MLP is the dictionary at every step, also without an edit; (site, kind) where the site has both"""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UsageError("an intervention needs a name")
        if self.method not in METHODS:
            raise UsageError(f"{self.name}: method {self.method!r} is not one of {', '.join(METHODS)}")
        sites = [spliced_site(spliced) for spliced in self.splice]
        for site in sites:
            _check_site(site)
            if sites.count(site) > 1:
                raise UsageError(f"{self.name}: {site} is spliced twice; one dictionary stands for its MLP")

    @property
    def spliced(self) -> dict[Site, Kind | None]:
        """Spliced sites, and the kind of dictionary that stands there; None: the only one."""
        return {spliced_site(each): each[1] if isinstance(each, tuple) else None for each in self.splice}

    @property
    def idle(self) -> bool:
        """Whether nothing of it can change anything, whatever the features do."""
        return not (self.off or self.splice) and self.method == "difference" and all(edit.idle for edit in self.edits)

    def with_strength(self, strength: float) -> "Intervention":
        """The same with this strength in every edit that has one; `UsageError` where none has."""
        if all(edit.mode == "zero" for edit in self.edits):
            raise UsageError(f"{self.name} has no edit with a strength: zero takes none")
        edits = (edit if edit.mode == "zero" else replace(edit, strength=strength) for edit in self.edits)
        return replace(self, edits=tuple(edits))


def edits_of(
    members: Iterable[tuple[Site, int]], mode: Mode, strength: float = 1.0, kind: Kind | None = None, *,
    steps: tuple[int, ...] | None = None, tokens: TokenChoice = ALL, unit: Unit = "absolute", normalised: bool = False,
) -> tuple[FeatureEdit, ...]:  # fmt: skip
    """The edits that do one thing to a supernode, its members (site, feature): one edit a site, features ascending.

    A member named twice is one.  `UsageError` for an empty supernode.
    """
    by_site: dict[Site, set[int]] = {}
    for site, feature in members:
        by_site.setdefault(site, set()).add(feature)
    if not by_site:
        raise UsageError("the supernode is empty: name features such as img_3:66+txt_2:5")
    return tuple(
        FeatureEdit(site, tuple(sorted(by_site[site])), mode, strength, steps, tokens, kind, unit, normalised)
        for site in sorted(by_site)
    )


def spliced_site(spliced: Splice) -> Site:
    """The site that is spliced."""
    return spliced[0] if isinstance(spliced, tuple) else spliced


def exact(strength: float) -> str:
    """A strength as short as it reads back the same: `4`, `0.1`, `1.23456789`."""
    short = f"{strength:g}"
    return short if float(short) == strength else repr(strength)


def _check_site(site: Site) -> None:
    if site.kind != "double":
        raise UsageError(f"{site}: single-stream blocks cannot be changed yet; choose double blocks (img_0, txt_0, …)")


def _check_steps(what: str, steps: tuple[int, ...] | None) -> None:
    if steps is not None and (not steps or min(steps) < 0):
        raise UsageError(f"{what}: steps {list(steps)}; name steps such as 2-3, or leave them out for all")
