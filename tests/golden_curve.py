"""The recipe of record once more, slow and plain: NumPy, float64, gradients by hand, nothing of `train/`.

1. `read_rows` takes the rows of a pack out of its files, as safetensors describes them.
2. `Record` is the model: sinusoidal embedding of sigma, time MLP, modulation, ReLU features, decoder of unit columns.
3. `Record.step` is one step: the loss of record, its gradient, AdamW, the columns back to unit norm.
4. `learning_rate` is the schedule: a cosine over 256 periods of 1e6 rows each.

What the trainer logs must agree with it (`test_golden_curve.py`).  `python -m tests.golden_curve` writes the curves that are
kept in `tests/golden/curves`.
"""

import json
import math
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from store.pack import PackSettings
from store.pack import run as make_pack
from tests.toy_stores import toy_store

GOLDEN = Path(__file__).parent / "golden" / "curves"
D_MODEL, EXPANSION, WIDTH, STEPS = 8, 4, 8, 50
BATCH = {"img_0": 4096, "txt_0": 512}
LAMBDA = {"img_0": 3e-4, "txt_0": 5e-5}
LR, BETAS, EPS = 2e-4, (0.9, 0.999), 1e-8
EPSILON = 1e-6
"""added to the variance in the loss of record"""
COLUMNS = {"BF16": "<u2", "F32": "<f4"}


class Figures(NamedTuple):
    """What is logged of a step, before its weights move."""

    loss: float
    residual: float
    sparsity: float
    l0: float


class Rows(NamedTuple):
    """Rows of a site, float64."""

    x: np.ndarray
    y: np.ndarray
    sigma: np.ndarray


def packed(folder: Path) -> Path:
    """A pack of about 8,600 img rows and 2,600 txt rows that a dictionary can learn, made below `folder`."""
    store = toy_store(folder / "store", 176, ("img_0", "txt_0"), (0, 2), D_MODEL, 26, chunk_images=64, learnable=True)
    make_pack(PackSettings(store=store, out=folder / "pack"))
    return folder / "pack"


def read_rows(shard: Path) -> Rows:
    """All rows of a shard, in the order of the file."""
    content = shard.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])

    def column(name: str) -> np.ndarray:
        first, last = (8 + size + offset for offset in header[name]["data_offsets"])
        values = np.frombuffer(content[first:last], COLUMNS[header[name]["dtype"]])
        if header[name]["dtype"] == "BF16":  # the upper half of a float32
            values = (values.astype("<u4") << 16).view("<f4")
        return values.reshape(header[name]["shape"]).astype(np.float64)

    return Rows(column("mlp_in"), column("mlp_out"), column("sigma"))


def learning_rate(step: int, batch: int) -> float:
    """2e-4, falling to zero along a cosine that moves once per 1e6 rows, 256 times."""
    period = step * batch // 1_000_000
    return LR * 0.5 * (1 + math.cos(math.pi * period / 256))


def sinusoidal(sigma: np.ndarray) -> np.ndarray:
    """Sines, then cosines, of sigma times frequencies from 1 to 1/10000."""
    half = WIDTH // 2
    angles = sigma[:, None] * np.exp(-math.log(10_000) * np.arange(half) / (half - 1))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def silu(a: np.ndarray) -> np.ndarray:
    return np.asarray(a / (1 + np.exp(-a)))


def silu_slope(a: np.ndarray) -> np.ndarray:
    gate = 1 / (1 + np.exp(-a))
    return np.asarray(gate * (1 + a * (1 - gate)))


def first_weights(seed: int) -> dict[str, np.ndarray]:
    """Where training starts: the same draws as the trainer's, in float32, widened."""
    generator, features = torch.Generator().manual_seed(seed), D_MODEL * EXPANSION

    def drawn(bound: float, *shape: int) -> np.ndarray:
        return torch.empty(shape).uniform_(-bound, bound, generator=generator).double().numpy()

    decoder = drawn(math.sqrt(6 / features), D_MODEL, features)  # Kaiming-uniform for ReLU
    weights = {
        "encoder": decoder.T.copy(), "encoder_bias": np.zeros(features),
        "decoder": decoder / np.linalg.norm(decoder, axis=0), "decoder_bias": np.zeros(D_MODEL),
    }  # fmt: skip
    for layer in ("time0", "time2"):
        weights[layer] = drawn(1 / math.sqrt(WIDTH), WIDTH, WIDTH)
        weights[f"{layer}_bias"] = drawn(1 / math.sqrt(WIDTH), WIDTH)
    return weights | {"mod": np.zeros((2 * D_MODEL, WIDTH)), "mod_bias": np.zeros(2 * D_MODEL)}


