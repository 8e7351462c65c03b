"""Dictionaries: transcoders (mlp_in -> mlp_out) and sparse autoencoders (mlp_out -> mlp_out).

The architecture of record, DifFRACT's (arXiv:2606.15796), with the parameter names of its published
checkpoints; every row is conditioned on the sigma of its denoising step:

    emb          = sinusoidal(sigma, time_embed_dim)
    h            = SiLU(W2 SiLU(W1 emb + b1) + b2)                time_mlp.0, time_mlp.2
    scale, shift = split(W_mod h + b_mod)                         mod_linear, zero at the start
    z            = act(W_enc (x * (1 + scale) + shift) + b_enc)   encoder
    y            = W_dec z + b_dec                                decoder, columns of unit norm

The second family, that of "SAEs for visual features in FLUX.1", knows no sigma:

    z = act(W_enc (x - pre_bias) + b_enc),   y = W_dec z + pre_bias

`act` is one of `train.dictionaries.activations`.  A transcoder may have a skip connection (Paulo et al. 2025): a linear path
from the input as it is read, before scale and shift, which is added to y:

    y = W_dec z + b_dec + W_skip x                                skip.weight (d_model, d_model), zero at the start

A feature is active on a row when z > 0, here and everywhere.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from store.sites import Point, Site
from train.dictionaries.activations import keep_top
from train.dictionaries.config import DictionaryConfig
from train.learning.kernels import unit_columns_

MAX_PERIOD = 10_000.0
MANY_SIGMAS = 64  # beyond so many in one batch the one-hot matrix costs more than it saves
FIRST_THRESHOLD = 1e-3
"""of every feature, where JumpReLU starts (Rajamanoharan et al. 2024)"""


def sinusoidal(sigma: Float[Tensor, " row"], dim: int) -> Float[Tensor, "row dim"]:
    """The sinusoidal embedding of sigma, float32: sines, then cosines.

    Equal to `diffusers.models.embeddings.get_timestep_embedding` with its default flags
    (`flip_sin_to_cos=False, downscale_freq_shift=1, scale=1`); sigma stays in [0, 1].
    """
    half = dim // 2
    exponent = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=sigma.device) / (half - 1)
    angles = sigma[:, None].float() * torch.exp(exponent)[None, :]
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
    return functional.pad(embedding, (0, dim % 2))


class Dictionary(nn.Module):
    """A dictionary in the architecture of record; `Transcoder` and `SAE` say what it reads and writes."""

    def __init__(self, config: DictionaryConfig, metrics: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config = config
        self.metrics = metrics
        """what `metrics.json` says: FVU, L0, cosine, dead share on held-out rows; None when never measured"""
        self.place: Path | None = None
        """where it was loaded from, its folder or its `.pt` file; None for one that was made here"""
        self.encoder = nn.Linear(config.d_model, config.n_features)
        self._build()
        if config.skip:
            self.skip = nn.Linear(config.d_model, config.d_model, bias=False)
        if config.activation == "batchtopk":
            self.threshold: Tensor
            self.register_buffer("threshold", torch.zeros(()))
        if config.activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full((config.n_features,), math.log(FIRST_THRESHOLD)))

    def _build(self) -> None:
        d_model, width = self.config.d_model, self.config.time_embed_dim
        self.decoder = nn.Linear(self.config.n_features, d_model)
        if width is not None:
            self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
            self.mod_linear = nn.Linear(width, 2 * d_model)

    @property
    def site(self) -> Site:
        return self.config.site

    @property
    def name(self) -> str:
        """`transcoder_img_6`"""
        return self.config.name

    @property
    def input_point(self) -> Point:
        return self.config.input_point

    @property
    def target_point(self) -> Point:
        return self.config.target_point

    def modulation(
        self, sigma: Float[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_model"]]:
        """Scale and shift of every row.

        A batch holds few different sigmas, one a denoising step, so each is computed once and handed to its rows
        by a product with a one-hot matrix: exact, and its gradient is a matrix product of a fixed order of sums.
        """
        width = self.config.time_embed_dim
        assert width is not None
        with torch.autocast(sigma.device.type, enabled=False):
            steps, index = torch.unique(sigma, return_inverse=True)
            if len(steps) > MANY_SIGMAS:
                steps, index = sigma, None
            modulation = self.mod_linear(self.time_mlp(sinusoidal(steps, width)))
            if index is not None:
                modulation = one_hot(index, len(steps)) @ modulation
        scale, shift = modulation.chunk(2, dim=-1)
        return scale, shift

    def prepare(self, x: Float[Tensor, "row d_model"], sigma: Float[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
        """What the encoder's matrix is applied to."""
        if self.config.time_embed_dim is None:
            return x
        scale, shift = self.modulation(sigma)
        return torch.addcmul(x + shift, x, scale)

    def preactivation(
        self, x: Float[Tensor, "row d_model"], sigma: Float[Tensor, " row"]
    ) -> Float[Tensor, "row n_features"]:
        """Features before the activation function: affine in x."""
        return self.encoder(self.prepare(x, sigma))  # type: ignore[no-any-return]

    def activate(self, pre: Float[Tensor, "row n_features"]) -> Float[Tensor, "row n_features"]:
        """The activation function as at inference, where every row is judged alone."""
        if self.config.activation == "jumprelu":
            return pre * (pre > self.log_threshold.exp())
        z = functional.relu(pre)
        if self.config.activation == "batchtopk":
            return z * (z > self.threshold)
        return z if self.config.k is None else keep_top(z, self.config.k)

    def encode(self, x: Float[Tensor, "row d_model"], sigma: Float[Tensor, " row"]) -> Float[Tensor, "row n_features"]:
        """Feature activations z >= 0 of input rows, each with the sigma of its step as the transformer received it."""
        return self.activate(self.preactivation(x, sigma))

    def decode(self, z: Float[Tensor, "row n_features"]) -> Float[Tensor, "row d_model"]:
        """Target rows as the features explain them; the skip path is not in it."""
        return self.decoder(z)  # type: ignore[no-any-return]

    def linear(
        self, x: Float[Tensor, "row d_model"], sigma: Float[Tensor, " row"]
    ) -> Float[Tensor, "row d_model"] | None:
        """What the skip path adds to the features' part of the target, the same at every sigma; None without one."""
        return self.skip(x) if self.config.skip else None  # type: ignore[no-any-return]

    def forward(self, x: Float[Tensor, "row d_model"], sigma: Float[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
        """The reconstruction of the target from input rows, skip path included."""
        y_hat, linear = self.decode(self.encode(x, sigma)), self.linear(x, sigma)
        return y_hat if linear is None else y_hat + linear

    @property
    def output_bias(self) -> nn.Parameter:
        """What `decode` adds to the features' directions: the decoder's bias, or the second family's `pre_bias`."""
        return self.decoder.bias

    @torch.no_grad()
    def initialise(self, seed: int, decoder_bias: Float[Tensor, " d_model"] | None = None) -> None:
        """Set every weight from a seed.

        As the recipe of record says: decoder Kaiming-uniform; encoder its transpose, taken before the columns get unit
        norm; modulation zero, so that training starts unconditioned.  Of the rest it says nothing, and here is chosen:
        biases of encoder and decoder zero (`decoder_bias`: the mean of the targets, say); the time MLP as `nn.Linear` starts,
        uniform within 1 / sqrt(inputs), biases too; skip path zero, so that it starts without.  The published system's own
        class starts its time MLP otherwise (see `TemporalAwareTranscoder`).
        """
        generator = torch.Generator().manual_seed(seed)
        self._initialise_matrices(generator)
        self.encoder.bias.zero_()
        if decoder_bias is None:
            self.output_bias.zero_()
        else:
            self.output_bias.copy_(decoder_bias)
        self.normalise_decoder()
        if self.config.time_embed_dim is not None:
            for layer in (self.time_mlp[0], self.time_mlp[2]):
                assert isinstance(layer, nn.Linear)
                bound = 1 / math.sqrt(layer.in_features)  # the default of nn.Linear, here from our generator
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)
            self.mod_linear.weight.zero_()
            self.mod_linear.bias.zero_()
        if self.config.skip:
            self.skip.weight.zero_()
        if self.config.activation == "batchtopk":
            self.threshold.zero_()
        if self.config.activation == "jumprelu":
            self.log_threshold.fill_(math.log(FIRST_THRESHOLD))

    def _initialise_matrices(self, generator: torch.Generator) -> None:
        nn.init.kaiming_uniform_(self.decoder.weight, generator=generator)
        self.encoder.weight.copy_(self.decoder.weight.T)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Give every decoder column unit norm, in place."""
        unit_columns_(self.decoder.weight)


class Transcoder(Dictionary):
    """Explains what an MLP writes by sparse features of what it reads."""


class SAE(Dictionary):
    """Explains what an MLP writes by sparse features of itself."""


class PreBiasSAE(SAE):
    """An SAE of the second family: `pre_bias` is taken off before the encoder and added back after the decoder."""

    def _build(self) -> None:
        self.decoder = nn.Linear(self.config.n_features, self.config.d_model, bias=False)
        self.pre_bias = nn.Parameter(torch.zeros(self.config.d_model))

    def prepare(self, x: Float[Tensor, "row d_model"], sigma: Float[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
        """What the encoder's matrix is applied to; sigma plays no part."""
        return x - self.pre_bias

    def decode(self, z: Float[Tensor, "row n_features"]) -> Float[Tensor, "row d_model"]:
        """Target rows as the features explain them."""
        return self.decoder(z) + self.pre_bias  # type: ignore[no-any-return]

    @property
    def output_bias(self) -> nn.Parameter:
        """What `decode` adds to the features' directions: `pre_bias`."""
        return self.pre_bias

    def _initialise_matrices(self, generator: torch.Generator) -> None:
        """The encoder Kaiming-uniform, the decoder its transpose: the other way round than in the recipe of record."""
        nn.init.kaiming_uniform_(self.encoder.weight, generator=generator)
        self.decoder.weight.copy_(self.encoder.weight.T)


def build(config: DictionaryConfig, metrics: Mapping[str, Any] | None = None, empty: bool = False) -> Dictionary:
    """An untrained dictionary of the class that `config` asks for, in float32; `empty`: without memory, to be filled."""
    kind = PreBiasSAE if config.family == "flux-sae" else Transcoder if config.kind == "transcoder" else SAE
    with torch.device("meta") if empty else nullcontext():
        return kind(config, metrics)


def one_hot(index: Int[Tensor, " row"], count: int) -> Float[Tensor, "row count"]:
    """Rows of the identity, float32."""
    return torch.eye(count, device=index.device)[index]
