"""What interventions are called on the command line and in experiment files, and what these words mean.

edit        MODE[:STRENGTH] WHAT [@steps=2-3] [@tokens=above:0.5] [@kind=sae] [@unit=peak] [@normalised]
off         STREAM LAYERS [@steps=0] [@parts=mlp,attn]
supernode   NAME=WHAT
WHAT        img_3:66,70 or img_3:66+txt_2:5, or the name of a supernode

zero img_3:66,70
amplify:4 red @steps=2-3 @tokens=above:0.5
txt all @steps=0
"""

import math
import re
from collections.abc import Mapping
from typing import Any, get_args

from analyze.steering.edits import (
    KINDS,
    METHODS,
    MODES,
    FeatureEdit,
    Method,
    Splice,
    StreamOff,
    Unit,
    edits_of,
)
from analyze.steering.token_choice import ALL, TokenChoice
from harvest.replacing import PARTS
from store.errors import UsageError
from store.sites import Site, parse_numbers, parse_sites

FURTHEST = 1_000_000
"""beyond any feature, step and layer: what bounds numbers until a dictionary or a model says how many it has"""
NAME = re.compile(r"[A-Za-z][\w.-]*")
SITE = re.compile(r"(img|txt|joint)_\d+")
Members = tuple[tuple[Site, int], ...]
"""of a supernode: (site, feature), by site and number"""
EDIT_OPTIONS = ("steps", "tokens", "kind", "unit", "normalised")
OFF_OPTIONS = ("steps", "parts")
EXAMPLE = "write for example zero img_3:66,70 or amplify:4 img_3:66+txt_2:5 @steps=2-3 @tokens=above:0.5"


def edits_in(text: str, supernodes: Mapping[str, Members]) -> tuple[FeatureEdit, ...]:
    """The edits that an edit's text means, one a site; `UsageError` says what is wrong with it."""
    (words, options) = _parts(text, EDIT_OPTIONS)
    if len(words) != 2:
        raise UsageError(f"edit {text!r} has not a mode and what it changes: {EXAMPLE}")
    mode, colon, strength = words[0].partition(":")
    if mode not in MODES:
        raise UsageError(f"edit {text!r}: {mode!r} is no mode; there are {', '.join(MODES)}: {EXAMPLE}")
    if mode == "zero" and colon:
        raise UsageError(f"edit {text!r}: zero takes no strength; amplify:{strength or 0} would scale")
    if colon and not strength:
        raise UsageError(f"edit {text!r}: no strength follows the colon; write {mode}:4")
    return edits_from(
        text, {"mode": mode, "target": words[1], **({"strength": strength} if colon else {}), **options}, supernodes
    )


def edits_from(where: str, values: Mapping[str, Any], supernodes: Mapping[str, Members]) -> tuple[FeatureEdit, ...]:
    """The edits of a mapping with the keys mode, target (or site and features), and perhaps strength, steps, tokens, kind, unit,
    normalised; what is absent is as on the command line.  `UsageError`, which begins with `where`."""
    unknown = sorted(map(str, set(values) - {"mode", "strength", "target", "site", "features", *EDIT_OPTIONS}))
    if unknown:
        raise UsageError(
            f"edit {where!r}: {unknown[0]!r} is no key of an edit; there are mode, target, strength, {', '.join(EDIT_OPTIONS)}"
        )
    mode, kind, unit = values.get("mode"), values.get("kind"), values.get("unit") or "absolute"
    for name, value, choices in (("mode", mode, MODES), ("kind", kind, (None, *KINDS)), ("unit", unit, get_args(Unit))):
        if value not in choices:
            raise UsageError(
                f"edit {where!r}: {name} {value!r} is not one of {', '.join(str(choice) for choice in choices if choice)}"
            )
    normalised = values.get("normalised", False)
    if not isinstance(normalised, bool):
        raise UsageError(f"edit {where!r}: normalised is {normalised!r}; write true or false")
    try:
        return edits_of(
            _members_of(where, values, supernodes),
            mode,  # type: ignore[arg-type]  # checked above
            number(f"edit {where!r}: the strength", values.get("strength", 1.0)),
            kind,
            steps=steps_in(where, values.get("steps")),
            tokens=_tokens(where, values.get("tokens")),
            unit=unit,  # type: ignore[arg-type]  # checked above
            normalised=normalised,
        )
    except UsageError as error:
        said = str(error)
        raise UsageError(said if where in said else f"edit {where!r}: {said}") from None


