"""Activations of one dictionary in blocks that stay in the processor's cache: some rows by some features, in one buffer.

Where the activation function judges each feature alone, the encoder's matrix is cut into panes of features.  TopK has to see a
whole row; what it keeps comes as single entries, by the kernel that training uses.
"""

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from store.errors import NonFiniteError
from train import Dictionary
from train.learning.kernels import greatest  # what is made for training imports the compiler at its first call

PANE = 2048
"""features of a pane: with 256 rows 2 MiB.  A fixed number, since the last bit of a product depends on the shapes"""
ROWS = 256
ROWS_ON_DEVICE = 8192


def panes_of(n_features: int) -> list[slice]:
    """The panes of a dictionary."""
    return [slice(first, min(first + PANE, n_features)) for first in range(0, n_features, PANE)]


def rows_at_once(device: torch.device) -> int:
    """Rows of a block: as many as stay in the cache, or keep a device busy."""
    return ROWS if device.type == "cpu" else ROWS_ON_DEVICE


DECODING = ("decoder", "skip")
"""modules that no activation depends on"""


def encoding_half(dictionary: Dictionary) -> Dictionary:
    """The dictionary without what only decodes, sharing the rest; the one that is given stays as it is."""
    half = copy.copy(dictionary)
    half._modules = {name: module for name, module in dictionary._modules.items() if name not in DECODING}
    return half


def weight_bytes(dictionary: Dictionary) -> int:
    """Bytes of what an encoder holds of a dictionary, float32."""
    return _bytes(encoding_half(dictionary))


def passing_bytes(dictionary: Dictionary) -> int:
    """Bytes of the rest of its weights, which are held while it is read."""
    return _bytes(dictionary) - weight_bytes(dictionary)


def _bytes(dictionary: Dictionary) -> int:
    return sum(4 * tensor.numel() for tensor in dictionary.state_dict().values())


class Encoder:
    """The encoding half of a dictionary on a device; several threads may use it."""

    def __init__(self, dictionary: Dictionary, device: torch.device) -> None:
        self.name, self.config, self.device = dictionary.name, dictionary.config, device
        self._dictionary = encoding_half(dictionary)
        if device.type != "cpu":
            self._dictionary = copy.deepcopy(self._dictionary).to(device)
        self._weight = self._dictionary.encoder.weight.detach()
        self._bias = self._dictionary.encoder.bias.detach()
        self._threshold: Tensor | None = None
        if self.config.activation == "jumprelu":
            self._threshold = self._dictionary.log_threshold.detach().exp()
        elif self.config.activation == "batchtopk":
            self._threshold = self._dictionary.threshold.detach()

    @property
    def by_rows(self) -> bool:
        """Whether a row's activations depend on one another, so that panes cannot be had."""
        return self.config.activation == "topk"

    def prepared(self, rows: Tensor, sigma: Float[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
        """What the encoder's matrix is applied to, float32, on the device; `rows` in the dtype of the store."""
        result = torch.empty(rows.shape, dtype=torch.float32, device=self.device)
        for first in range(0, len(rows), ROWS_ON_DEVICE):
            part = slice(first, first + ROWS_ON_DEVICE)
            result[part] = self._dictionary.prepare(rows[part].to(self.device).float(), sigma[part].to(self.device))
        return result

    def pane(
        self, x: Float[Tensor, "row d_model"], features: slice, out: Float[Tensor, "most features"]
    ) -> Float[Tensor, "row features"]:
        """z of prepared rows and the features of a pane, in the memory of `out`."""
        z = torch.addmm(self._bias[features], x, self._weight[features].T, out=out[: len(x)])
        if self.config.activation == "jumprelu":
            assert self._threshold is not None
            return z.mul_(z > self._threshold[features])
        z.clamp_min_(0)
        return z if self._threshold is None else z.mul_(z > self._threshold)

    def greatest(
        self, x: Float[Tensor, "row d_model"]
    ) -> tuple[Int[Tensor, " entry"], Int[Tensor, " entry"], Float[Tensor, " entry"]]:
        """Row, feature and z of what TopK keeps of prepared rows; zeros may be among it."""
        assert self.config.k is not None
        values, features = greatest(torch.addmm(self._bias, x, self._weight.T), self.config.k)  # as `encode_topk` does
        rows = torch.arange(len(x), device=x.device).repeat_interleave(self.config.k)
        return rows, features.flatten(), values.clamp_min_(0).flatten()

    def refuse_non_finite(self, values: Tensor) -> None:
        """`NonFiniteError` names the dictionary when an activation is NaN or infinite."""
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(
                f"{self.name} gives a NaN or an infinite activation on this store: its weights or the store's "
                "activations are damaged or overflowed; python -m store info shows the range of each site"
            )
