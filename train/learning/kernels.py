"""The heavy part of a training step: encoder, activation and decoder with their gradients.

Least work a row: 12 * d_model * n_features operations for a dense dictionary conditioned on sigma (4 forward, 4 for
the gradients of the weights, 2 for z's, 2 for x's; 10 without x's).  Beside the products the dense (row, n_features)
matrix is only touched where it must be:

1. `relu_pass` walks over blocks of rows that stay in the cache: product, bias, ReLU and column sums in place.
2. One matrix z is kept for the backward pass, in a buffer that the next step uses again: on a CPU fresh pages
   cost as much as a bfloat16 product does.
3. Backward, block by block again: z's gradient is made beside the cache-warm block, gets the L1 part and the
   ReLU mask, and takes z's place.
4. TopK never keeps a dense matrix: the k greatest are found block by block (`greatest`) and everything after
   that is a weighted sum of rows (`torch.nn.functional.embedding_bag`), also the gradients of the weights, whose
   entries are sorted by feature first.  Where `sparse_pays` says that products of dense matrices are quicker,
   they are made of one buffer, and not kept either.

There is no Triton here: with CUDA the same calls run torch's own kernels (`bench/gpu_step.py` measures them).
`torch.compile` leaves these functions as they are, since they manage buffers, and compiles what stands around them.
On a CPU sums have one order for a given thread count.  Imports torch only: a script can load this one file.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable would import the compiler right here
from torch.autograd.function import once_differentiable
from torch.nn import functional

BLOCK_BYTES = 8 << 20
"""of the dense (row, n_features) matrix that are worked on at once on a CPU, so that they stay in the cache"""
LEAST_ROWS = 256
"""rows of a block, at least: fewer make slow products"""
SPARE_BUFFERS = 2
PAYS = {"float32": 20, "bfloat16": 40, "cuda": 256}
"""features for each active one from which on sparse products pay

CPU: decoder and backward pass of 4,096 rows, d_model 512, 8,192 features on one Sapphire Rapids core, milliseconds sparse
against dense: float32 231 / 1,607 at k 64, 937 / 1,586 at 256; bfloat16 207 / 611 at 64, 271 / 392 at 128, 610 / 515 at
256.  CUDA, not measured: on an H100 a sum reads 2 bytes an entry and channel at about 2.5 TB/s, a product does 2
operations at about 600 TFLOP/s, so they meet at 240.
"""


class Pass(NamedTuple):
    """What `relu_pass` gives back."""

    y_hat: Tensor
    """(row, d_model), in the dtype of the products"""
    sparsity: Tensor
    """(): mean over rows of sum_f |z_f|, float32, differentiable"""
    l0: Tensor | None
    """(): mean active features a row, float32, no gradient; None unless asked for"""
    fired: Tensor | None
    """(n_features,) bool: active on some row; None unless asked for"""


class Sparse(NamedTuple):
    """Feature activations as row-wise runs: entries offsets[r] to offsets[r + 1] are those of row r."""

    values: Tensor
    """(entry,) activations, differentiable"""
    features: Tensor
    """(entry,) int64"""
    offsets: Tensor
    """(row + 1,) int64"""
    n_features: int


class _Buffers:
    """Large CPU matrices to be used again: an exclusive loan from `take` until `give`, or for good.

    Above 32 MiB the C library gives memory back when it is freed, and the next step has every page made anew: 22 ms
    for the 64 MiB of a step of record in bfloat16, where one of its six products takes 16 to 60.
    """

    def __init__(self) -> None:
        self._spare: list[Tensor] = []

    def take(self, rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A (rows, columns) matrix of undefined content."""
        wanted = (rows, columns), dtype, like.device
        fit = [index for index, spare in enumerate(self._spare) if (spare.shape, spare.dtype, spare.device) == wanted]
        return self._spare.pop(fit[0]) if fit else torch.empty(wanted[0], dtype=dtype, device=like.device)

    def give(self, buffer: Tensor) -> None:
        """Lend it to the next who takes one of its shape; CUDA has an allocator that does so already."""
        if buffer.device.type == "cpu":
            self._spare = [*self._spare, buffer][-SPARE_BUFFERS:]


_buffers = _Buffers()


def release_buffers() -> None:
    """Give the memory back that the next step would use again: none follows for a while."""
    _buffers._spare.clear()


