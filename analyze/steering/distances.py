"""How far the changed pictures are from the plain ones: in pixels, in structure, to the eye, in the latents, to CLIP.

| column          | what it is                                               | equal | source                                              |
|-----------------|----------------------------------------------------------|-------|-----------------------------------------------------|
| `psnr`          | 10 log10(255^2 / mean squared error of RGB), in dB       | inf   |                                                     |
| `ssim`          | structural similarity, 11-pixel Gaussian window, RGB     | 1     | Wang et al. 2004, by scikit-image                   |
| `flip`          | mean of the LDR-FLIP error map at 67 pixels a degree     | 0     | Andersson et al. 2020, by `flip-evaluator`          |
| `lpips`         | distance of AlexNet's features, weighted as people judge | 0     | Zhang et al. 2018, by `lpips`, where it is at hand  |
| `latent_cosine` | cosine of the final latents                              | 1     |                                                     |
| `latent_mse`    | mean squared difference of the final latents             | 0     |                                                     |
| `clip`          | cosine of the two pictures' CLIP embeddings              | 1     | Radford et al. 2021                                 |

LPIPS is absent where its package or weights are not here, and one line on stderr says so once.
"""

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from analyze.features.clip import Clip
from store.errors import MismatchError, NonFiniteError, UsageError
from store.files import sha256_file

LIBRARIES = ("scikit-image", "scipy", "flip-evaluator", "matplotlib")
"""whose versions could change a byte of distances and collages, besides those of `harvest.models.model.library_versions`"""
COLUMNS = ("psnr", "ssim", "flip", "lpips", "latent_cosine", "latent_mse", "clip")
"""in the order of every table"""
NEARER_IS_GREATER = frozenset({"psnr", "ssim", "latent_cosine", "clip"})
"""similarities; the other columns grow with the change"""
WINDOW = 11
"""pixels of SSIM's window: smaller pictures have no SSIM"""
Shots = Float[np.ndarray, " shot"]
Pair = tuple[UInt8[np.ndarray, "_ _ 3"], UInt8[np.ndarray, "_ _ 3"]]


def distances(
    plain: Sequence[Image.Image] | None,
    changed: Sequence[Image.Image] | None,
    plain_latents: Tensor | None = None,
    changed_latents: Tensor | None = None,
    clip: Clip | None = None,
    perceptual: bool = True,
) -> dict[str, Shots]:
    """Column -> one float64 a shot, in the order of `COLUMNS`; what was not given has no column.

    Pictures are compared pair by pair in RGB; `clip` and both latents ((shot, token, channel) or any shape, shot first) are optional.
    `perceptual=False` leaves out LPIPS and FLIP, the slow ones.  `MismatchError` for unequal numbers or sizes, `UsageError` for
    pictures under 11 pixels, `NonFiniteError` for latents that hold NaN or an infinity.
    """
    if (plain is None) != (changed is None) or (plain_latents is None) != (changed_latents is None):
        raise UsageError("distances are between two things: give pictures, or latents, of both")
    found: dict[str, Shots] = {}
    if plain is not None and changed is not None:
        _same_number("pictures", len(plain), len(changed))
        pairs = [(_pixels(one), _pixels(other)) for one, other in zip(plain, changed, strict=True)]
        found |= _of_pictures(pairs, perceptual)
    if plain_latents is not None and changed_latents is not None:
        found |= latent_distances(plain_latents, changed_latents)
    if clip is not None and plain is not None and changed is not None:
        found["clip"] = clip_similarity(clip, plain, changed)
    return {name: found[name] for name in COLUMNS if name in found}


def columns_at_hand(pictures: bool = True, latents: bool = True, clip: bool = False) -> tuple[str, ...]:
    """The columns that `distances` will have here, known before anything is drawn."""
    absent = {"lpips"} if _lpips_weights() is None else set()
    absent |= {"psnr", "ssim", "flip", "lpips"} if not pictures else set()
    absent |= {"latent_cosine", "latent_mse"} if not latents else set()
    absent |= {"clip"} if not (clip and pictures) else set()
    return tuple(name for name in COLUMNS if name not in absent)


def say_what_is_absent() -> None:
    """Nothing, or once a process a line on stderr; for callers who want it before a progress bar."""
    if _lpips_weights() is None:
        _say_once(
            "no LPIPS: it takes the package lpips and AlexNet's weights in torch's cache, and one of them is not here"
        )


def typical(columns: Mapping[str, Shots]) -> dict[str, float]:
    """The median of every column over its shots (a median, because the PSNR of equal pictures is infinite); NaN of no shots."""
    return {name: _median(values) for name, values in columns.items()}


