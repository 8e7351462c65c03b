"""Runs of the transformer at one denoising step, from what it was called with there: plain, and with MLP outputs perturbed.

1. The picture is drawn once, up to the step, and what the transformer is called with is kept: no earlier step is done again.
2. One plain pass says what every MLP reads and writes.
3. A batch is that call repeated.  Row 0 stays as it is, every other row adds one vector to the MLP output of one token.  What
   readers (features at tokens) read is taken as the difference of each row from row 0, so that both have the same rounding.
4. A pass ends as soon as the last reader has been reached: the blocks above, and all single ones, do not matter.

With MLPs held, every MLP hands on what it did in the plain pass (and, where its transcoder has a skip path, what that path adds
to the change): a perturbation then reaches a reader through the residual stream and the attentions alone, both live.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from store.errors import GranaryError
from store.sites import Site
from store.sizes import many

if TYPE_CHECKING:
    from analyze.steering.drawing import Painter, Shot
    from harvest.capture import Captured
    from harvest.replacing import Change, Moment, Part

BATCHED = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")
"""arguments of the transformer that have a row an image"""
Places = Mapping[Site, Sequence[int]]
"""the tokens that readers read, of each site"""


class _Enough(Exception):
    """All that was wanted of a pass is there."""


@dataclass(frozen=True)
class Perturbation:
    """A vector that is added to what an MLP writes at one token."""

    site: Site
    token: int
    vector: Float[Tensor, " d_model"]


@dataclass(frozen=True)
class Call:
    """What the transformer was called with for one image at one step."""

    step: int
    arguments: Mapping[str, Any]

    @property
    def sigma(self) -> float:
        """As the transformer received it."""
        return float(self.arguments["timestep"][0].float())

    def repeated(self, rows: int, dtype: torch.dtype) -> dict[str, Any]:
        """The same for so many images, in another dtype: sigma keeps the value that it was rounded to."""
        return {
            name: value.to(dtype).expand(rows, *value.shape[1:])
            if name in BATCHED and isinstance(value, Tensor)
            else value
            for name, value in self.arguments.items()
        }


@dataclass
class Plain:
    """What the model did without a perturbation: mlp_in and mlp_out of the sites asked for, each (token, d_model), and its answer."""

    inputs: dict[Site, Float[Tensor, "token d_model"]] = field(default_factory=dict)
    outputs: dict[Site, Float[Tensor, "token d_model"]] = field(default_factory=dict)
    answer: Tensor | None = None
    """velocity that the transformer predicts: (1, token, channel)"""


def calls_of(painter: "Painter", shot: "Shot", steps: Sequence[int]) -> dict[int, Call]:
    """What the transformer is called with at each of `steps` while a picture is drawn: step -> call.  Later steps are not drawn."""
    found: dict[int, Call] = {}

    def keep(_first: int, step: int, captured: "Captured") -> None:
        if step in steps:
            assert captured.inputs is not None
            kept = {name: v.clone() if isinstance(v, Tensor) else v for name, v in captured.inputs.items()}
            found[step] = Call(step, kept)
        if step >= max(steps):
            raise _Enough

    with suppress(_Enough):
        painter.draw([shot], pictures=False, on_step=keep)
    return found


def dtype_of(transformer: nn.Module) -> torch.dtype:
    """What a transformer computes in."""
    return next(transformer.parameters()).dtype


@torch.inference_mode()
def plain_pass(transformer: nn.Module, call: Call, sites: Sequence[Site]) -> Plain:
    """One whole pass as it is, with what the MLPs of `sites` read and write."""
    plain = Plain()

    def record(moment: "Moment", read: Tensor, output: Tensor) -> None:
        plain.inputs[moment.site], plain.outputs[moment.site] = read[0].clone(), output[0].clone()

    plain.answer = answer(transformer, call, {(site, "mlp"): [record] for site in sites})
    return plain


@torch.inference_mode()
def answer(transformer: nn.Module, call: Call, changes: "Mapping[tuple[Site, Part], Sequence[Change]]") -> Tensor:
    """What the transformer predicts under changes: (1, token, channel)."""
    from harvest.replacing import replace

    with replace(transformer, changes) as replacement, _memory_told(1):
        replacement.step = call.step
        output = transformer(**call.repeated(1, dtype_of(transformer)))
    found = output[0] if isinstance(output, tuple) else output.sample
    assert isinstance(found, Tensor)
    return found


@contextmanager
def _memory_told(rows: int) -> Iterator[None]:
    """Inside, running out of the device's memory is told in one sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        remedy = "use a smaller --batch-size" if rows > 2 else "use --dtype bfloat16, or a device with more memory"
        raise GranaryError(
            f"a run of {many(rows, 'row')} (perturbations, and one without) does not fit into the device's memory: {remedy} "
            f"({str(error).splitlines()[0]})"
        ) from None


@torch.inference_mode()
def read_changes(
    transformer: nn.Module,
    call: Call,
    plain: Plain,
    perturbations: Sequence[Perturbation],
    places: Places,
    hold: Mapping[Site, Tensor | None] | None,
) -> dict[Site, Float[Tensor, "perturbation place d_model"]]:
    """What each perturbation changes in mlp_in at `places`: float64 on the CPU, from one pass of one batch.

    `hold`: None: everything answers; else every site whose MLP hands on what it did in the plain pass, with the matrix
    (d_model, d_model) of its skip path or None.
    """
    from harvest.replacing import replace

    seen: dict[Site, Tensor] = {}
    rows = len(perturbations) + 1

    def change(moment: "Moment", read: Tensor, output: Tensor) -> Tensor | None:
        site = moment.site
        if site in places:
            chosen = read[:, list(places[site])].double()
            seen[site] = (chosen[1:] - chosen[:1]).cpu()
            if len(seen) == len(places):
                raise _Enough
        mine = [(row, each) for row, each in enumerate(perturbations, 1) if each.site == site]
        if hold is None or site not in hold:
            if not mine:
                return None
            new = output.clone()
        else:
            new = plain.outputs[site].expand(rows, -1, -1).clone()
            if (skip := hold[site]) is not None:
                new += ((read - plain.inputs[site]).float() @ skip.T).to(new.dtype)
        for row, each in mine:
            new[row, each.token] += each.vector.to(new)
        return new

    below = {site for site in plain.outputs if site.layer <= max(place.layer for place in places)}
    spots: dict[tuple[Site, Part], list[Change]] = {(site, "mlp"): [change] for site in sorted(below)}
    with _memory_told(rows), suppress(_Enough), replace(transformer, spots) as replacement:
        replacement.step = call.step
        transformer(**call.repeated(rows, dtype_of(transformer)))
    assert len(seen) == len(places), "a reader's site was not reached"
    return seen
