"""Which sites and which tokens a harvest keeps: `--layers`, `--streams`, `--tokens` and `--text-tokens`, settled against the model."""

from harvest.models.architectures import FLUX, Architecture, said
from harvest.models.model import Geometry
from harvest.settings import HarvestSettings
from store.errors import UsageError
from store.format import StreamTokens
from store.sites import Kind, Site, Stream, parse_numbers
from store.tokens import image_policy, joint_policy, text_policy

KIND_OF: dict[Stream, Kind] = {"img": "double", "txt": "double", "joint": "single"}


def asked_layers(settings: HarvestSettings) -> dict[Kind, str]:
    """{kind: numbers and ranges, or all} of `--layers double:0-15,single:0-3`: a kind holds until the next; without one, double.

    `UsageError` for a kind that there is not, for one that `--streams` leaves nothing to be read of, and for single blocks whose
    output matrix `--quantize` leaves no numbers of; needs no model.
    """
    text, found, kind = settings.layers.strip(), dict[Kind, list[str]](), "double"
    for word in text.split(","):
        named, colon, numbers = word.rpartition(":")
        kind = named.strip() if colon else kind
        if kind not in ("double", "single"):
            raise UsageError(f"--layers {text!r}: write all, 0-15, double:0-15, or double:0-15,single:0-37")
        found.setdefault(kind, []).append(numbers)  # type: ignore[arg-type]  # one of the two, as just checked
    layers = {kind: ",".join(numbers) for kind, numbers in found.items()}
    kinds = tuple(layers)
    for kind in kinds:
        if not any(KIND_OF[stream] == kind for stream in asked_streams(settings, kinds)):
            remedy = (
                "add joint" if kind == "single" else "add img or txt, or name single blocks alone (--layers single:all)"
            )
            raise UsageError(
                f"--streams {settings.streams}: none of these is a stream of the {kind} blocks of --layers {text}; {remedy}"
            )
    for stream in settings.streams.split(",") if settings.streams is not None else ():
        if (kind := KIND_OF[stream]) not in layers:  # type: ignore[index]  # HarvestSettings has refused other words
            raise UsageError(
                f"--streams {settings.streams}: {stream} is read in {kind} blocks: name some, --layers {kind}:all"
            )
    if settings.quantize == "int8" and "single" in layers:
        raise UsageError(
            "--quantize int8 rounds activations too, so that what an MLP adds in a single-stream block does not follow from a matrix: "
            "leave the single blocks out of --layers, or choose nf4, int8wo or float8wo"
        )
    return layers


def asked_numbers(flag: str, text: str, count: int, what: str) -> tuple[int, ...]:
    """The numbers that a flag names, below `count`; `UsageError` with the flag's name."""
    try:
        return parse_numbers(text, count, what)
    except UsageError as error:
        raise UsageError(f"{flag} {text}: {error}") from None


def asked_streams(settings: HarvestSettings, kinds: tuple[Kind, ...]) -> tuple[Stream, ...]:
    """The streams of these kinds of blocks that `--streams` names; without it img and txt of double ones, joint of single ones."""
    asked = settings.streams.split(",") if settings.streams is not None else list(KIND_OF)
    return tuple(stream for stream in KIND_OF if stream in asked and KIND_OF[stream] in kinds)


def choose_sites(settings: HarvestSettings, geometry: Geometry, architecture: Architecture = FLUX) -> tuple[Site, ...]:
    """The sites that `--layers` and `--streams` name, stream by stream; `UsageError` for a layer that the model does not have.

    A site that a layer lacks (the text of SD3's last block) is left out, and refused where nothing else is left.
    """
    counts: dict[Kind, int] = {"double": geometry.double_blocks, "single": geometry.single_blocks}
    layers = {kind: _numbers(settings, kind, text, counts[kind]) for kind, text in asked_layers(settings).items()}
    there = set(architecture.sites(counts))
    wanted = [
        Site(KIND_OF[stream], layer, stream)
        for stream in asked_streams(settings, tuple(layers))
        for layer in layers[KIND_OF[stream]]
    ]
    chosen = tuple(site for site in wanted if site in there)
    if not chosen:
        raise UsageError(f"{settings.model} has no {', '.join(map(str, wanted))}: choose other --layers or --streams")
    return chosen


def _numbers(settings: HarvestSettings, kind: Kind, text: str, count: int) -> tuple[int, ...]:
    there = f"{settings.model} has {said(kind, count)}"
    if not count:
        raise UsageError(f"--layers {settings.layers!r}: {there}")
    try:
        return parse_numbers(text, count, "layer")
    except UsageError as error:
        name = "" if kind == "double" else f"{kind}:"
        raise UsageError(
            f"--layers {settings.layers!r}: {error}. {there}: write --layers {name}all or --layers {name}0-{count - 1}"
        ) from None


def token_policies(
    settings: HarvestSettings, sites: tuple[Site, ...], image_tokens: int, length: int, longest: int
) -> dict[Stream, StreamTokens]:
    """What is kept of each stream that has a site: of `image_tokens`, and of `length` text places, `longest` of them used at most.

    A joint stream has both, text first, and keeps of each what the streams of double blocks keep.
    """
    policies: dict[Stream, StreamTokens] = {}
    for stream in dict.fromkeys(site.stream for site in sites):
        if stream == "img":
            policies[stream] = image_policy(settings.tokens, image_tokens)
        elif stream == "txt":
            policies[stream] = text_policy(settings.text_tokens, length, longest)
        else:
            policies[stream] = joint_policy(
                text_policy(settings.text_tokens, length, longest), image_policy(settings.tokens, image_tokens)
            )
    return policies


def reads_text(settings: HarvestSettings) -> bool:
    """Whether a stream that has text tokens is kept."""
    return any(stream != "img" for stream in asked_streams(settings, tuple(asked_layers(settings))))