def off_in(text: str, n_blocks: int) -> StreamOff:
    """What a text such as `txt 0-3 @steps=0 @parts=mlp,attn` switches off, of a model with so many double blocks."""
    words, options = _parts(text, OFF_OPTIONS)
    if len(words) != 2:
        raise UsageError(
            f"off {text!r} has not a stream and layers: write for example txt 0-3 @steps=0 @parts=mlp,attn"
        )
    return off_from(text, {"stream": words[0], "layers": words[1], **options}, n_blocks)


def off_from(where: str, values: Mapping[str, Any], n_blocks: int) -> StreamOff:
    """What a mapping with the keys stream and layers, and perhaps steps and parts, switches off."""
    unknown = sorted(map(str, set(values) - {"stream", "layers", *OFF_OPTIONS}))
    if unknown:
        raise UsageError(f"off {where!r}: {unknown[0]!r} is no key of it; there are stream, layers, steps, parts")
    stream, layers, parts = values.get("stream"), values.get("layers"), values.get("parts") or ("mlp",)
    if stream not in ("img", "txt"):
        raise UsageError(f"off {where!r}: {stream!r} is no stream; there are img and txt")
    if isinstance(parts, str):
        parts = tuple(part.strip() for part in parts.split(","))
    if not isinstance(parts, list | tuple) or any(part not in PARTS for part in parts):
        raise UsageError(f"off {where!r}: parts {parts!r}; there are {' and '.join(PARTS)}")
    try:
        # a layer or a number too high is told by `check`, which knows what there is
        found = range(n_blocks) if str(layers).strip() == "all" else numbers(where, layers, "layer")
        return StreamOff(stream, tuple(found), steps_in(where, values.get("steps")), tuple(parts))
    except UsageError as error:
        raise UsageError(f"off {where!r}: {error}") from None


def splices_in(text: str) -> tuple[Splice, ...]:
    """The dictionaries that `img_0-3,sae_txt_2` puts in the place of MLPs; `UsageError` for what names none."""
    found: list[Splice] = []
    for word in text.split(","):
        kind = next((kind for kind in KINDS if word.strip().startswith(f"{kind}_")), None)
        sites = parse_sites(word.strip().removeprefix(f"{kind}_"))
        found += sites if kind is None else [(site, kind) for site in sites]
    return tuple(dict.fromkeys(found))


def splice_text(spliced: Splice) -> str:
    """`img_2`, or `sae_img_2` where the kind is said."""
    return f"{spliced[1]}_{spliced[0]}" if isinstance(spliced, tuple) else str(spliced)


def supernode_in(text: str) -> tuple[str, Members]:
    """Name and members of `red=img_3:66+txt_2:5`; `UsageError` for one without a name or without members."""
    name, equals, members = text.partition("=")
    name = name.strip()
    if not equals:
        raise UsageError(f"supernode {text!r} has no members: write for example red=img_3:66+txt_2:5")
    return name, supernode_members(name, members)


