"""Edges of an attribution graph the reference's way, written for the benchmark: the transformer is run once a node.

    1. The transformer runs once as it is.  Kept: q and k after RoPE (P = softmax(q k^T / sqrt(d_head)) is stored for every traced
       block), inverse standard deviations of the norms, modulations, what every MLP read and wrote, the residuals.
    2. It is patched: attention multiplies by the stored P, norms divide by the stored deviations, MLPs return what they wrote.
    3. For every node one forward pass of the patched transformer, through to the model's end, then one backward pass from the
       node's pre-activation to what all MLPs below wrote and to the residuals that enter block 0.
    4. Edges: g W_dec for every token and all features, times z; errors and inputs by products with g.

Everything is on one device and stays there, and queries and keys are not computed where P is stored.  Works on diffusers'
`FluxTransformer2DModel` and on `bench.plain_flux`, whose modules have the same names.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.plain_flux import EPS, projected, queries_keys_values, values
from store.sites import Site, Stream
from train.dictionaries.dictionary import Dictionary

STREAMS: tuple[Stream, Stream] = ("txt", "img")
NORMS: dict[Stream, tuple[str, str, str]] = {
    "txt": ("norm1_context", "norm2_context", "ff_context"),
    "img": ("norm1", "norm2", "ff"),
}
MODULATIONS = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")
MATRICES = ("to_v", "add_v_proj", "to_out.0", "to_add_out")


@dataclass
class Recording:
    """What one run of a transformer left in its first blocks: a `TraceSource`, with the tensors themselves."""

    transformer: nn.Module
    inputs: dict[str, Any]
    tensors: list[dict[str, Tensor]] = field(default_factory=list)
    """of each block, named as in a stored trace, in the transformer's dtype"""

    @property
    def n_blocks(self) -> int:
        return len(self.tensors)

    @property
    def sigma(self) -> float:
        return float(self.inputs["timestep"])

    def block(self, layer: int) -> dict[str, np.ndarray]:
        """The arrays of a block, float32."""
        return {name: _array(tensor) for name, tensor in self.tensors[layer].items()}

    def weights(self, layer: int) -> dict[str, np.ndarray]:
        """Value and output projections of a block, float32."""
        attn: nn.Module = self.transformer.transformer_blocks[layer].attn  # type: ignore[index, union-attr, assignment]
        parts = ((name, attn.get_submodule(name)) for name in MATRICES)
        return {f"{name}.{key}": _array(value) for name, part in parts for key, value in part.named_parameters()}


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


@torch.no_grad()
def record(transformer: nn.Module, inputs: Mapping[str, Any], n_blocks: int) -> Recording:
    """Run it once on `inputs`, the arguments of its `forward`, and keep what blocks 0 to n_blocks - 1 did."""
    recording = Recording(transformer, dict(inputs), [{} for _ in range(n_blocks)])
    with ExitStack() as hooks:
        for layer, kept in enumerate(recording.tensors):
            block = transformer.transformer_blocks[layer]  # type: ignore[index]
            for stream in STREAMS:
                norm1, norm2, mlp = (getattr(block, name) for name in NORMS[stream])
                hooks.callback(
                    norm1.register_forward_pre_hook(partial(_at_norm1, kept, stream), with_kwargs=True).remove
                )
                hooks.callback(norm2.register_forward_pre_hook(partial(_at_norm2, kept, stream)).remove)
                hooks.callback(mlp.register_forward_hook(partial(_at_mlp, kept, stream)).remove)
            hooks.callback(block.attn.register_forward_hook(partial(_at_attention, kept), with_kwargs=True).remove)
        last = transformer.transformer_blocks[n_blocks - 1]  # type: ignore[index]
        hooks.callback(last.register_forward_hook(partial(_at_end, recording.tensors[-1])).remove)
        transformer(**recording.inputs, return_dict=False)
    return recording


def _deviation(h: Tensor) -> Tensor:
    return (h.float().var(dim=-1, correction=0) + EPS).rsqrt()