@_disable_dynamo
def relu_pass(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b_dec: Tensor, *, count: bool = False, fired: bool = False
) -> Pass:
    """`y_hat = W_dec z + b_dec` with `z = relu(W_enc x + b_enc)`, and the mean sum of |z|; both differentiable.

    `x` (row, d_model) is what the encoder's matrix is applied to; weights are shaped as `nn.Linear` has them.
    Under autocast the products are made in its dtype and y_hat has it, as with plain operations; each block's column
    sums, of z and of its gradient, are rounded to it before they are added in float32 (exact ones take 1.6 times as
    long).  In float32 y_hat and the gradients of the matrices are plain operations' to rounding.  Backward uses z up.
    """
    tensors = (x, w_enc, b_enc, w_dec, b_dec)
    dtype = dtype_of_products(x)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    with torch.autocast(x.device.type, enabled=False):
        return Pass(*_ReluPass.apply(*tensors, dtype, keep, count, fired))  # type: ignore[no-untyped-call]


class _ReluPass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b_dec: Tensor,
        dtype: torch.dtype, keep: bool, count: bool, fired: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        rows, n_features = len(x), len(w_enc)
        x, w_enc, b_enc, w_dec, b_dec = (tensor.to(dtype) for tensor in (x, w_enc, b_enc, w_dec, b_dec))
        z = _buffers.take(rows, n_features, x, dtype)
        sums = torch.zeros(n_features, dtype=_at_least_float32(dtype), device=x.device)
        active = torch.zeros((), dtype=torch.int64, device=x.device)
        for part in _blocks(z):
            torch.addmm(b_enc, x[part], w_enc.T, out=z[part]).clamp_min_(0)
            sums += z[part].sum(dim=0)
            if count:  # 7 times as fast as count_nonzero
                active += z[part].sign().sum(dim=0, dtype=torch.float32).long().sum()
        y_hat = functional.linear(z, w_dec, b_dec)
        found = sums > 0 if fired else None  # z >= 0, and no sum of such is zero unless all are
        l0 = active.float() / rows if count else None
        ctx.mark_non_differentiable(*(tensor for tensor in (l0, found) if tensor is not None))
        if keep:
            ctx.save_for_backward(x, w_enc, w_dec)
            ctx.z = z
        else:
            _buffers.give(z)
        return y_hat, sums.sum() / rows, l0, found

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor, dsparsity: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w_enc, w_dec = ctx.saved_tensors
        z, ctx.z = ctx.z, None
        assert z is not None, "relu_pass: a second backward pass, but the first has used z up"
        dy = dy.to(z.dtype)
        l1 = dsparsity / len(z)
        dw_dec = dy.T.contiguous() @ z  # bfloat16 products lose a third on a transposed first matrix
        blocks = _blocks(z)
        scratch = torch.empty_like(z[blocks[0]])
        wide = _at_least_float32(z.dtype)
        db_enc = torch.zeros(z.shape[1], dtype=wide, device=z.device)
        for part in blocks:
            dz = scratch[: len(z[part])]
            torch.mm(dy[part], w_dec, out=dz).add_(l1)
            torch.ops.aten.threshold_backward.grad_input(dz, z[part], 0, grad_input=z[part])
            db_enc += z[part].sum(dim=0)
        if z.dtype == torch.bfloat16 and z.device.type == "cpu":  # there this way round is a fifth quicker
            dw_enc = torch.empty(w_enc.shape, dtype=wide).copy_((x.T.contiguous() @ z).T)
        else:
            dw_enc = (z.T @ x).to(wide)
        dx = z @ w_enc if ctx.needs_input_grad[0] else None
        _buffers.give(z)
        return dx, dw_enc, db_enc, dw_dec.to(wide), dy.sum(dim=0, dtype=wide), *[None] * 4


