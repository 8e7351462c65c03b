"""Captures what circuits are computed from (`store.traces`), block by block while the transformer runs.

1. Hooks read each traced block: residual, norms, modulations, q and k, attention output, MLP.  The model computes what it
   would compute without them.
2. When a block has ended, each traced image of the batch is rounded to the trace dtype and replayed from that: attention
   output, MLP input and the residual that leaves, in float32; the largest relative differences are written into the file.
3. They are handed over on the host at once, to be written while the next block is computed (`harvest.trace_writing`).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harvest.models.compiling import outside
from harvest.models.weights import attention_of
from harvest.trace_writing import BlockTrace
from store.errors import NonFiniteError, UsageError
from store.format import StoreMeta
from store.sites import POINTS, Stream
from store.traces import (
    MODULATIONS,
    REPLAYED,
    TRACE_FORMAT,
    TRACE_STREAMS,
    TRACE_VERSION,
    in_activations,
    trace_file,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NORMS: dict[Stream, tuple[str, str, str]] = {
    "img": ("norm1", "norm2", "ff"),
    "txt": ("norm1_context", "norm2_context", "ff_context"),
}
"""what a block calls the modules of a stream"""
QK: dict[Stream, tuple[str, str]] = {"img": ("norm_q", "norm_k"), "txt": ("norm_added_q", "norm_added_k")}
TINY = 1e-30

Keep = Callable[[Sequence[BlockTrace]], object]
"""takes the traces of a block, one an image"""


@dataclass
class Tracer:
    """What is traced of the batch that is being drawn; the sampling loop says which step it is."""

    meta: StoreMeta
    images: Mapping[int, int]
    """row of the batch -> image"""
    keep: Keep
    step: int = 0
    sigma: list[float] = field(default_factory=list)
    """of each row, as the transformer received it"""

    @property
    def active(self) -> bool:
        """Whether this step is traced."""
        assert self.meta.traced is not None
        return bool(self.images) and self.step in self.meta.traced.steps

    def chosen(self, values: Tensor) -> Tensor:
        """The traced rows of a batch, a copy of their own."""
        return values.detach()[list(self.images)]


@contextmanager
def tracing(transformer: nn.Module, tracer: Tracer) -> Iterator[None]:
    """While the context lasts, every traced block hands its traces over as it ends; the hooks are gone afterwards."""

    def receive_sigma(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tracer.sigma = kwargs["timestep"].detach().float().tolist()

    assert tracer.meta.traced is not None
    apart: Callable[[Any], Any] = outside(transformer)
    with ExitStack() as hooks:
        hooks.callback(transformer.register_forward_pre_hook(receive_sigma, with_kwargs=True).remove)
        for block in tracer.meta.traced.blocks:
            _BlockTracer(transformer, block, tracer, apart).install(hooks)
        yield


class _BlockTracer:
    """The hooks of one block."""

    def __init__(self, transformer: nn.Module, block: int, tracer: Tracer, apart: Callable[[Any], Any]) -> None:
        """`apart` keeps a hook out of compiled code."""
        self.block, self.tracer, self._apart = block, tracer, apart
        blocks: Any = transformer.transformer_blocks
        self.module: Any = blocks[block]
        """a FluxTransformerBlock"""
        processor = type(self.module.attn.processor).__name__
        if processor != "FluxAttnProcessor":
            raise UsageError(
                f"block {block} computes its attention by {processor}; only FluxAttnProcessor can be traced"
            )
        self.found: dict[str, Tensor] = {}
        """name -> (row, …) in the model's dtype, but for what is float32 on the disk"""
        self.rotary: tuple[Tensor, Tensor] | None = None

    def install(self, hooks: ExitStack) -> None:
        attention = self.module.attn
        for stream in TRACE_STREAMS:
            norm1, norm2, mlp = (getattr(self.module, name) for name in NORMS[stream])
            hooks.callback(norm1.register_forward_pre_hook(self._apart(self._enters(stream)), with_kwargs=True).remove)
            hooks.callback(norm2.register_forward_pre_hook(self._apart(self._normalised(stream))).remove)
            hooks.callback(mlp.register_forward_hook(self._apart(self._mlp(stream))).remove)
            for letter, name in zip("qk", QK[stream], strict=True):
                module, receive = getattr(attention, name), self._projected(f"{letter}.{stream}")
                hooks.callback(module.register_forward_hook(self._apart(receive)).remove)
        hooks.callback(attention.register_forward_hook(self._apart(self._attended), with_kwargs=True).remove)
        hooks.callback(self.module.register_forward_hook(self._apart(self._ends)).remove)

    def _enters(self, stream: Stream) -> Any:
        def receive(norm: Any, inputs: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            if not self.tracer.active:
                return
            self.found[f"resid.{stream}"] = resid = self.tracer.chosen(inputs[0])
            self.found[f"r1.{stream}"] = inverse_std(resid, norm.norm.eps)
            modulations = norm.linear(norm.silu(kwargs["emb"])).chunk(len(MODULATIONS), dim=1)
            for name, value in zip(MODULATIONS, modulations, strict=True):  # norm1 hands out four of the six
                self.found[f"{name}.{stream}"] = self.tracer.chosen(value).float()

        return receive

    def _normalised(self, stream: Stream) -> Any:
        def receive(norm: nn.LayerNorm, inputs: tuple[Tensor, ...]) -> None:
            if self.tracer.active:
                self.found[f"r2.{stream}"] = inverse_std(self.tracer.chosen(inputs[0]), norm.eps)

        return receive

    def _mlp(self, stream: Stream) -> Any:
        def receive(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self.tracer.active:
                for point, value in zip(POINTS, (inputs[0], output), strict=True):
                    self.found[f"{point}.{stream}"] = self.tracer.chosen(value)

        return receive

    def _projected(self, name: str) -> Any:
        def receive(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self.tracer.active:
                assert output.ndim == 4, (name, tuple(output.shape))
                self.found[name] = self.tracer.chosen(output)

        return receive

    def _attended(
        self, _module: nn.Module, _inputs: tuple[Tensor, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]
    ) -> None:
        if not self.tracer.active:
            return
        from diffusers.models.embeddings import apply_rotary_emb

        assert len(output) == 2, "an adapter adds to the attention's output"
        for stream, value in zip(("img", "txt"), output, strict=True):
            self.found[f"attn.{stream}"] = self.tracer.chosen(value)
        for letter in "qk":
            joined = torch.cat([self.found.pop(f"{letter}.{stream}") for stream in TRACE_STREAMS], dim=1)
            rotary = kwargs.get("image_rotary_emb")
            turned = joined if rotary is None else apply_rotary_emb(joined, rotary, sequence_dim=1)
            self.found[letter] = turned  # type: ignore[assignment]  # annotated as a pair, and is none

    def _ends(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        if not self.tracer.active:
            return
        for stream, value in zip(TRACE_STREAMS, output, strict=True):
            self.found[f"resid_out.{stream}"] = self.tracer.chosen(value)
        found, self.found = self.found, {}
        device = output[0].device  # where a block that is offloaded layer by layer does not have its matrices
        matrices = {name: matrix.to(device).float() for name, matrix in attention_of(self.module).items()}
        rows = enumerate(self.tracer.images.items())
        self.tracer.keep([self._captured({n: v[i] for n, v in found.items()}, matrices, *each) for i, each in rows])

    def _captured(
        self, found: Mapping[str, Tensor], matrices: Mapping[str, Tensor], row: int, image: int
    ) -> BlockTrace:
        """The trace of one image, rounded and replayed."""
        tracer, traced = self.tracer, self.tracer.meta.traced
        assert traced is not None
        exact = {f"{name}.{stream}" for name in ("r1", "r2", *MODULATIONS) for stream in TRACE_STREAMS}
        stored = {name: value if name in exact else value.to(DTYPES[traced.dtype]) for name, value in found.items()}
        if (odd := non_finite(stored)) is not None:
            raise NonFiniteError(
                f"the trace of image {image} at step {tracer.step}: {odd} of block {self.block} holds a NaN or an "
                f"infinity in {stored[odd].dtype}. Nothing of this part was committed; try --dtype float32."
            )
        replay = replay_errors(stored, matrices)
        about = {
            "format": TRACE_FORMAT, "version": TRACE_VERSION, "image": image, "step": tracer.step, "block": self.block,
            "sigma": tracer.sigma[row], "replay": replay,
        }  # fmt: skip
        left_out = {
            f"{point}.{stream}"
            for point in POINTS
            for stream in TRACE_STREAMS
            if in_activations(tracer.meta, self.block, stream, point)
        }
        if self.block != traced.blocks[-1]:
            left_out |= {f"resid_out.{stream}" for stream in TRACE_STREAMS}  # enters the next block
        kept = {name: value.contiguous().cpu() for name, value in stored.items() if name not in left_out}
        worst = {name: max(replay[f"{name}.{stream}"] for stream in TRACE_STREAMS) for name in REPLAYED}
        name = trace_file(image, tracer.step, self.block)
        return BlockTrace(name, kept, json.dumps(about, sort_keys=True), worst)


def non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity; None where none does.

    One look at the device: a sum of such numbers is none of the finite ones, and only where a sum is not finite, which large
    numbers can bring about as well, each tensor is looked through.
    """
    sums = torch.stack([values.sum(dtype=torch.float32) for values in tensors.values()])
    if bool(torch.isfinite(sums.sum())):
        return None
    return next((name for name, values in tensors.items() if not bool(torch.isfinite(values).all())), None)


def inverse_std(values: Tensor, eps: float) -> Tensor:
    """1 / sqrt(variance + eps) over the channels, float32, computed in float64."""
    return torch.rsqrt(values.double().var(-1, unbiased=False) + eps).float()


def replay_errors(trace: Mapping[str, Tensor], matrices: Mapping[str, Tensor]) -> dict[str, float]:
    """`attn.txt` and so on -> largest difference between what follows from a trace in float32 and what it holds, over the
    largest magnitude that it holds; three digits.

    `trace` has the names of `store.traces`, `resid_out` always, of one image; `matrices` those of its block's attention, float32.
    """
    t = {name: value.float() for name, value in trace.items()}

    def line(name: str, rows: Tensor) -> Tensor:
        return functional.linear(rows, matrices[f"{name}.weight"], matrices.get(f"{name}.bias"))

    def norm(rows: Tensor, r: str, scale: str, shift: str, s: str) -> Tensor:
        centred = (rows - rows.mean(-1, keepdim=True)) * t[f"{r}.{s}"][:, None]
        return centred * (1 + t[f"{scale}.{s}"]) + t[f"{shift}.{s}"]

    inputs = {s: norm(t[f"resid.{s}"], "r1", "scale_msa", "shift_msa", s) for s in TRACE_STREAMS}
    values = torch.cat([line("add_v_proj", inputs["txt"]), line("to_v", inputs["img"])]).view_as(t["q"])
    q, k, v = (each.transpose(0, 1)[None] for each in (t["q"], t["k"], values))
    attended = functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
    texts = len(inputs["txt"])
    replayed = {"attn.txt": line("to_add_out", attended[:texts]), "attn.img": line("to_out.0", attended[texts:])}
    held = {name: t[name] for name in replayed}
    for s in TRACE_STREAMS:
        middle = t[f"resid.{s}"] + t[f"gate_msa.{s}"] * t[f"attn.{s}"]
        replayed[f"mlp_in.{s}"] = norm(middle, "r2", "scale_mlp", "shift_mlp", s)
        replayed[f"resid.{s}"] = middle + t[f"gate_mlp.{s}"] * t[f"mlp_out.{s}"]
        held |= {f"mlp_in.{s}": t[f"mlp_in.{s}"], f"resid.{s}": t[f"resid_out.{s}"]}
    errors = {n: (replayed[n] - held[n]).abs().max() / held[n].abs().max().clamp(min=TINY) for n in replayed}
    return {name: float(f"{error.item():.3g}") for name, error in sorted(errors.items())}
