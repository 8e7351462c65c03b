"""A frozen model by brute force: small traces made by hand, and the model of DESIGN section 6 in plain torch, differentiated by autograd.

Nothing here is shared with `analyze.circuits`: every constant path is a leaf of its own, and what a source adds to a target is the source
times the gradient of the target with respect to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from store.sites import Site, Stream
from train import Dictionary, DictionaryConfig
from train.dictionaries.dictionary import build

STREAMS: tuple[Stream, Stream] = ("txt", "img")
VALUE: dict[Stream, str] = {"txt": "add_v_proj", "img": "to_v"}
OUTPUT: dict[Stream, str] = {"txt": "to_add_out", "img": "to_out.0"}


@dataclass(frozen=True)
class HandMade:
    """A trace in memory, as `TraceSource` asks for it."""

    blocks: list[dict[str, np.ndarray]]
    matrices: list[dict[str, np.ndarray]]
    sigma: float

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    def block(self, layer: int) -> Mapping[str, np.ndarray]:
        return self.blocks[layer]

    def weights(self, layer: int) -> Mapping[str, np.ndarray]:
        return self.matrices[layer]


def hand_made(
    seed: int,
    n_blocks: int = 3,
    heads: int = 2,
    d_head: int = 6,
    n_txt: int = 5,
    n_img: int = 6,
    dtype: str = "float32",
    sigma: float = 0.75,
) -> HandMade:
    """What random double blocks leave behind, rounded to the dtype of a trace."""
    rng = torch.Generator().manual_seed(seed)
    d = heads * d_head
    tokens = {"txt": n_txt, "img": n_img}

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64) * scale

    def rounded(values: Tensor) -> np.ndarray:
        return values.float().numpy().astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)

    resid = {stream: normal(count, d) for stream, count in tokens.items()}
    blocks, matrices = [], []
    for layer in range(n_blocks):
        found: dict[str, np.ndarray] = {}
        weights: dict[str, np.ndarray] = {}
        for name in ("to_v", "add_v_proj", "to_out.0", "to_add_out"):
            weights[f"{name}.weight"] = normal(d, d, scale=d**-0.5).float().numpy()
            weights[f"{name}.bias"] = normal(d, scale=0.3).float().numpy()
        modulation, n1 = {}, {}
        for stream in STREAMS:
            m = {
                name: normal(d, scale=0.4).float().double()
                for name in ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")
            }
            modulation[stream] = m
            found |= {f"{name}.{stream}": value.float().numpy() for name, value in m.items()}
            found[f"resid.{stream}"] = rounded(resid[stream])
            r1 = torch.rsqrt(resid[stream].var(dim=1, unbiased=False) + 1e-6)
            found[f"r1.{stream}"] = r1.float().numpy()
            n1[stream] = functional.layer_norm(resid[stream], (d,), eps=1e-6) * (1 + m["scale_msa"]) + m["shift_msa"]
        joint = torch.cat([n1[stream] for stream in STREAMS])
        q, k = ((joint @ normal(d, d, scale=d**-0.5)).view(-1, heads, d_head) for _ in range(2))
        found |= {"q": rounded(q), "k": rounded(k)}
        v = torch.cat(
            [
                n1[s] @ torch.from_numpy(weights[f"{VALUE[s]}.weight"]).double().T
                + torch.from_numpy(weights[f"{VALUE[s]}.bias"])
                for s in STREAMS
            ]
        )
        pattern = torch.softmax(torch.einsum("ihd,jhd->hij", q, k) * d_head**-0.5, dim=-1)
        mixed = torch.einsum("hij,jhd->ihd", pattern, v.view(-1, heads, d_head)).flatten(1)
        for stream, part in zip(STREAMS, mixed.split([n_txt, n_img]), strict=True):
            m = modulation[stream]
            attn = part @ torch.from_numpy(weights[f"{OUTPUT[stream]}.weight"]).double().T + torch.from_numpy(
                weights[f"{OUTPUT[stream]}.bias"]
            )
            between = resid[stream] + m["gate_msa"] * attn
            x = functional.layer_norm(between, (d,), eps=1e-6) * (1 + m["scale_mlp"]) + m["shift_mlp"]
            y = torch.tanh(x @ normal(d, 2 * d, scale=d**-0.5)) @ normal(2 * d, d, scale=d**-0.5)
            resid[stream] = between + m["gate_mlp"] * y
            r2 = torch.rsqrt(between.var(dim=1, unbiased=False) + 1e-6)
            found |= {f"attn.{stream}": rounded(attn), f"mlp_in.{stream}": rounded(x), f"mlp_out.{stream}": rounded(y)}
            found[f"r2.{stream}"] = r2.float().numpy()
            if layer == n_blocks - 1:
                found[f"resid_out.{stream}"] = rounded(resid[stream])
        blocks.append(found)
        matrices.append(weights)
    return HandMade(blocks, matrices, sigma)


@torch.no_grad()
def random_transcoders(
    seed: int,
    n_blocks: int,
    d_model: int,
    n_features: int = 20,
    activation: str = "relu",
    skip: bool = False,
    time: int | None = 8,
) -> dict[Site, Dictionary]:
    """A transcoder with random weights for every site."""
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(n_blocks):
        for stream in STREAMS:
            site = Site("double", layer, stream)
            config = DictionaryConfig(
                "transcoder",
                site,
                d_model,
                n_features,
                activation,
                4 if activation in ("topk", "batchtopk") else None,
                time,
                skip=skip,  # type: ignore[arg-type]
            )
            one = build(config)
            for parameter in one.parameters():
                parameter.copy_(
                    torch.randn(parameter.shape, generator=rng)
                    * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2)
                )
            if activation == "jumprelu":
                one.log_threshold.copy_(torch.full((n_features,), -1.5))
            if activation == "batchtopk":
                one.threshold.fill_(0.3)
            found[site] = one
    return found


Path = tuple[Site, str]


@dataclass
class Oracle:
    """The frozen model with every source a leaf, float64."""

    source: HandMade
    transcoders: Mapping[Site, Dictionary]
    z: dict[Site, Tensor] = field(default_factory=dict)
    errors: dict[Site, Tensor] = field(default_factory=dict)
    inputs: dict[Stream, Tensor] = field(default_factory=dict)
    constants: dict[Path, list[Tensor]] = field(default_factory=dict)
    reads: dict[Site, Tensor] = field(default_factory=dict)
    """the replayed mlp_in, a function of the leaves"""

    def __post_init__(self) -> None:
        state = {s: self._leaf(_double(self.source.blocks[0][f"resid.{s}"])) for s in STREAMS}
        self.inputs = dict(state)
        for layer in range(self.source.n_blocks):
            state = self._block(layer, state)

    def _leaf(self, values: Tensor) -> Tensor:
        return values.detach().clone().requires_grad_(True)

    def _constant(self, site: Site, term: str, values: Tensor) -> Tensor:
        leaf = self._leaf(values)
        self.constants.setdefault((site, term), []).append(leaf)
        return leaf

    def _block(self, layer: int, state: dict[Stream, Tensor]) -> dict[Stream, Tensor]:
        a = {name: _double(values) for name, values in self.source.blocks[layer].items()}
        w = {name: _double(values) for name, values in self.source.matrices[layer].items()}
        sites = {s: Site("double", layer, s) for s in STREAMS}
        heads, d_head = a["q"].shape[1:]
        pattern = torch.softmax(torch.einsum("ihd,jhd->hij", a["q"], a["k"]) * d_head**-0.5, dim=-1)
        values = []
        for s in STREAMS:
            h = state[s]
            n1 = (h - h.mean(dim=1, keepdim=True)) * a[f"r1.{s}"][:, None] * (1 + a[f"scale_msa.{s}"])
            n1 = n1 + self._constant(sites[s], "shift-attention", a[f"shift_msa.{s}"])
            values.append(n1 @ w[f"{VALUE[s]}.weight"].T + self._constant(sites[s], "value", w[f"{VALUE[s]}.bias"]))
        mixed = torch.einsum("hij,jhd->ihd", pattern, torch.cat(values).view(-1, heads, d_head)).flatten(1)
        after = {}
        for s, part in zip(STREAMS, mixed.split([len(v) for v in values]), strict=True):
            site, gate = sites[s], a[f"gate_mlp.{s}"]
            replayed = part @ w[f"{OUTPUT[s]}.weight"].T
            missed = a[f"attn.{s}"] - replayed.detach() - w[f"{OUTPUT[s]}.bias"]
            replayed = (
                replayed
                + self._constant(site, "output", w[f"{OUTPUT[s]}.bias"])
                + self._constant(site, "attention-error", missed)
            )
            between = state[s] + a[f"gate_msa.{s}"] * replayed
            x = (between - between.mean(dim=1, keepdim=True)) * a[f"r2.{s}"][:, None] * (1 + a[f"scale_mlp.{s}"])
            x = x + self._constant(site, "shift-mlp", a[f"shift_mlp.{s}"])
            x = x + self._constant(site, "rounding", a[f"mlp_in.{s}"] - x.detach())
            self.reads[site] = x
            y = self._mlp(site, x, a[f"mlp_in.{s}"], a[f"mlp_out.{s}"])
            out = between + gate * y
            last = layer + 1 == self.source.n_blocks
            was = a[f"resid_out.{s}"] if last else _double(self.source.blocks[layer + 1][f"resid.{s}"])
            after[s] = out + self._constant(site, "rounding", was - out.detach())
        return after

    def _mlp(self, site: Site, x: Tensor, mlp_in: Tensor, mlp_out: Tensor) -> Tensor:
        if site not in self.transcoders:
            self.errors[site] = self._leaf(mlp_out)
            return self.errors[site]
        one = self.transcoders[site]
        z = one.activate(self.preactivations(site, mlp_in)).detach()
        self.z[site] = self._leaf(z)
        y = self.z[site] @ _same(one.decoder.weight).T + self._constant(site, "decoder", _same(one.decoder.bias))
        if one.config.skip:
            y = y + x @ _same(one.skip.weight).T
        self.errors[site] = self._leaf(mlp_out - y.detach())
        return y + self.errors[site]

    def _encoder(self, site: Site) -> tuple[Tensor, Tensor]:
        """Rows that read mlp_in, and the constants beside."""
        one = self.transcoders[site]
        weight, bias = _same(one.encoder.weight), _same(one.encoder.bias)
        if one.config.time_embed_dim is None:
            return weight, bias
        with torch.no_grad():
            scale, shift = (part[0].double() for part in one.modulation(torch.tensor([self.source.sigma])))
        return weight * (1 + scale), weight @ shift + bias

    def preactivations(self, site: Site, mlp_in: Tensor) -> Tensor:
        """Of every token and feature, from mlp_in as it was."""
        weight, bias = self._encoder(site)
        return mlp_in @ weight.T + bias

    def attribute(self, members: Sequence[tuple[Site, int, int, float]]) -> "Shares":
        """What every leaf adds to the weighted sum of these members' pre-activations."""
        total, pre, constants = torch.zeros((), dtype=torch.float64), 0.0, {}
        for site, token, feature, weight in members:
            rows, bias = self._encoder(site)
            total = total + weight * (self.reads[site][token] @ rows[feature])
            key = (site, "encoder")
            constants[key] = constants.get(key, 0.0) + weight * float(bias[feature])
            was = _double(self.source.blocks[site.layer][f"mlp_in.{site.stream}"])
            pre += weight * float(self.preactivations(site, was)[token, feature])

        leaves = [
            *self.z.values(),
            *self.errors.values(),
            *self.inputs.values(),
            *(leaf for found in self.constants.values() for leaf in found),
        ]
        gradients = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        shares = iter(
            [
                leaf.detach() * (0.0 if gradient is None else gradient)
                for leaf, gradient in zip(leaves, gradients, strict=True)
            ]
        )
        features = {site: next(shares).numpy() for site in self.z}
        errors = {site: next(shares).sum(dim=1).numpy() for site in self.errors}
        inputs = {stream: next(shares).sum(dim=1).numpy() for stream in self.inputs}
        for key, found in self.constants.items():
            constants[key] = constants.get(key, 0.0) + sum(float(next(shares).sum()) for _ in found)
        return Shares(pre, features, errors, inputs, constants)


@dataclass(frozen=True)
class Shares:
    """What adds up to one target."""

    pre: float
    features: dict[Site, np.ndarray]
    """(token, feature)"""
    errors: dict[Site, np.ndarray]
    inputs: dict[Stream, np.ndarray]
    bias: dict[Path, float]


def _double(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values).astype(np.float64))


def _same(values: Tensor) -> Tensor:
    return values.detach().double()