def encode_topk(x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> Sparse:
    """ReLU, then the `k` greatest activations of each row: exactly k entries a row, zeros may be among them."""
    return _encode(x, w_enc, b_enc, k, of_batch=False)


def encode_batch_topk(x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> Sparse:
    """ReLU, then the `k * rows` greatest activations of the whole batch, in the order of the rows and features."""
    return _encode(x, w_enc, b_enc, k, of_batch=True)


@_disable_dynamo
def _encode(x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, of_batch: bool) -> Sparse:
    dtype = dtype_of_products(x)
    with torch.autocast(x.device.type, enabled=False):
        return Sparse._make((*_Encode.apply(x, w_enc, b_enc, k, of_batch, dtype), len(w_enc)))  # type: ignore[no-untyped-call]


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, of_batch: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, w_enc, b_enc = (tensor.to(dtype) for tensor in (x, w_enc, b_enc))
        find = _greatest_of_batch if of_batch else _greatest_of_rows
        values, features, offsets = find(x, w_enc, b_enc, k)
        ctx.mark_non_differentiable(features, offsets)
        ctx.save_for_backward(x, w_enc, values, features, offsets)
        return values, features, offsets

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dvalues: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w_enc, values, features, offsets = ctx.saved_tensors
        dz = Sparse(torch.where(values > 0, dvalues, 0), features, offsets, len(w_enc))
        wide = _at_least_float32(x.dtype)
        dw_enc = _transposed_product(dz, x).to(wide)
        db_enc = torch.zeros(len(w_enc), dtype=wide, device=x.device).index_add_(0, features, dz.values.to(wide))
        dx = _product(dz, w_enc) if ctx.needs_input_grad[0] else None
        return dx, dw_enc, db_enc, None, None, None


def _greatest_of_rows(x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, n_features = len(x), len(w_enc)
    values = torch.empty(rows, k, dtype=x.dtype, device=x.device)
    features = torch.empty(rows, k, dtype=torch.int64, device=x.device)
    blocks = _blocks(x.new_empty(()).expand(rows, n_features))
    scratch = torch.empty(len(x[blocks[0]]), n_features, dtype=x.dtype, device=x.device)
    for part in blocks:
        pre = torch.addmm(b_enc, x[part], w_enc.T, out=scratch[: len(x[part])])
        values[part], features[part] = greatest(pre, k)
    offsets = torch.arange(0, rows * k + 1, k, device=x.device)
    return values.clamp_min_(0).flatten(), features.flatten(), offsets


def _greatest_of_batch(x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, n_features = len(x), len(w_enc)
    pre = _buffers.take(rows, n_features, x, x.dtype)
    torch.addmm(b_enc, x, w_enc.T, out=pre)
    kept = greatest(pre.view(1, -1), k * rows)[1].flatten().sort().values
    values = pre.view(-1)[kept].clamp_min_(0)
    _buffers.give(pre)
    row = torch.div(kept, n_features, rounding_mode="floor")
    offsets = torch.searchsorted(row, torch.arange(rows + 1, device=x.device))
    return values, kept - row * n_features, offsets


def greatest(dense: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns of the `k` greatest entries of each row, in no particular order; among equals any.

    In two steps, about twice as fast on a CPU as one: columns fall into groups, and the k groups with the greatest
    maxima hold the k greatest entries, so only those are looked at.  The matrix is read once.
    """
    columns = dense.shape[1]
    width = _group_width(columns, k)
    if width == 1:
        top = torch.topk(dense, k, dim=1, sorted=False)
        return top.values, top.indices
    groups = columns // width  # group g holds the columns g, g + groups, g + 2 * groups, ...
    chosen = dense.view(len(dense), width, groups).amax(dim=1).topk(k, dim=1, sorted=False).indices
    members = torch.arange(0, columns, groups, device=dense.device)[None, :, None] + chosen[:, None, :]
    members = members.flatten(1)
    values, index = dense.gather(1, members).topk(k, dim=1, sorted=False)
    return values, members.gather(1, index)


def _group_width(columns: int, k: int) -> int:
    """A power of two that divides `columns`, near sqrt(columns / k): then both steps look at equally many entries."""
    width = 1
    while (2 * width) ** 2 * k <= 2 * columns and columns % (2 * width) == 0:
        width *= 2
    return width


@_disable_dynamo
def decode_sparse(z: Sparse, w_dec: Tensor) -> Tensor:
    """`W_dec z` (row, d_model), without a bias; differentiable in `z.values` and `w_dec`.

    Under autocast in its dtype, with float32 sums.  A `w_dec` (d_model, n_features) whose memory lies feature by
    feature, such as the transpose of a contiguous matrix, saves a copy.
    """
    dtype = dtype_of_products(z.values)
    with torch.autocast(w_dec.device.type, enabled=False):
        return _Decode.apply(*z, w_dec, dtype)  # type: ignore[no-any-return, no-untyped-call]


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, features: Tensor, offsets: Tensor, n_features: int, w_dec: Tensor, dtype: torch.dtype
    ) -> Tensor:
        z = Sparse(values.to(dtype), features, offsets, n_features)
        by_feature = w_dec.to(dtype).T.contiguous()
        ctx.save_for_backward(z.values, features, offsets, by_feature)
        return _product(z, by_feature)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        values, features, offsets, by_feature = ctx.saved_tensors
        z = Sparse(values, features, offsets, len(by_feature))
        dy = dy.to(values.dtype)
        dvalues = _gathered_dots(z, dy, by_feature) if ctx.needs_input_grad[0] else None
        dw_dec = _transposed_product(z, dy).to(_at_least_float32(dy.dtype)).T if ctx.needs_input_grad[4] else None
        return dvalues, None, None, None, dw_dec, None


def sparse_pays(
    rows: int, d_model: int, n_features: int, k: int, device: torch.device | str, dtype: torch.dtype
) -> bool:
    """Whether weighted sums of `k` rows are quicker than products with the dense (row, n_features) matrix.

    Both costs are rows * d_model times k or n_features, so n_features / k decides, against `PAYS`.
    """
    if torch.device(device).type != "cpu":
        return k * PAYS["cuda"] <= n_features
    return k * PAYS["bfloat16" if dtype == torch.bfloat16 else "float32"] <= n_features


def _product(z: Sparse, matrix: Tensor) -> Tensor:
    """`z @ matrix`: (row, d_model) of (n_features, d_model)."""
    if _is_dense(z, matrix):
        dense = _filled(z)
        result = dense @ matrix
        _buffers.give(dense)
        return result
    return _sums(z.features, matrix, z.offsets, z.values)


def _transposed_product(z: Sparse, matrix: Tensor) -> Tensor:
    """`z.T @ matrix`: (n_features, d_model) of (row, d_model)."""
    if _is_dense(z, matrix):
        dense = _filled(z)
        result = dense.T @ matrix
        _buffers.give(dense)
        return result
    ordered, order = z.features.int().sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(z.n_features + 1, dtype=torch.int32, device=ordered.device))
    return _sums(_rows(z)[order], matrix, starts, z.values[order])


def _gathered_dots(z: Sparse, dy: Tensor, by_feature: Tensor) -> Tensor:
    """(entry,) the products of dy's rows with the columns of the decoder that z's entries stand for."""
    if not _is_dense(z, dy):
        offsets, rows = z.offsets[:-1].int(), _rows(z).int()
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(  # type: ignore[no-any-return]
            dy.contiguous(), by_feature, z.features.int(), offsets, rows, 0
        )
    dense = _buffers.take(len(dy), z.n_features, dy, dy.dtype)
    torch.mm(dy, by_feature.T, out=dense)
    result = dense.view(-1)[_rows(z) * z.n_features + z.features]
    _buffers.give(dense)
    return result


def _sums(index: Tensor, matrix: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of `matrix`, one for each run of `index`; float32 sums, in the order of the run."""
    return functional.embedding_bag(
        index.int(), matrix.contiguous(), starts.int(), mode="sum", per_sample_weights=weights, include_last_offset=True
    )


@torch.no_grad()
def unit_columns_(weight: Tensor) -> None:
    """Give every column of a (d_model, n_features) matrix unit norm, in place; a zero column stays zero.

    Squares and their sums are two vectorised passes; `Tensor.norm(dim=0)` takes six times as long on a CPU.
    """
    weight.div_(weight.square().sum(dim=0).sqrt_().clamp_min_(1e-12))


def dense_of(z: Sparse) -> Tensor:
    """(row, n_features) with zeros where `z` has no entry; differentiable in `z.values`."""
    return z.values.new_zeros(len(z.offsets) - 1, z.n_features).index_put((_rows(z), z.features), z.values)


def _filled(z: Sparse) -> Tensor:
    """The same in a buffer."""
    dense = _buffers.take(len(z.offsets) - 1, z.n_features, z.values, z.values.dtype).zero_()
    dense.view(-1)[_rows(z) * z.n_features + z.features] = z.values
    return dense


def _rows(z: Sparse) -> Tensor:
    """(entry,) int64: the row of each entry."""
    counts = z.offsets.diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=len(z.features))


def _is_dense(z: Sparse, like: Tensor) -> bool:
    rows = len(z.offsets) - 1
    k = math.ceil(len(z.features) / max(rows, 1))
    return not sparse_pays(rows, like.shape[1], z.n_features, k, like.device, like.dtype)


def dtype_of_products(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _blocks(z: Tensor) -> list[slice]:
    """Runs of rows of a (row, n_features) matrix: of a size that stays in the cache on a CPU, else one run."""
    rows, columns = z.shape
    size = max(LEAST_ROWS, BLOCK_BYTES // (columns * z.element_size())) if z.device.type == "cpu" else max(rows, 1)
    return [slice(first, min(first + size, rows)) for first in range(0, max(rows, 1), size)]
