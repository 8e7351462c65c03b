"""Distances between pictures against hand-written formulas and published values, and collages that show what they are given."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from analyze.features.clip import Clip
from analyze.pictures.drawing import font, png_bytes
from analyze.steering import distances as module
from analyze.steering.collages import LABEL_WIDTH, broken, cell_size, differences, grid
from analyze.steering.distances import COLUMNS, columns_at_hand, distances, flip_map, psnr, ssim, typical
from store.errors import MismatchError, NonFiniteError, UsageError

Colour = tuple[int, int, int]


def picture(seed: int = 0, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """Noise of (width, height)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def flat(colour: Colour, size: tuple[int, int] = (24, 24)) -> Image.Image:
    return Image.new("RGB", size, colour)


class Halves(Clip):
    """Embeds a picture as the means of its left and right half."""

    def embed(self, pictures: object) -> np.ndarray:
        halves = [np.array_split(np.asarray(one, np.float32), 2, axis=1) for one in pictures]  # type: ignore[attr-defined]
        return np.array([[half.mean() for half in pair] for pair in halves], np.float32)


def test_equal_pictures_and_latents_are_at_no_distance() -> None:
    pictures, latents = [picture(1), picture(2)], torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    found = distances(pictures, pictures, latents, latents.clone(), Halves(None, None, "halves", "0"))
    exact = {"psnr": np.inf, "ssim": 1, "flip": 0, "latent_cosine": 1, "latent_mse": 0, "clip": pytest.approx(1)}
    assert {name: values.tolist() for name, values in found.items()} == {name: [v, v] for name, v in exact.items()}
    assert list(found) == [name for name in COLUMNS if name in found]
    assert tuple(found) == columns_at_hand(clip=True)


def test_psnr_is_the_published_number_of_decibels() -> None:
    grey = np.full((16, 16, 3), 100, np.uint8)
    assert psnr(grey, grey + 1) == pytest.approx(48.1308036, abs=1e-6)  # 20 log10 255: an error of 1 everywhere
    black, white = np.zeros_like(grey), np.full_like(grey, 255)
    assert psnr(black, white) == 0
    one, other = (np.asarray(picture(seed)) for seed in (1, 2))
    error = sum((float(a) - float(b)) ** 2 for a, b in zip(one.ravel(), other.ravel(), strict=True)) / one.size
    assert psnr(one, other) == pytest.approx(10 * np.log10(65025 / error))


def test_ssim_is_the_formula_of_its_authors() -> None:
    """Wang et al. 2004, (13): an 11 x 11 Gaussian window of sigma 1.5, C1 = (0.01 L)^2, C2 = (0.03 L)^2, means over windows inside."""
    one, other = np.asarray(picture(3)).astype(float), np.asarray(picture(4)).astype(float)
    other = 0.6 * one + 0.4 * other
    one, other = np.round(one), np.round(other)
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    found = []
    for y in range(one.shape[0] - 10):
        for x in range(one.shape[1] - 10):
            for channel in range(3):
                a, b = (of[y : y + 11, x : x + 11, channel] for of in (one, other))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                both = (window * (a - mean_a) * (b - mean_b)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                above = (2 * mean_a * mean_b + c1) * (2 * both + c2)
                found.append(above / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    assert ssim(one.astype(np.uint8), other.astype(np.uint8)) == pytest.approx(np.mean(found), abs=1e-9)


def flat_flip(one: Colour, other: Colour) -> float:
    """LDR-FLIP between two flat pictures: no edges, and filters leave a constant alone, so only the colours' distance is left.

    Andersson et al. 2020, section 4.1: HyAB distance of Hunt-adjusted L*a*b*, to the power 0.7, of that between green and blue; the first
    40 % of the range are drawn out to 95 %.
    """
    to_xyz = np.array(
        [
            [10135552 / 24577794, 8788810 / 24577794, 4435075 / 24577794],
            [2613072 / 12288897, 8788810 / 12288897, 887015 / 12288897],
            [1425312 / 73733382, 8788810 / 73733382, 70074185 / 73733382],
        ]
    )

    def hunt(colour: Colour) -> np.ndarray:
        c = np.array(colour) / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        t = (to_xyz @ linear) / to_xyz.sum(1)
        f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
        lightness = 116 * f[1] - 16
        return np.array([lightness, *(0.01 * lightness * np.array([500 * (f[0] - f[1]), 200 * (f[1] - f[2])]))])

    def apart(a: Colour, b: Colour) -> float:
        x, y = hunt(a), hunt(b)
        return float((abs(x[0] - y[0]) + np.hypot(*(x[1:] - y[1:]))) ** 0.7)

    most = apart((0, 255, 0), (0, 0, 255))
    share = apart(one, other) / most
    return share * 0.95 / 0.4 if share < 0.4 else 0.95 + 0.05 * (share - 0.4) / 0.6


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, 255, 0), (0, 0, 255)),
        ((0, 0, 0), (255, 255, 255)),
        ((200, 30, 30), (30, 200, 60)),
        ((90, 90, 90), (96, 90, 90)),
        ((255, 0, 0), (250, 120, 10)),
    ],
)
def test_flip_of_flat_pictures_is_the_published_formula(one: Colour, other: Colour) -> None:
    found = flip_map(*(np.asarray(flat(colour)) for colour in (one, other)))
    assert found == pytest.approx(flat_flip(one, other), abs=2e-4)