def _median(values: Shots) -> float:
    """The median, also where some or all values are infinite (NumPy's is NaN between inf and inf)."""
    if len(values) == 0:
        return float("nan")
    ordered = np.sort(values)
    low, high = ordered[(len(values) - 1) // 2], ordered[len(values) // 2]
    return float(low if low == high else (low + high) / 2)


def psnr(plain: UInt8[np.ndarray, "y x 3"], changed: UInt8[np.ndarray, "y x 3"]) -> float:
    """Peak signal to noise ratio in dB over all pixels and channels, the peak being 255; inf for equal pictures."""
    error = float(np.mean((plain.astype(np.float64) - changed.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def ssim(plain: UInt8[np.ndarray, "y x 3"], changed: UInt8[np.ndarray, "y x 3"]) -> float:
    """Structural similarity as its authors compute it: a Gaussian window of sigma 1.5, population covariance, mean over channels."""
    from skimage.metrics import structural_similarity

    if min(plain.shape[:2]) < WINDOW:
        raise UsageError(
            f"pictures of {plain.shape[1]} x {plain.shape[0]} pixels have no SSIM: its window takes {WINDOW} x {WINDOW}"
        )
    found = structural_similarity(
        plain, changed, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return float(found)


def flip_map(plain: UInt8[np.ndarray, "y x 3"], changed: UInt8[np.ndarray, "y x 3"]) -> Float[np.ndarray, "y x"]:
    """LDR-FLIP's error at each pixel, 0 to 1, at the tool's own viewing distance (67.02 pixels a degree)."""
    import flip_evaluator

    one, other = (np.ascontiguousarray(picture, np.float32) / np.float32(255) for picture in (plain, changed))
    found, _, _ = flip_evaluator.evaluate(one, other, "LDR", applyMagma=False, computeMeanError=False)
    return np.asarray(found, np.float64)[:, :, 0]


def latent_distances(plain: Float[Tensor, "..."], changed: Float[Tensor, "..."]) -> dict[str, Shots]:
    """`latent_cosine` and `latent_mse` of final latents, each shot flattened, in float64; exactly 1 and 0 for equal ones."""
    if plain.shape != changed.shape:
        raise MismatchError(
            f"latents of shape {tuple(changed.shape)} are not those of {tuple(plain.shape)}: draw both with the same settings"
        )
    one, other = (latents.detach().cpu().to(torch.float64).flatten(1) for latents in (plain, changed))
    if not bool(torch.isfinite(one).all() and torch.isfinite(other).all()):
        raise NonFiniteError("the latents hold a NaN or an infinity: the intervention is too strong for the model")
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=1, eps=1e-30)
    equal = (one == other).all(1)
    cosine = torch.where(equal, torch.ones_like(cosine), cosine)  # rounding leaves 1 - 1e-16
    return {"latent_cosine": cosine.numpy(), "latent_mse": ((one - other) ** 2).mean(1).numpy()}


def clip_similarity(clip: Clip, plain: Sequence[Image.Image], changed: Sequence[Image.Image]) -> Shots:
    """The cosine of the CLIP embeddings of each pair of pictures, float64."""
    one, other = unit_embeddings(clip, plain), unit_embeddings(clip, changed)
    return np.asarray(np.clip((one * other).sum(1), -1, 1))


def unit_embeddings(clip: Clip, pictures: Sequence[Image.Image], batch: int = 32) -> Float[np.ndarray, "image dim"]:
    """CLIP embeddings of length 1 in float64, so that their products are cosines."""
    if not pictures:
        return np.zeros((0, 0))
    parts = [clip.embed(list(pictures[start : start + batch])) for start in range(0, len(pictures), batch)]
    values = np.concatenate(parts).astype(np.float64)
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True))


def measured_by() -> tuple[dict[str, str], dict[str, str] | None]:
    """Versions of the libraries that pictures are drawn, compared and shown with; and LPIPS's version and weights, or None."""
    from harvest.models.model import library_versions

    weights = _lpips_weights()
    lpips = None if weights is None else {"version": version("lpips"), "weights_sha256": _hash_of(weights)}
    return library_versions() | {name: version(name) for name in LIBRARIES}, lpips


@cache
def _hash_of(path: Path) -> str:
    return sha256_file(path)


def _of_pictures(pairs: Sequence[Pair], perceptual: bool) -> dict[str, Shots]:
    for one, other in pairs:
        if one.shape != other.shape:
            raise MismatchError(
                f"a picture of {other.shape[1]} x {other.shape[0]} pixels cannot be compared with one of "
                f"{one.shape[1]} x {one.shape[0]}: draw both at the same resolution"
            )
    found = {"psnr": _each(psnr(*pair) for pair in pairs), "ssim": _each(ssim(*pair) for pair in pairs)}
    if not perceptual:
        return found
    # the mean is ours: the library's own adds up in the order of its threads
    found["flip"] = _each(float(flip_map(*pair).mean()) for pair in pairs)
    if _lpips_weights() is None:
        _say_once(
            "no LPIPS: it takes the package lpips and AlexNet's weights in torch's cache, and one of them is not here"
        )
    else:
        found["lpips"] = _lpips(pairs)
    return found


def _each(values: Any) -> Shots:
    return np.fromiter(values, np.float64)


def _pixels(picture: Image.Image) -> UInt8[np.ndarray, "y x 3"]:
    return np.asarray(picture.convert("RGB"))


def _same_number(what: str, plain: int, changed: int) -> None:
    if plain != changed:
        raise MismatchError(f"{plain} plain {what} and {changed} changed ones: distances are between pairs of a shot")


def _lpips_weights() -> Path | None:
    """AlexNet's weights in torch's cache, where the package lpips can read them without a network; None where one of both is absent."""
    if importlib.util.find_spec("lpips") is None:
        return None
    there = sorted((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-*.pth"))
    return there[0] if there else None


def _lpips(pairs: Sequence[Pair]) -> Shots:
    model = _lpips_model()

    def tensor(picture: UInt8[np.ndarray, "y x 3"]) -> Tensor:
        return torch.from_numpy(picture.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]

    with torch.inference_mode():
        return _each(float(model(tensor(one), tensor(other)).item()) for one, other in pairs)


@cache
def _lpips_model() -> Any:
    return importlib.import_module("lpips").LPIPS(net="alex", verbose=False).eval()


@cache
def _say_once(text: str) -> None:
    print(f"distances: {text}", file=sys.stderr, flush=True)
