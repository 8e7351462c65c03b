"""mlp_out from mlp_in, where a store or pack does not hold it: the site's own MLP, in float32.

    mlp_out = W2 gelu_tanh(W1 mlp_in + b1) + b2        net.0.proj, net.2 of diffusers' FeedForward
    mlp_out = W2 gelu_tanh(W1 mlp_in + b1)             proj_mlp and the MLP's columns of proj_out, of a single-stream block

Half the bytes for 7 % of a training step (measured at d_model 768 and 16 features a channel).  The result is not rounded to
the store's dtype: on tiny-flux, computed in float32 and stored in bfloat16, recomputed rows are 0.08 to 0.16 % (RMS) off what
the model wrote, stored ones 0.16 to 0.17 %.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from store.errors import DamagedError, ForeignError, UsageError
from store.shards import Pack
from store.sites import POINTS, Point, Site

ROWS_AT_ONCE = 1024
"""rows of the hidden layer held at once: 50 MB at d_model 3072"""
ROWS_ON_DEVICE = 8192
"""the same where the products of 1024 rows are too small to keep the device busy: 400 MB at d_model 3072"""


class SiteMLP:
    """The MLP of one site, float32, without gradients."""

    def __init__(self, content: bytes, where: str, d_model: int) -> None:
        """From the bytes of a weights file; `where` names it.  `DamagedError` for no safetensors, `ForeignError` for no such MLP."""
        try:
            tensors = safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise DamagedError(f"{where} is no readable safetensors file ({error})") from None
        shapes = {
            "net.0.proj.weight": (4 * d_model, d_model), "net.0.proj.bias": (4 * d_model,),
            "net.2.weight": (d_model, 4 * d_model), "net.2.bias": (d_model,),
        }  # fmt: skip
        fused = {
            "proj_mlp.weight": (4 * d_model, d_model), "proj_mlp.bias": (4 * d_model,),
            "proj_out.weight": (d_model, 4 * d_model),
        }  # fmt: skip
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found not in (shapes, fused):
            raise ForeignError(f"{where} is not the MLP of a block of width {d_model}: it holds {found}")
        self.into, self.into_bias, self.out, *bias = (
            tensors[name].float() for name in (fused if found == fused else shapes)
        )
        self.out_bias: Tensor | None = bias[0] if bias else None

    def to(self, device: torch.device) -> "SiteMLP":
        """This MLP, its matrices on another device."""
        self.into, self.into_bias, self.out = (tensor.to(device) for tensor in (self.into, self.into_bias, self.out))
        self.out_bias = None if self.out_bias is None else self.out_bias.to(device)
        return self

    @torch.no_grad()
    def mlp_out(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What the MLP writes for what it reads."""
        at_once = ROWS_AT_ONCE if x.device.type == "cpu" else ROWS_ON_DEVICE
        with torch.autocast(x.device.type, enabled=False), tensor_float_32(x.device):
            rows = [self._block(block) for block in torch.split(x.float(), at_once)]
        return torch.cat(rows) if len(rows) != 1 else rows[0]

    def _block(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(functional.linear(x, self.into, self.into_bias), approximate="tanh")
        return functional.linear(hidden, self.out, self.out_bias)


class Recompute:
    """The points of one site of a pack, float32 on a device: converted from a column, or computed from `mlp_in`."""

    def __init__(self, pack: Pack, site: Site, device: torch.device | str = "cpu") -> None:
        """`UsageError` for a pack without the site; `DamagedError` where the MLP that it needs is missing or cut off."""
        pack.require(site)
        pack.check_weights(site)
        self.pack, self.site, self.device = pack, site, torch.device(device)
        self._mlp: SiteMLP | None = None

    def columns(self, points: Sequence[Point]) -> tuple[Point, ...]:
        """The columns to read for `points`; `UsageError` for a point that can neither be read nor computed."""
        self.pack.require(self.site, *points)
        needed = {point if point in self.pack.points else "mlp_in" for point in points}
        return tuple(point for point in POINTS if point in needed)

    def point(self, point: Point, columns: Mapping[Point, Tensor]) -> Float[Tensor, "row d_model"]:
        """One point of the rows whose columns these are, float32, where the columns lie; `UsageError` for one they do not give."""
        if point in columns:
            return columns[point].float()
        if point not in points_given(tuple(columns), self.pack.recomputed and "mlp_in" in columns):
            raise UsageError(f"rows read for {', '.join(columns)} do not give {point}: name it when they are asked for")
        return self.mlp.mlp_out(columns["mlp_in"])

    def points(self, columns: Mapping[Point, Tensor]) -> dict[Point, Float[Tensor, "row d_model"]]:
        """Every point that the columns give, recomputed ones included: float32, on this device."""
        there = {point: column.to(self.device) for point, column in columns.items()}
        given = points_given(tuple(there), self.pack.recomputed and "mlp_in" in there)
        return {point: self.point(point, there) for point in given}

    @property
    def mlp(self) -> SiteMLP:
        """The MLP of the site, read when it is first needed."""
        if self._mlp is None:
            content = self.pack.weights_file(self.site)
            self._mlp = mlp_of(content, self.site, self.pack.d_model, str(self.pack.path)).to(self.device)
        return self._mlp

    def release(self) -> None:
        """Let go of the MLP; it is read again when it is needed again."""
        self._mlp = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_mlp": None}  # a process that gets a copy reads it for itself


@contextmanager
def tensor_float_32(device: torch.device) -> Iterator[None]:
    """On CUDA, products of float32 matrices from factors with 10 bits behind the point, sums in float32; elsewhere nothing.

    bfloat16 (8 bits, rows and FLUX's weights alike) passes unchanged, so that only the hidden layer is rounded, to an eighth of
    what the model itself rounded it to.  At d_model 3072 a row is 151 MFLOP: the 218,000 rows/s that an H100 trains on are half
    of its float32 peak and 7 % of this one.
    """
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def mlp_of(content: bytes | None, site: Site, d_model: int, where: str) -> SiteMLP:
    """The MLP of a site from what `weights_file` gave; `where` names the store or pack."""
    if content is None:
        raise DamagedError(
            f"{where} says that mlp_out is recomputed, but carries no MLP of {site}: take another copy, or make it again"
        )
    return SiteMLP(content, f"the MLP of {site} in {where}", d_model)


def points_given(stored: Sequence[Point], recomputed: bool) -> tuple[Point, ...]:
    """The points that can be had: those stored, and mlp_out where it is recomputed."""
    return POINTS if recomputed else tuple(stored)