def supernode_members(name: Any, members: Any) -> Members:
    """The members of a supernode from their text `img_3:66+txt_2:5`, or from a list of such texts."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or SITE.fullmatch(name):
        raise UsageError(f"supernode {name!r}: a name begins with a letter, has no blanks, and is no site")
    texts = [members] if isinstance(members, str) else members
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"supernode {name!r}: {members!r} names no features: write img_3:66+txt_2:5")
    pieces = [piece for text in texts for piece in text.split("+") if piece.strip()]
    if not pieces:
        raise UsageError(f"supernode {name!r} is empty: name features such as img_3:66+txt_2:5")
    return tuple(sorted({member for piece in pieces for member in _features(f"supernode {name!r}", piece)}))


def members_text(members: Members) -> str:
    """`img_3:66,70+txt_2:5`, what `supernode_members` reads."""
    by_site: dict[Site, list[int]] = {}
    for site, feature in members:
        by_site.setdefault(site, []).append(feature)
    return "+".join(f"{site}:{','.join(map(str, features))}" for site, features in by_site.items())


def strengths_in(values: Any) -> tuple[float, ...]:
    """The strengths of a sweep from `0,1,2.5` or a list, in that order; `UsageError` for none, one twice, or no finite number."""
    words = values.split(",") if isinstance(values, str) else values
    if not isinstance(words, list) or not words:
        raise UsageError(f"strengths {values!r}: write numbers such as 0,1,2,4")
    found = tuple(number(f"strengths {values!r}:", word) for word in words)
    if len(set(found)) < len(found):
        raise UsageError(f"strengths {values!r}: one of them is there twice")
    return found


def method_in(value: Any) -> Method:
    """The method of that name; `UsageError` names those that there are."""
    if value not in METHODS:
        raise UsageError(f"method {value!r} is not one of {', '.join(METHODS)}")
    return value  # type: ignore[no-any-return]


def number(what: str, value: Any) -> float:
    """A finite number from a number or its text; `UsageError`, which begins with `what`."""
    try:
        found = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{what} {value!r} is no number: write for example 4 or -0.5") from None
    if not math.isfinite(found):
        raise UsageError(f"{what} {value!r} is no finite number")
    return found


def numbers(where: str, values: Any, what: str) -> tuple[int, ...]:
    """Ascending 0-based numbers from `0-3,7`, a number, or a list of numbers."""
    if isinstance(values, str):
        return parse_numbers(values, FURTHEST, what) if values.strip() != "all" else _refuse(where, values, what)
    listed = values if isinstance(values, list | tuple) else [values]
    if not listed or any(type(value) is not int or not 0 <= value < FURTHEST for value in listed):
        return _refuse(where, values, what)
    return tuple(sorted(set(listed)))


def steps_in(where: str, value: Any) -> tuple[int, ...] | None:
    """Denoising steps from `2-3`, a number or a list; None, which means all, for `all` and for nothing."""
    return None if value is None or value == "all" else numbers(where, value, "step")


def _refuse(where: str, values: Any, what: str) -> tuple[int, ...]:
    raise UsageError(f"{where!r}: {values!r} is no {what}: write numbers and ranges such as 0-3,7")


def _parts(text: str, known: tuple[str, ...]) -> tuple[list[str], dict[str, Any]]:
    """The words before the first option, and the options `@name=value`."""
    words, *options = re.split(r"\s+@", text.strip())
    found: dict[str, Any] = {}
    for option in options:
        name, equals, value = (part.strip() for part in option.partition("="))
        if name not in known:
            raise UsageError(
                f"{text!r}: there is no option @{name}; there are {', '.join('@' + each for each in known)}"
            )
        if name in found:
            raise UsageError(f"{text!r} says @{name} twice")
        if name == "normalised":
            if value not in ("", "true", "false"):
                raise UsageError(f"{text!r}: @normalised={value}; write @normalised alone")
            found[name] = value != "false"
        elif not equals or not value:
            raise UsageError(f"{text!r}: @{name} has no value: write @{name}=…")
        else:
            found[name] = value
    return words.split(), found


def _members_of(where: str, values: Mapping[str, Any], supernodes: Mapping[str, Members]) -> Members:
    """What an edit changes: of `target` a supernode or features, or `site` with its list of `features`."""
    if "target" not in values:
        site, features = values.get("site"), values.get("features")
        if not isinstance(site, str) or features is None:
            raise UsageError(
                "it says not what it changes: give a target such as img_3:66,70, or a site and its features"
            )
        return tuple((Site.parse(site), feature) for feature in numbers(where, features, "feature"))
    target = values["target"]
    if not isinstance(target, str) or "site" in values or "features" in values:
        raise UsageError("give either a target, such as img_3:66,70 or a supernode's name, or a site and its features")
    target = target.strip()
    if target in supernodes:
        return supernodes[target]
    if ":" not in target and not SITE.fullmatch(target):
        there = (
            f"there are {', '.join(supernodes)}" if supernodes else "none is defined (--supernode red=img_3:66+txt_2:5)"
        )
        raise UsageError(f"there is no supernode {target!r}; {there}")
    return tuple(sorted({member for piece in target.split("+") for member in _features(where, piece)}))


def _features(where: str, piece: str) -> Members:
    site, _, features = (part.strip() for part in piece.strip().partition(":"))
    if not features:
        raise UsageError(
            f"{where}: {piece.strip()!r} names no feature: write {site or 'img_3'}:66 or {site or 'img_3'}:66,70"
        )
    if features == "all":
        raise UsageError(f"{where}: {piece.strip()!r}: name features by their numbers")
    return tuple((Site.parse(site), feature) for feature in parse_numbers(features, FURTHEST, "feature"))


def _tokens(where: str, value: Any) -> TokenChoice:
    if value is None:
        return ALL
    if isinstance(value, str):
        return TokenChoice.parse(value)
    return TokenChoice(positions=numbers(where, value, "token"))
