"""What one traced image and step left behind, block by block, as tensors.

A trace holds what the frozen linear model needs, so that FLUX is not run (DESIGN section 6): residuals, attention outputs, queries and
keys, MLP inputs and outputs, inverse standard deviations, modulations.  Blocks are read when they are asked for and not kept here:
`terms.Block` keeps the little that a sweep needs of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from store import Store
from store.errors import DamagedError, MismatchError, UsageError
from store.sites import Stream
from train.rows.tensors import to_torch

STREAMS: tuple[Stream, Stream] = ("txt", "img")
"""in the order of the joint sequence: text tokens first"""
PROJECTIONS: dict[Stream, tuple[str, str]] = {"txt": ("add_v_proj", "to_add_out"), "img": ("to_v", "to_out.0")}
"""what the value and the output projection of a stream are called"""
PER_TOKEN = ("resid", "attn", "mlp_in", "mlp_out")
VECTORS = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")


@runtime_checkable
class TraceSource(Protocol):
    """Where blocks come from: a store, or arrays that a test made."""

    @property
    def n_blocks(self) -> int:
        """How many double blocks were traced: 0 to n_blocks - 1."""

    @property
    def sigma(self) -> float:
        """What the transformer was called with at this step."""

    def block(self, layer: int) -> Mapping[str, np.ndarray]:
        """The arrays of one block, as store/FORMAT.md names them: `resid.img` (token, d_model), `q` (token, head, d_head), ..."""

    def weights(self, layer: int) -> Mapping[str, np.ndarray]:
        """`to_v`, `add_v_proj`, `to_out.0`, `to_add_out` of one block, each `.weight` (out, in) and `.bias` where it has one."""


@dataclass(frozen=True)
class StoredTrace:
    """The trace of one image and step in a store."""

    store: Store
    image: int
    step: int
    n_blocks: int
    sigma: float

    def block(self, layer: int) -> Mapping[str, np.ndarray]:
        """The arrays of one block; mlp_in and mlp_out come from the activations where the store keeps them there."""
        return self.store.trace_block(self.image, self.step, layer)

    def weights(self, layer: int) -> Mapping[str, np.ndarray]:
        """The value and output matrices of one block."""
        return self.store.trace_weights(layer)


def stored_trace(store: Store, image: int, step: int) -> StoredTrace:
    """The trace of one image and step; `UsageError` says what was traced when nothing, or this image or step, was not."""
    traced = store.traced
    if traced is None:
        raise UsageError(
            f"{store.path} holds no traces: harvest it with --trace --trace-images {image} --trace-steps {step}"
        )
    for what, wanted, there in (("image", image, traced.images), ("step", step, traced.steps)):
        if wanted not in there:
            raise UsageError(
                f"{what} {wanted} was not traced in {store.path}; it has {what}s {', '.join(map(str, there))}: choose one of them"
            )
    blocks = tuple(traced.blocks)
    if blocks != tuple(range(len(blocks))):
        raise MismatchError(
            f"{store.path} traces blocks {blocks}; a graph needs every block from 0 on: harvest it again"
        )
    sigma = float(store.prompt_columns("sigma")["sigma"][image].as_py()[step])
    return StoredTrace(store, image, step, len(blocks), sigma)


class Trace:
    """A trace on a device in one dtype, read a block at a time."""

    def __init__(
        self,
        source: TraceSource,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
        n_blocks: int | None = None,
    ) -> None:
        """`n_blocks`: how many blocks matter, from block 0 on; default: all that were traced."""
        self.source, self.dtype, self.device = source, dtype, torch.device(device)
        self.n_blocks = source.n_blocks if n_blocks is None else min(n_blocks, source.n_blocks)
        self.sigma = float(source.sigma)
        self._read: dict[int, Mapping[str, np.ndarray]] = {}
        self._weights: dict[int, Mapping[str, np.ndarray]] = {}
        if self.n_blocks < 1:
            raise UsageError("this trace has no blocks: harvest it again with --trace")

    @property
    def tokens(self) -> dict[Stream, int]:
        """How many tokens each stream has, text first."""
        return {stream: self._shapes[f"resid.{stream}"][0] for stream in STREAMS}

    @property
    def d_model(self) -> int:
        """Width of the residual."""
        return self._shapes["resid.img"][1]

    @property
    def heads(self) -> tuple[int, int]:
        """Heads, and the width of each."""
        _, heads, d_head = self._shapes["q"]
        return heads, d_head

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays of the highest block, which is the first to be prepared."""
        return {name: array.shape for name, array in self._arrays(self.n_blocks - 1).items()}

    def block(self, layer: int) -> dict[str, Tensor]:
        """Every array of one block, in the trace's dtype; `DamagedError` when one is missing or has another shape."""
        arrays = self._arrays(layer)
        joint, (heads, d_head) = sum(self.tokens.values()), self.heads
        shapes: dict[str, tuple[int, ...]] = {"q": (joint, heads, d_head), "k": (joint, heads, d_head)}
        for stream, tokens in self.tokens.items():
            shapes |= {f"{name}.{stream}": (tokens, self.d_model) for name in PER_TOKEN}
            shapes |= {f"{name}.{stream}": (tokens,) for name in ("r1", "r2")}
            shapes |= {f"{name}.{stream}": (self.d_model,) for name in VECTORS}
        for name, shape in shapes.items():
            found = arrays[name].shape if name in arrays else None
            if found != shape:
                raise DamagedError(
                    f"block {layer} of the trace: {name} is {found or 'missing'}, expected {shape}: verify the store"
                )
        wanted = [*shapes, *(f"resid_out.{stream}" for stream in STREAMS if f"resid_out.{stream}" in arrays)]
        return {name: self._tensor(arrays[name]) for name in wanted}

    def entering(self, layer: int) -> dict[Stream, Tensor] | None:
        """The residual that enters a block; past the last that was traced what leaves it, None where the trace does not hold that."""
        if layer < self.source.n_blocks:
            arrays, name = self._arrays(layer), "resid"
        else:
            arrays, name = self._arrays(layer - 1), "resid_out"
        if f"{name}.img" not in arrays:
            return None
        return {stream: self._tensor(arrays[f"{name}.{stream}"]) for stream in STREAMS}

    def projection(self, layer: int, name: str) -> tuple[Tensor, Tensor]:
        """Weight (out, in) and bias (out,) of one projection of a block; zeros where it has no bias."""
        if layer not in self._weights:  # a block has four
            self._weights = {layer: self.source.weights(layer)}
        arrays = self._weights[layer]
        weight = self._tensor(arrays[f"{name}.weight"])
        bias = arrays.get(f"{name}.bias")
        return weight, weight.new_zeros(len(weight)) if bias is None else self._tensor(bias)

    def _arrays(self, layer: int) -> Mapping[str, np.ndarray]:
        """The arrays of a block; those of its neighbours are kept, for a block is prepared with the one above it, going down."""
        found = self._read.get(layer) or self.source.block(layer)
        self._read = {other: arrays for other, arrays in self._read.items() if abs(other - layer) == 1} | {layer: found}
        return found

    def _tensor(self, values: np.ndarray) -> Tensor:
        return to_torch(values).to(self.device, self.dtype)
