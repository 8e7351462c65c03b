"""What the memory of a device must hold, and that of its host of weights, by `--offload`, `--quantize` and `--text-encoders`.

A batch is drawn in three phases: prompts are encoded, the transformer denoises, the VAE decodes.  In each phase some weights are
on the device, and the batch holds something beside them; the device must hold the greatest sum of the three.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from harvest.models.model import DTYPES
from harvest.planning.parameters import Held, Part
from harvest.settings import HarvestSettings

GIVEN_UP = 8 * 10**8
"""for the CUDA context, kernels, and what an allocator rounds up; a guess, and no formula"""


@dataclass(frozen=True)
class Way:
    """One way to fit a model on a device."""

    offload: str = "none"
    quantize: str = "none"
    text_encoders: str = "resident"

    @property
    def flags(self) -> str:
        """What to write for it."""
        flags = {"offload": "none", "quantize": "none", "text_encoders": "resident"}
        said = [
            f"--{n.replace('_', '-')} {getattr(self, n)}" for n, usual in flags.items() if getattr(self, n) != usual
        ]
        return " ".join(said) or "as it is"


WAYS = (
    Way(),
    Way(text_encoders="first"),
    Way(quantize="int8wo", text_encoders="first"),
    Way(quantize="nf4", text_encoders="first"),
    Way("model"),
    Way("group"),
    Way("sequential"),
)


def ways_of(settings: HarvestSettings) -> tuple[Way, ...]:
    """The ways that are shown, what was asked for among them."""
    asked = Way(settings.offload, settings.quantize, settings.text_encoders)
    return WAYS if asked in WAYS else (asked, *WAYS)


@dataclass(frozen=True)
class Phases:
    """Bytes of weights on the device in each phase."""

    encoding: int
    denoising: int
    decoding: int


def weights_on_device(way: Way, parts: Sequence[Part], dtype: str) -> Phases:
    """Weights that are on the device at once, by phase."""
    encoders = [part for part in parts if part.name.startswith("text_encoder")]
    transformer = next(part for part in parts if part.name == "transformer")
    others = [part for part in parts if part is not transformer and part not in encoders]
    of_transformer = transformer.weights(dtype, way.quantize)
    of_encoders = sum(part.weights(dtype) for part in encoders)
    of_others = sum(part.weights(dtype) for part in others)
    size = DTYPES[dtype].itemsize
    if way.offload == "none":
        if way.text_encoders == "first":
            return Phases(of_encoders, of_transformer + of_others, of_transformer + of_others)
        return Phases(*[of_encoders + of_transformer + of_others] * 3)
    if way.offload == "model":
        return Phases(max((part.weights(dtype) for part in encoders), default=0), of_transformer, of_others)
    layers = Phases(
        size * max((part.largest_layer for part in encoders), default=0), size * transformer.largest_layer,
        size * max((part.largest_layer for part in others), default=0),
    )  # fmt: skip
    if way.offload == "sequential":
        return layers
    blocks = transformer.blocks
    rest = transformer.parameters - sum(blocks)
    at_once = max((sum(pair) for pair in zip(blocks, [*blocks[1:], 0], strict=True)), default=0)
    return Phases(layers.encoding, size * (rest + at_once), layers.decoding)


@dataclass(frozen=True)
class HostWeights:
    """Bytes of weights in the RAM beside a device."""

    loading: int
    """at the height of loading, without mapped pages of files, which the system takes back"""
    drawing: int
    """while images are drawn"""


def weights_on_host(way: Way, parts: Sequence[Part], dtype: str, mapped: Collection[str]) -> HostWeights:
    """Weights in RAM; `mapped` names the parts whose files are in the dtype that is computed in, and are not copied for loading."""

    def whole(part: Part) -> int:
        return part.weights(dtype, way.quantize if part.name == "transformer" else "none")

    def copied(part: Part) -> int:
        quantised = part.name == "transformer" and way.quantize != "none"
        return whole(part) if quantised or part.name not in mapped else 0

    encoders = [part for part in parts if part.name.startswith("text_encoder")]
    others = [part for part in parts if part not in encoders]
    turns = [encoders, others] if way.text_encoders == "first" else [list(parts)]
    loading = max(sum(map(copied, turn)) for turn in turns)
    if way.offload == "none":
        return HostWeights(loading, 0)
    staying = sum(map(whole, turns[-1]))
    if way.offload == "group":  # all blocks are pinned before the first of them lets its own memory go
        transformer = next(part for part in parts if part.name == "transformer")
        pinned, size = transformer.pinned(dtype), DTYPES[dtype].itemsize
        staying += pinned - size * sum(transformer.blocks)
        loading = max(loading, sum(map(copied, turns[-1])) + pinned)
    return HostWeights(loading, staying)


def dequantised(way: Way, parts: Sequence[Part], dtype: str) -> int:
    """Bytes of the largest layer in the dtype that it computes in: a quantised one is widened while it computes."""
    transformer = next(part for part in parts if part.name == "transformer")
    return 0 if way.quantize == "none" else DTYPES[dtype].itemsize * transformer.largest_layer


def device_bytes(way: Way, parts: Sequence[Part], dtype: str, held: Held, staging: int) -> int | None:
    """Bytes that the device must hold with a batch that holds so much; None where the transformer's share is not known."""
    if held.denoising is None:
        return None
    weights = weights_on_device(way, parts, dtype)
    encoders_alone = way.text_encoders == "first"
    encoding = weights.encoding + held.encoding + (0 if encoders_alone else staging)
    denoising = weights.denoising + held.denoising + dequantised(way, parts, dtype) + staging
    return max(encoding, denoising, weights.decoding + held.decoding + staging) + GIVEN_UP