def _at_norm1(
    kept: dict[str, Tensor], stream: Stream, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> None:
    kept[f"resid.{stream}"], kept[f"r1.{stream}"] = args[0][0], _deviation(args[0][0])
    modulations: Tensor = module.linear(nn.functional.silu(kwargs["emb"]))  # type: ignore[operator]
    kept.update(
        {f"{name}.{stream}": part[0] for name, part in zip(MODULATIONS, modulations.chunk(6, dim=1), strict=True)}
    )


def _at_norm2(kept: dict[str, Tensor], stream: Stream, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    kept[f"r2.{stream}"] = _deviation(args[0][0])


def _at_mlp(kept: dict[str, Tensor], stream: Stream, _m: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
    kept[f"mlp_in.{stream}"], kept[f"mlp_out.{stream}"] = args[0][0], out[0]


def _at_attention(
    kept: dict[str, Tensor],
    module: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Any],
    out: tuple[Tensor, ...],
) -> None:
    img, txt = args[:2] if args else (kwargs["hidden_states"], kwargs["encoder_hidden_states"])
    q, k, _ = queries_keys_values(module, img, txt, kwargs["image_rotary_emb"])
    kept.update({"q": q[0], "k": k[0], "attn.img": out[0][0], "attn.txt": out[1][0]})


def _at_end(kept: dict[str, Tensor], _m: nn.Module, _args: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
    kept["resid_out.txt"], kept["resid_out.img"] = out[0][0], out[1][0]


class _Norm1(nn.Module):
    """`norm1` with its deviations and modulations frozen."""

    def __init__(self, kept: Mapping[str, Tensor], stream: Stream) -> None:
        super().__init__()
        self.r = kept[f"r1.{stream}"][:, None]
        self.shift, scale, *self.others = (kept[f"{name}.{stream}"] for name in MODULATIONS)
        self.scale, self.others = 1 + scale, [part[None] for part in self.others]

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        gate_msa, shift_mlp, scale_mlp, gate_mlp = self.others
        n = ((x - x.mean(dim=-1, keepdim=True)) * self.r.to(x.dtype)) * self.scale + self.shift
        return n, gate_msa, shift_mlp, scale_mlp, gate_mlp


class _Norm2(nn.Module):
    """`norm2` with its deviations frozen."""

    def __init__(self, kept: Mapping[str, Tensor], stream: Stream) -> None:
        super().__init__()
        self.r = kept[f"r2.{stream}"][:, None]

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(dim=-1, keepdim=True)) * self.r.to(x.dtype)


class _Mlp(nn.Module):
    """An MLP that keeps what it reads and returns what it once wrote."""

    def __init__(self, wrote: Tensor) -> None:
        super().__init__()
        self.wrote = wrote.clone()[None].requires_grad_()
        self.read: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.read = x
        return self.wrote


class _Processor:
    """An attention that multiplies by a stored pattern (head, token, token); `projected` takes diffusers' dropout of 0 for granted."""

    def __init__(self, pattern: Tensor) -> None:
        self.pattern = pattern

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        v = values(attn, hidden_states, encoder_hidden_states)[0].transpose(0, 1)
        out = (self.pattern @ v).transpose(0, 1).flatten(1)[None]
        return projected(attn, out, encoder_hidden_states.shape[1])


@dataclass(frozen=True)
class NodeEdges:
    """The edges into one node, before any threshold."""

    pre: float
    features: dict[Site, tuple[Tensor, Tensor, Tensor]]
    """token, feature and attribution of every feature whose |attribution| is at least the threshold"""
    errors: dict[Site, Tensor]
    inputs: dict[Stream, Tensor]


class Reference:
    """A transformer and its transcoders, patched for as long as `patched` lasts; of no use outside."""

    def __init__(self, recording: Recording, transcoders: Mapping[Site, Dictionary], threshold: float) -> None:
        self.recording, self.transcoders, self.threshold = recording, transcoders, threshold
        self.z: dict[Site, Tensor] = {}
        self.error: dict[Site, Tensor] = {}
        self.mlps: dict[Site, _Mlp] = {}
        self.entering: dict[Stream, Tensor] = {}
        dtype = recording.tensors[0]["resid.img"].dtype
        with torch.no_grad():
            for site, dictionary in transcoders.items():
                kept = recording.tensors[site.layer]
                read, wrote = kept[f"mlp_in.{site.stream}"], kept[f"mlp_out.{site.stream}"]
                self.sigma = torch.full((1,), recording.sigma, device=read.device)
                z = dictionary.encode(read.to(dictionary.encoder.weight.dtype), self.sigma.expand(len(read)))
                self.z[site], self.error[site] = z.to(dtype), (wrote - dictionary.decode(z)).to(dtype)
                self.mlps[site] = _Mlp(wrote)

    @contextmanager
    def patched(self) -> Iterator[None]:
        """While it lasts, the transformer is the frozen model."""
        with ExitStack() as undo:
            for layer, kept in enumerate(self.recording.tensors):
                block: Any = self.recording.transformer.transformer_blocks[layer]  # type: ignore[index]
                q, k = (kept[name].float().transpose(0, 1) for name in "qk")
                pattern = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1).to(kept["q"].dtype)
                undo.callback(setattr, block.attn, "processor", block.attn.processor)
                block.attn.processor = _Processor(pattern)
                for stream in STREAMS:
                    parts = (_Norm1(kept, stream), _Norm2(kept, stream), self.mlps[Site("double", layer, stream)])
                    for name, part in zip(NORMS[stream], parts, strict=True):
                        undo.callback(setattr, block, name, getattr(block, name))
                        setattr(block, name, part)
            first = self.recording.transformer.transformer_blocks[0]  # type: ignore[index]
            undo.callback(first.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            yield

    def _enter(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Block 0 reads residuals that gradients are taken of."""
        given = {"hidden_states": "img", "encoder_hidden_states": "txt"}
        found = dict(zip(given, args, strict=False)) | kwargs
        for name, stream in given.items():
            self.entering[stream] = found[name] = found[name].detach().requires_grad_()  # type: ignore[index]
        return (found["hidden_states"], found["encoder_hidden_states"]), {
            key: value for key, value in found.items() if key not in given
        }

    def edges(self, site: Site, token: int, feature: int) -> NodeEdges:
        """All edges into one feature at one token: a forward pass through to the model's end, and a backward pass."""
        self.recording.transformer(**self.recording.inputs, return_dict=False)
        read = self.mlps[site].read
        assert read is not None
        dictionary = self.transcoders[site]
        weight = dictionary.encoder.weight[feature].detach()
        prepared = dictionary.prepare(read[0, token, None].to(weight.dtype), self.sigma)
        pre = (prepared @ weight + dictionary.encoder.bias[feature].detach()).sum()
        below = [other for other in self.transcoders if other.layer < site.layer]
        sources = [self.mlps[other].wrote for other in below] + [self.entering[stream] for stream in STREAMS]
        gradients = torch.autograd.grad(pre, sources)
        with torch.no_grad():
            features, errors = {}, {}
            for other, gradient in zip(below, gradients, strict=False):
                decoder = self.transcoders[other].decoder.weight
                attribution = (gradient[0].to(decoder.dtype) @ decoder) * self.z[other]
                kept = torch.nonzero((attribution.abs() >= self.threshold) & (self.z[other] > 0), as_tuple=True)
                features[other] = (*kept, attribution[kept])
                errors[other] = (gradient[0] * self.error[other]).sum(dim=-1)
            entering = zip(STREAMS, gradients[len(below) :], strict=True)
            inputs = {stream: (gradient[0] * self.entering[stream][0]).sum(dim=-1) for stream, gradient in entering}
            return NodeEdges(float(pre.detach()), features, errors, inputs)
