"""Changes what a transformer's blocks write while it runs: the second of the two context managers that touch the model.

What is changed is data, (site, part) -> functions; `replace` installs them and takes them away again:

    mlp     the MLP of a double block's stream: input mlp_in, output mlp_out, before the gate
    attn    what a double block's attention gives its stream, before the gate: input and output are the same

The changes of a spot run in their order, each sees what the one before it left.  Contexts nest: the changes of an inner one
see what those of an outer one left, and `capture` inside reads what the model goes on with.  The sampling loop says which
step it is (`Replacement.step`, kept by `Sampler.draw`); nobody counts calls.

Cost: of the hooks, none where nothing is changed; where something is, one look at sigma a forward pass and one for NaN at each
output that was changed, each a wait for the device.  What a change computes and holds is its own affair.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from harvest.capture import mlp_of
from harvest.models.compiling import outside
from store.errors import NonFiniteError, UsageError
from store.sites import Site

Part = Literal["mlp", "attn"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Moment:
    """What a change is told of the call that it changes."""

    site: Site
    step: int
    """0-based denoising step, as the sampling loop says"""
    sigma: Tensor
    """(image,) float32, as the transformer received it"""


Change = Callable[[Moment, Tensor, Tensor], Tensor | None]
"""(moment, input, output), both (image, token, d_model) in the model's dtype -> the new output, or None: leave it as it is.
It must not write into what it is given, and what it gives back has the shape, dtype and device of the output."""


@dataclass
class Replacement:
    """What the sampling loop tells the changes: which denoising step is being computed."""

    step: int = 0


@dataclass
class _Received:
    """Sigma of the forward pass that is running, None before the first; and of each step the sigma that it ran with."""

    sigma: Tensor | None = None
    steps: dict[int, float] = field(default_factory=dict)

    def receive(self, sigma: Tensor, step: int) -> None:
        """A forward pass begins.  `UsageError` where the step cannot be right: changes meant for one would fall on another."""
        self.sigma = sigma.detach().float()
        now = float(self.sigma.flatten()[0])
        if (before := self.steps.setdefault(step, now)) != now:
            raise UsageError(
                f"the transformer ran step {step} with sigma {before:g}, and is called for it again with {now:g}: set "
                "Replacement.step before each forward pass, or give it to Sampler.draw(replacement=…)"
            )


@contextmanager
def replace(transformer: nn.Module, changes: Mapping[tuple[Site, Part], Sequence[Change]]) -> Iterator[Replacement]:
    """While the context lasts, the changes take part in every forward pass; gone afterwards, also after an exception.

    Set `step` of what is handed out before each forward pass, or give it to `Sampler.draw`, which does so; one context is for
    one schedule, and a step that comes with another sigma than before is a `UsageError`.  An empty mapping installs nothing.
    A spot that the model has not is a `UsageError` at once.  In a forward pass, something of another shape, dtype or device
    than the output is a `UsageError`, and a NaN or an infinity a `NonFiniteError`; both name the site.
    """
    replacement, received = Replacement(), _Received()
    wanted = {spot: list(found) for spot, found in changes.items() if found}
    for site, part in wanted:
        check_spot(transformer, site, part)

    def receive_sigma(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "timestep" not in kwargs:
            raise UsageError("the transformer must be called with timestep= by name while its MLPs are replaced")
        received.receive(kwargs["timestep"], replacement.step)

    apart: Callable[[Any], Any] = outside(transformer)
    with ExitStack() as hooks:
        if wanted:
            hooks.callback(transformer.register_forward_pre_hook(receive_sigma, with_kwargs=True).remove)
        for (site, part), found in wanted.items():
            hook = _mlp_hook if part == "mlp" else _attention_hook
            module = mlp_of(transformer, site) if part == "mlp" else _block(transformer, site).attn
            hooks.callback(module.register_forward_hook(apart(hook(site, found, replacement, received))).remove)
        yield replacement


def check_spot(transformer: nn.Module, site: Site, part: str) -> None:
    """`UsageError` unless the transformer has this part at this site."""
    if part not in PARTS:
        raise UsageError(f"{site}: there is no part {part!r} to change; there are {' and '.join(PARTS)}")
    if site.kind != "double":
        raise UsageError(f"{site}: single-stream blocks cannot be changed yet; choose double blocks (img_0, txt_0, …)")
    count = len(transformer.transformer_blocks)  # type: ignore[arg-type]
    if site.layer >= count:
        raise UsageError(f"{site}: the model has double blocks 0 to {count - 1}")


def _block(transformer: nn.Module, site: Site) -> Any:
    return transformer.transformer_blocks[site.layer]  # type: ignore[index]


def _mlp_hook(site: Site, changes: Sequence[Change], replacement: Replacement, received: _Received) -> Any:
    def change_mlp(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return _changed(_moment(site, replacement, received), changes, inputs[0], output)

    return change_mlp


def _attention_hook(site: Site, changes: Sequence[Change], replacement: Replacement, received: _Received) -> Any:
    place = 0 if site.stream == "img" else 1

    def change_attention(
        _module: nn.Module, _inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        output = outputs[place]
        new = _changed(_moment(site, replacement, received), changes, output, output)
        return None if new is None else (*outputs[:place], new, *outputs[place + 1 :])

    return change_attention


def _moment(site: Site, replacement: Replacement, received: _Received) -> Moment:
    assert received.sigma is not None, f"{site} ran outside a forward pass of the transformer"
    return Moment(site, replacement.step, received.sigma)


def _changed(moment: Moment, changes: Sequence[Change], given: Tensor, output: Tensor) -> Tensor | None:
    """The output after all changes; None where none of them changed it."""
    new: Tensor | None = None
    for change in changes:
        found = change(moment, given, output if new is None else new)
        if found is not None:
            _check_like(moment, found, output)
            new = found
    if new is not None and not bool(torch.isfinite(new).all()):
        wider = "" if new.dtype == torch.float32 else ", or --dtype float32"
        raise NonFiniteError(
            f"{moment.site} at step {moment.step} holds a NaN or an infinity in {str(new.dtype).removeprefix('torch.')} "
            f"after it was changed: use a smaller strength{wider}"
        )
    return new


def _check_like(moment: Moment, found: Tensor, output: Tensor) -> None:
    for what, here, there in (
        ("shape", tuple(found.shape), tuple(output.shape)),
        ("dtype", found.dtype, output.dtype),
        ("device", found.device, output.device),
    ):
        if here != there:
            raise UsageError(f"a change of {moment.site} at step {moment.step} gave {what} {here}, expected {there}")