@dataclass
class Moment:
    """AdamW's averages of a gradient and of its square."""

    mean: np.ndarray
    square: np.ndarray


class Record:
    """A transcoder trained by the recipe of record."""

    def __init__(self, l1: float, seed: int = 0) -> None:
        self.l1, self.taken = l1, 0
        self.weights = first_weights(seed)
        self.moments = {name: Moment(np.zeros_like(w), np.zeros_like(w)) for name, w in self.weights.items()}

    def step(self, rows: Rows, lr: float) -> Figures:
        """Take one step; the figures are those of the weights before it."""
        figures, gradients = self._gradients(rows)
        self.taken += 1
        for name, gradient in gradients.items():
            moment = self.moments[name]
            moment.mean = BETAS[0] * moment.mean + (1 - BETAS[0]) * gradient
            moment.square = BETAS[1] * moment.square + (1 - BETAS[1]) * gradient**2
            mean, square = moment.mean / (1 - BETAS[0] ** self.taken), moment.square / (1 - BETAS[1] ** self.taken)
            self.weights[name] = self.weights[name] - lr * mean / (np.sqrt(square) + EPS)
        self.weights["decoder"] /= np.linalg.norm(self.weights["decoder"], axis=0)
        return figures

    def _gradients(self, rows: Rows) -> tuple[Figures, dict[str, np.ndarray]]:
        w, (x, y, sigma) = self.weights, rows
        count = len(x)
        embedding = sinusoidal(sigma)
        inner = embedding @ w["time0"].T + w["time0_bias"]
        outer = silu(inner) @ w["time2"].T + w["time2_bias"]
        scale, shift = np.split(silu(outer) @ w["mod"].T + w["mod_bias"], 2, axis=1)
        prepared = x * (1 + scale) + shift
        pre = prepared @ w["encoder"].T + w["encoder_bias"]
        z = np.maximum(pre, 0)
        error = z @ w["decoder"].T + w["decoder_bias"] - y
        spread = ((y - y.mean(axis=0)) ** 2).mean(axis=0).sum() + EPSILON
        residual, sparsity = float((error**2).sum() / count / spread), float(np.abs(z).sum() / count)
        figures = Figures(residual + self.l1 * sparsity, residual, sparsity, float((z > 0).sum() / count))

        to_y = 2 * error / count / spread
        to_pre = (to_y @ w["decoder"] + self.l1 / count) * (pre > 0)
        to_prepared = to_pre @ w["encoder"]
        to_mod = np.concatenate([to_prepared * x, to_prepared], axis=1)
        to_outer = to_mod @ w["mod"] * silu_slope(outer)
        to_inner = to_outer @ w["time2"] * silu_slope(inner)
        linear = {
            "decoder": (to_y, z), "encoder": (to_pre, prepared), "mod": (to_mod, silu(outer)),
            "time2": (to_outer, silu(inner)), "time0": (to_inner, embedding),
        }  # fmt: skip
        gradients = {name: out.T @ into for name, (out, into) in linear.items()}
        return figures, gradients | {f"{name}_bias": out.sum(axis=0) for name, (out, _) in linear.items()}


def main() -> None:
    """Write the curves anew: only where results are meant to change."""
    from tests.test_golden_curve import trained

    with tempfile.TemporaryDirectory() as name:
        pack = packed(Path(name))
        GOLDEN.mkdir(parents=True, exist_ok=True)
        for site in BATCH:
            lines = [
                {key: line[key] for key in ("step", *Figures._fields, "lr")}
                for line in trained(pack, Path(name) / "out", site)
            ]
            (GOLDEN / f"{site}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
