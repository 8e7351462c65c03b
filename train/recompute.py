"""mlp_out from mlp_in, where a store or pack does not hold it: the site's own MLP, in float32.

    mlp_out = W2 gelu_tanh(W1 mlp_in + b1) + b2        net.0.proj, net.2 of diffusers' FeedForward

Half the bytes for 7 % of a training step (measured at d_model 768 and 16 features a channel).  The result is not rounded to
the store's dtype: on tiny-flux, computed in float32 and stored in bfloat16, recomputed rows are 0.08 to 0.16 % (RMS) off what
the model wrote, stored ones 0.16 to 0.17 %.
"""

from collections.abc import Sequence

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from store.errors import DamagedError, ForeignError
from store.shards import Pack
from store.sites import POINTS, Point, Site

ROWS_AT_ONCE = 1024
"""rows of the hidden layer held at once: 50 MB at d_model 3072"""


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
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != shapes:
            raise ForeignError(f"{where} is not the MLP of a block of width {d_model}: it holds {found}")
        self.into, self.into_bias, self.out, self.out_bias = (tensors[name].float() for name in shapes)

    @torch.no_grad()
    def mlp_out(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What the MLP writes for what it reads."""
        with torch.autocast(x.device.type, enabled=False):
            rows = [self._block(block) for block in torch.split(x.float(), ROWS_AT_ONCE)]
        return torch.cat(rows) if rows else x.float()

    def _block(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(functional.linear(x, self.into, self.into_bias), approximate="tanh")
        return functional.linear(hidden, self.out, self.out_bias)


class PackPoints:
    """x and y of one site of a pack for a dictionary: columns, or what is computed from them."""

    def __init__(self, pack: Pack, site: Site, input_point: Point, target_point: Point) -> None:
        pack.require(site, input_point, target_point)
        self.pack, self.site = pack, site
        self.wanted = input_point, target_point
        self.computes = any(point not in pack.points for point in self.wanted)
        self._mlp: SiteMLP | None = None
        if self.computes:
            pack.check_weights(site)

    @property
    def columns(self) -> tuple[Point, Point]:
        """The columns to read for x and y."""
        return ("mlp_in", "mlp_in") if self.computes else self.wanted

    def pair(self, x: Tensor, y: Tensor) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_model"]]:
        """x and y in float32, from rows of those columns; one tensor where both are one point."""
        x = x.float()
        if not self.computes:
            return x, x if self.wanted[0] == self.wanted[1] else y.float()
        if self._mlp is None:
            self._mlp = mlp_of(self.pack.weights_file(self.site), self.site, self.pack.d_model, str(self.pack.path))
        computed = {"mlp_in": x, "mlp_out": self._mlp.mlp_out(x)}
        return computed[self.wanted[0]], computed[self.wanted[1]]

    def release(self) -> None:
        """Let go of the MLP; it is read again when it is needed again."""
        self._mlp = None


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
