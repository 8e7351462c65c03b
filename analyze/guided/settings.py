"""What `guided` can be told."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from analyze.guided.arms import ARMS, Arm
from analyze.guided.sources import By, Feature
from analyze.guided.targets import chosen_values
from analyze.steering.edits import Mode
from analyze.steering.token_choice import TokenChoice
from analyze.truth.attributes import VALUES
from store.errors import UsageError
from store.sites import Site


@dataclass(frozen=True, kw_only=True)
class GuidedSettings:
    """Suppress the circuit that attribution graphs show of a colour (shape, …), beside as many other features, and judge the pictures.

    Runs the model, and counts the runs.  The store is one of tiny-flux's `builtin:shapes`, whose judge reads what a picture shows.
    """

    store: Annotated[str | Path, tyro.conf.arg(metavar="STORE")]
    """The store whose pictures are drawn again, plain and changed."""
    dictionaries: Path
    """Folder of transcoders: those that the graphs were made with."""
    analysis: Path
    """What `analyze all` wrote of that store and these dictionaries: scores and the truth table."""
    graphs: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="G [G …]")]
    """What `analyze graph` wrote of targets that `analyze targets` chose: the graphs of every value."""
    out: Path
    """Folder of the results; values that are finished in it are not drawn again."""
    judge: Annotated[str | Path | None, tyro.conf.arg(metavar="STORE")] = None
    """Judge the pictures of this store of the same model, of prompts of the same kind, instead of those of --store that no feature was
    chosen on; pictures of scenes that --store or --traces shows too are left out."""
    traces: Annotated[str | Path | None, tyro.conf.arg(metavar="STORE")] = None
    """The store whose traces the graphs explain, where it is another one."""
    model: str | None = None
    """Folder of the store's model where its id does not lead to it."""

    attribute: str = "colour"
    """What is to change: colour, shape, position or background."""
    values: str = "all"
    """Which of its values, such as red,green; `all`: every one."""
    by: By = "txt"
    """Which sources make the circuit: those of the txt or img stream or of both, by their effect on the target in all graphs; of both
    by their strongest `path`; or a `supernode` that is named."""
    top: int = 6
    """How many of them, the best."""
    supernode: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """With --by supernode: the circuit of a value by hand, red=txt_0:919+txt_0:782."""
    arms: str = ",".join(ARMS)
    """What is intervened on, one after the other: circuit (its sources), target (what the graphs explain, alone), matched and contrast
    (as many features chosen without graphs, at the target's sites and in the circuit's streams), single (the truth table's best
    feature), random (as many, about as often active, in the circuit's sites)."""
    with_target: bool = False
    """The circuit includes the target."""

    mode: Mode = "invert"
    """What becomes of the features: zero, amplify, invert, set, add (see `analyze steer`)."""
    strength: float = 3.0
    """How strong, the same for every arm."""
    steps: str = "all"
    """Denoising steps at which it happens, such as 0-1."""
    tokens: str = "all"
    """Tokens at which it happens: all, 3,7-9, above:0.5 or mask:FILE.png."""
    own_strengths: str = "1.5,2,3,4,5,7,10,15,20,30,45"
    """Besides, the arms of --own are drawn at that of these strengths which changes most of the --tuning pictures cleanly: the same
    strengths for every arm, and pictures that are not judged; `none`."""
    own: str = ",".join(ARMS)
    """Arms that are also drawn at their own best strength."""
    tuning: int = 12
    """Pictures of each value on which those strengths are chosen."""

    images: int | None = None
    """Judge at most so many pictures of each value; default: all that are left when those used for choosing are out."""
    shown: int = 6
    """Pictures of each value in its collage."""
    seed: int = 0
    """Seed of the random features."""
    batch_size: int | None = None
    """Pictures drawn at once; default: the store's."""
    device: str | None = None
    """cuda, cuda:1, cpu; default: cuda where there is one."""
    plan: bool = False
    """Say what would be drawn and what it costs; draw and write nothing."""

    def __post_init__(self) -> None:
        if self.attribute not in VALUES:
            raise UsageError(f"--attribute {self.attribute!r} is not one of {', '.join(VALUES)}")
        for flag in ("top", "tuning", "images", "shown", "batch_size"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise UsageError(f"--{flag.replace('_', '-')} is {value}: give at least 1")
        if not math.isfinite(self.strength):
            raise UsageError(f"--strength is {self.strength}: give a finite number")
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}: seeds start at 0")
        if (self.by == "supernode") != bool(self.supernode):
            raise UsageError("--by supernode and --supernode NAME=… go together: give both or neither")
        _ = self.asked, self.chosen_arms, self.own_arms, self.sweep, self.supernodes, self.token_choice

    @property
    def asked(self) -> tuple[str, ...]:
        """The values that are to change."""
        return chosen_values(self.attribute, self.values)

    @property
    def chosen_arms(self) -> tuple[Arm, ...]:
        """The arms, in their order."""
        return _arms("--arms", self.arms)

    @property
    def own_arms(self) -> tuple[Arm, ...]:
        """The arms that are also drawn at their own strength; none where there is nothing to choose from."""
        wanted = _arms("--own", self.own)
        return tuple(arm for arm in wanted if arm in self.chosen_arms) if self.sweep else ()

    @property
    def sweep(self) -> tuple[float, ...]:
        """The strengths that are tried for each arm."""
        if self.own_strengths.strip() == "none" or self.mode == "zero":
            return ()
        try:
            found = tuple(dict.fromkeys(float(word) for word in self.own_strengths.split(",")))
        except ValueError:
            found = (math.nan,)
        if not all(map(math.isfinite, found)):
            raise UsageError(f"--own-strengths {self.own_strengths!r}: write finite numbers such as 3,10,30, or none")
        return found

    @property
    def token_choice(self) -> TokenChoice:
        """The tokens at which features are changed."""
        return TokenChoice.parse(self.tokens)

    @property
    def supernodes(self) -> Mapping[str, tuple[Feature, ...]]:
        """The circuits that are named by hand, value -> features."""
        found: dict[str, tuple[Feature, ...]] = {}
        for text in self.supernode:
            name, equals, members = text.partition("=")
            if not equals or name.strip() not in self.asked or name.strip() in found:
                raise UsageError(
                    f"--supernode {text!r}: write VALUE=img_3:66+txt_2:5, each value of --values ({', '.join(self.asked)}) once"
                )
            found[name.strip()] = tuple(dict.fromkeys(_feature(part, text) for part in members.split("+")))
        if missing := [value for value in self.asked if found and value not in found]:
            raise UsageError(f"--supernode names no circuit of {missing[0]}: give one, or leave it out with --values")
        return found


def _feature(text: str, where: str) -> Feature:
    site, colon, number = text.strip().partition(":")
    if not colon or not number.isdecimal():
        raise UsageError(f"--supernode {where!r}: {text.strip()!r} is no feature; write img_3:66+txt_2:5")
    return Site.parse(site), int(number)


def _arms(flag: str, text: str) -> tuple[Arm, ...]:
    words = [word.strip() for word in text.split(",")]
    unknown = [word for word in words if word not in ARMS]
    if unknown:
        raise UsageError(f"{flag}: there is no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    return tuple(arm for arm in ARMS if arm in words)