def test_flip_is_1_between_green_and_blue_and_lies_between_0_and_1() -> None:
    assert flip_map(np.asarray(flat((0, 255, 0))), np.asarray(flat((0, 0, 255)))) == pytest.approx(1, abs=1e-4)
    noise = flip_map(np.asarray(picture(1)), np.asarray(picture(2)))
    assert noise.shape == (16, 20) and noise.min() > 0 and noise.max() <= 1


def test_a_larger_change_is_further_away_in_every_column() -> None:
    plain, noise = (
        np.asarray(picture(5, (32, 32))).astype(float) / 2 + 64,
        np.asarray(picture(6, (32, 32))).astype(float),
    )
    changed = [Image.fromarray(np.uint8(plain + share * (noise - plain))) for share in (0.05, 0.2, 0.8)]
    found = distances([Image.fromarray(np.uint8(plain))] * 3, changed)
    assert (np.diff(found["psnr"]) < 0).all() and (np.diff(found["ssim"]) < 0).all()
    assert (np.diff(found["flip"]) > 0).all()


def test_latents_are_compared_shot_by_shot_in_float64() -> None:
    plain = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
    changed = torch.tensor([[[4.0, 0.0], [0.0, 3.0]], [[-1.0, -1.0], [-1.0, 1.0]]])
    found = distances(None, None, plain, changed)
    assert found["latent_cosine"].tolist() == pytest.approx([24 / 25, -0.5])
    assert found["latent_mse"].tolist() == pytest.approx([0.5, 3.0])
    assert set(found) == {"latent_cosine", "latent_mse"} == set(columns_at_hand(pictures=False, clip=True))
    tiny = torch.full((1, 2, 2), 1e-15)
    assert module.latent_distances(tiny, tiny)["latent_cosine"].item() == 1
    assert module.latent_distances(tiny, torch.zeros(1, 2, 2))["latent_cosine"].item() == 0


def test_clip_is_the_cosine_of_the_embeddings() -> None:
    left = Image.fromarray(np.hstack([np.full((12, 6, 3), 200, np.uint8), np.zeros((12, 6, 3), np.uint8)]))
    both = flat((100, 100, 100), (12, 12))
    found = distances([left], [both], clip=Halves(None, None, "halves", "0"))
    assert found["clip"].tolist() == pytest.approx([np.sqrt(0.5)])


def test_medians_hold_with_infinite_decibels() -> None:
    columns = {"psnr": np.array([np.inf, np.inf, 20.0]), "ssim": np.array([1.0, 0.5]), "flip": np.array([])}
    found = typical(columns)
    assert (found["psnr"], found["ssim"]) == (np.inf, 0.75) and np.isnan(found["flip"])
    assert typical({"psnr": np.full(4, np.inf)})["psnr"] == np.inf


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(MismatchError, match="1 plain pictures and 2 changed"):
        distances([picture()], [picture(), picture()])
    with pytest.raises(MismatchError, match="20 x 16 pixels cannot be compared with one of 24 x 24"):
        distances([flat((0, 0, 0))], [picture()])
    with pytest.raises(UsageError, match="between two things"):
        distances([picture()], None)
    with pytest.raises(UsageError, match="8 x 8 pixels have no SSIM"):
        distances([flat((0, 0, 0), (8, 8))], [flat((0, 0, 0), (8, 8))])
    with pytest.raises(MismatchError, match="latents of shape"):
        distances(None, None, torch.zeros(1, 2, 2), torch.zeros(1, 2, 3))
    with pytest.raises(NonFiniteError, match="too strong"):
        distances(None, None, torch.zeros(1, 2, 2), torch.full((1, 2, 2), torch.nan))


LPIPS = """
class LPIPS:
    def __init__(self, net, verbose): assert net == "alex"
    def eval(self): return self
    def __call__(self, one, other):
        assert one.shape[:2] == (1, 3) and one.min() >= -1 and one.max() <= 1
        return (one - other).abs().mean()
"""


