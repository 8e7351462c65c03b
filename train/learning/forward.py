"""The forward pass while training: features of a whole batch, their reconstructions, and what is counted on the way.

Which code computes it is decided by rule, never by what happens to work:

    relu                           one fused pass                          kernels.relu_pass
    topk, batchtopk, where sparse decoding is measured to pay              kernels.encode_*, decode_sparse
    everything else, and whatever is nested                                dense matrices, `train.dictionaries.activations`

Nested (Matryoshka) prefixes, Bussmann et al. 2025: each prefix of the features must explain the target alone.  The
reconstructions are cumulative, prefix after prefix, so that no column of the decoder is multiplied twice.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from train.dictionaries.activations import jump_relu, keep_top, keep_top_of_batch
from train.dictionaries.config import DictionaryConfig
from train.dictionaries.dictionary import Dictionary
from train.learning.kernels import (
    Sparse,
    decode_sparse,
    dtype_of_products,
    encode_batch_topk,
    encode_topk,
    relu_pass,
    sparse_pays,
)


class Forward(NamedTuple):
    """What training needs of a batch; the skip path is not in it."""

    y_hats: list[Float[Tensor, "row d_model"]]
    """the target as the inner prefixes explain it, and last as all features do"""
    sparsity: Float[Tensor, ""]
    """mean over rows of sum |z|, float32; with jumprelu the mean number of active features"""
    l0: Float[Tensor, ""] | None
    """mean number of active features a row, no gradient; None unless asked for"""
    fired: Bool[Tensor, " n_features"]
    """whether a feature is active on any row"""
    least: Float[Tensor, ""] | None
    """batchtopk: the least activation above zero that was kept, infinite where there is none"""


def forward(
    dictionary: Dictionary, prepared: Float[Tensor, "row d_model"], bandwidth: float, *, count: bool
) -> Forward:
    """Reconstructions of the target from what the encoder's matrix is applied to, as in training."""
    config = dictionary.config
    encoder, decoder = dictionary.encoder, dictionary.decoder
    if not config.nested and config.activation == "relu":
        done = relu_pass(
            prepared, encoder.weight, encoder.bias, decoder.weight, dictionary.output_bias, count=count, fired=True
        )
        assert done.fired is not None
        return Forward([done.y_hat], done.sparsity, done.l0, done.fired, None)
    if not config.nested and pays(config, len(prepared), prepared.device, dtype_of_products(prepared)):
        return _sparse(dictionary, prepared, count)
    return _dense(dictionary, prepared, bandwidth, count)


def pays(config: DictionaryConfig, rows: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a batch of so many rows is decoded from its active features alone, by the measured rule of `kernels`."""
    if config.k is None:
        return False
    return sparse_pays(rows, config.d_model, config.n_features, config.k, device, dtype)


def _sparse(dictionary: Dictionary, prepared: Tensor, count: bool) -> Forward:
    config, encoder = dictionary.config, dictionary.encoder
    assert config.k is not None
    encode = encode_topk if config.activation == "topk" else encode_batch_topk
    z: Sparse = encode(prepared, encoder.weight, encoder.bias, config.k)
    y_hat = decode_sparse(z, dictionary.decoder.weight) + dictionary.output_bias
    sparsity = z.values.sum(dtype=torch.float32) / len(prepared)
    active = z.values.detach() > 0
    l0 = active.sum().float() / len(prepared) if count else None
    times = torch.zeros(config.n_features, dtype=torch.int64, device=prepared.device)
    times.index_add_(0, z.features, active.long())
    return Forward([y_hat], sparsity, l0, times > 0, _least(z.values) if config.activation == "batchtopk" else None)


def _dense(dictionary: Dictionary, prepared: Tensor, bandwidth: float, count: bool) -> Forward:
    config = dictionary.config
    pre = dictionary.encoder(prepared)
    if config.activation == "jumprelu":
        z, sparsity = jump_relu(pre, dictionary.log_threshold.exp(), bandwidth)
    else:
        z = functional.relu(pre)
        if config.k is not None:
            z = (keep_top if config.activation == "topk" else keep_top_of_batch)(z, config.k)
        sparsity = z.sum(dtype=torch.float32) / len(z)
    active = z.detach() > 0
    return Forward(
        decode_prefixes(z, dictionary.decoder.weight, dictionary.output_bias, config.nested),
        sparsity,
        active.sum().float() / len(z) if count else None,
        active.any(dim=0),
        _least(z) if config.activation == "batchtopk" else None,
    )


def decode_prefixes(
    z: Float[Tensor, "row n_features"],
    weight: Float[Tensor, "d_model n_features"],
    bias: Float[Tensor, " d_model"],
    nested: tuple[int, ...],
) -> list[Float[Tensor, "row d_model"]]:
    """The target as each prefix of the features explains it, and last as all do; one without inner prefixes.

    Under autocast each part is a product in its dtype; parts are added in float32, not rounded once more a prefix.
    """
    if not nested:
        return [functional.linear(z, weight, bias)]
    y_hats = [functional.linear(z[:, : nested[0]], weight[:, : nested[0]]).float() + bias]
    for first, last in pairwise([*nested, z.shape[1]]):
        y_hats.append(y_hats[-1] + functional.linear(z[:, first:last], weight[:, first:last]).float())
    return y_hats


def _least(z: Tensor) -> Tensor:
    values = z.detach()
    return values.where(values > 0, torch.inf).min().float()