def test_lpips_is_there_with_its_package_and_weights_and_else_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for cached in (module._say_once, module._lpips_model):
        cached.cache_clear()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    pair = [flat((0, 0, 0))], [flat((255, 255, 255))]
    assert "lpips" not in distances(*pair) and "lpips" not in distances(*pair) and "lpips" not in columns_at_hand()
    assert capsys.readouterr().err.count("no LPIPS") == 1
    (tmp_path / "lpips").mkdir()
    (tmp_path / "lpips" / "__init__.py").write_text(LPIPS)
    monkeypatch.syspath_prepend(tmp_path)
    assert "lpips" not in distances(*pair)  # the package alone would fetch the weights
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "torch" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    found = distances(*pair)
    assert found["lpips"].tolist() == [2.0] and "lpips" in columns_at_hand()
    assert list(found) == ["psnr", "ssim", "flip", "lpips"]
    monkeypatch.delitem(sys.modules, "lpips")
    module._lpips_model.cache_clear()


def test_a_grid_shows_every_picture_in_its_place_at_a_readable_size() -> None:
    colours = [[(250, 0, 0), (0, 250, 0)], [(0, 0, 250), None]]
    rows = [[None if colour is None else flat(colour, (64, 48)) for colour in line] for line in colours]
    made = grid(rows, ["first", "second"], ["plain", "zero"], "A title", ["a note"])
    pixels = np.asarray(made)
    assert cell_size((64, 48)) == (128, 96)
    found = {}
    for line in colours:
        for colour in line:
            if colour is not None:
                y, x = np.nonzero((pixels == colour).all(2))
                assert len(y) == 128 * 96
                found[colour] = (int(y.min()), int(x.min()))
    assert found[(250, 0, 0)][0] == found[(0, 250, 0)][0] < found[(0, 0, 250)][0]
    assert found[(250, 0, 0)][1] == found[(0, 0, 250)][1] < found[(0, 250, 0)][1]
    assert png_bytes(made) == png_bytes(grid(rows, ["first", "second"], ["plain", "zero"], "A title", ["a note"]))


@pytest.mark.parametrize(
    ("picture_size", "side", "cell"),
    [
        ((64, 64), None, (128, 128)),
        ((32, 64), None, (64, 128)),
        ((512, 512), None, (256, 256)),
        ((1024, 512), None, (256, 128)),
        ((512, 512), 100, (100, 100)),
        ((160, 160), None, (160, 160)),
    ],
)
def test_cells_have_a_readable_size_and_the_pictures_proportions(
    picture_size: tuple[int, int], side: int | None, cell: tuple[int, int]
) -> None:
    assert cell_size(picture_size, side) == cell


def test_differences_are_dark_where_nothing_changed_and_hot_where_it_did() -> None:
    plain = flat((40, 40, 40))
    changed = plain.copy()
    changed.paste((255, 255, 255), (0, 0, 12, 24))
    none, same, half, other_size = differences([plain, plain, changed, flat((0, 0, 0), (8, 8))])
    assert none is None and other_size is None and same is not None and half is not None
    assert np.asarray(same).max() <= 4  # the darkest of the colours
    assert np.asarray(half)[:, :12].min() > 180 and np.asarray(half)[:, 12:].max() <= 4


def test_long_labels_are_broken_inside_words_and_end_in_an_ellipsis() -> None:
    name = "amplify:4 img_3:" + ",".join(str(number) for number in range(1000, 1080)) + " @steps=2-3"
    lines = broken(name, LABEL_WIDTH, 13, most=4)
    assert len(lines) == 4 and lines[-1].endswith("…") and lines[0].startswith("amplify:4 img_3:")
    assert all(font(13).getlength(line) <= LABEL_WIDTH for line in lines)
    assert "".join(broken(name, 300, 13, most=100)).replace(" ", "") == name.replace(" ", "")
    assert all(font(13).getlength(line) <= 40 for line in broken("W" * 50, 40, 13, most=100))
    assert broken("", 100, 13) == [""]


def test_a_grid_refuses_labels_that_do_not_match_its_cells() -> None:
    cell = flat((1, 2, 3))
    for arguments, said in [
        (([], [], ["a"]), "at least one row"),
        (([[cell]], ["x", "y"], ["a"]), "as many labels, found 2"),
        (([[cell]], ["x"], ["a", "b"]), "has 1 pictures, and there are 2 columns"),
    ]:
        with pytest.raises(UsageError, match=said):
            grid(*arguments)
    with pytest.raises(UsageError, match="captions"):
        grid([[cell]], ["x"], ["a"], captions=[["one", "two"]])
    assert grid([[None]], ["x"], ["a"]).width > 160  # only empty cells
