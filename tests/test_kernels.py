"""The kernels of a training step against plain operations on dense matrices: values, gradients, bits, memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench import gpu_step
from train.learning import kernels
from train.learning.kernels import Sparse, decode_sparse, dense_of, encode_batch_topk, encode_topk, greatest, relu_pass

ROWS, D_MODEL, N_FEATURES, K = 300, 24, 160, 12
NAMES = ("x", "w_enc", "b_enc", "w_dec", "b_dec")
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}
"""of a matrix's relative Frobenius error"""
Encode = Callable[[Tensor, Tensor, Tensor, int], Sparse]


def tensors(dtype: torch.dtype = torch.float32, rows: int = ROWS, bias: float = 0.0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(7)
    shapes = ((rows, D_MODEL), (N_FEATURES, D_MODEL), (N_FEATURES,), (D_MODEL, N_FEATURES), (D_MODEL,))
    made = [torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]
    made[2] += bias
    return [tensor.requires_grad_() for tensor in made]


def loss(y_hat: Tensor, sparsity: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, y_hat.numel(), dtype=y_hat.dtype).view_as(y_hat)
    return (y_hat * weights + y_hat.square() / 7).sum() / 50 + 0.3 * sparsity


def dense(given: list[Tensor], features: Sparse | None = None) -> tuple[Tensor, Tensor]:
    """(y_hat, mean sum of |z|) by plain operations; `features`: only those entries are kept."""
    x, w_enc, b_enc, w_dec, b_dec = given
    z = functional.relu(functional.linear(x, w_enc, b_enc))
    if features is not None:
        z = z * dense_of(features._replace(values=torch.ones_like(features.values).to(z.dtype)))
    return functional.linear(z, w_dec, b_dec), z.sum() / max(len(z), 1)


def error(found: Tensor, expected: Tensor) -> float:
    return float(
        (found.double() - expected.double()).norm().detach() / expected.double().norm().detach().clamp_min(1e-30)
    )


def gradients(y_hat: Tensor, sparsity: Tensor, given: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(NAMES, torch.autograd.grad(loss(y_hat, sparsity), given), strict=True))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name in NAMES:
        assert found[name].dtype == expected[name].dtype
        assert error(found[name], expected[name]) <= tolerance, name


@pytest.fixture(params=["sparse", "dense"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Weighted sums of rows, or products with a dense matrix, whatever the rule says."""
    least = 0 if request.param == "sparse" else 10**9
    monkeypatch.setattr(kernels, "PAYS", dict.fromkeys(kernels.PAYS, least))
    return str(request.param)


@pytest.mark.parametrize("block_rows", [64, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relu_pass_equals_plain_operations(
    dtype: torch.dtype, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "LEAST_ROWS", block_rows)
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 0)
    given = tensors(dtype)
    found, (y_hat, sparsity) = relu_pass(*given, count=True, fired=True), dense(given)
    assert error(found.y_hat, y_hat) <= TOLERANCE[dtype]
    assert error(found.sparsity, sparsity) <= TOLERANCE[dtype]
    assert_close(gradients(found.y_hat, found.sparsity, given), gradients(y_hat, sparsity, given), TOLERANCE[dtype])
    active = functional.linear(*given[:3]) > 0
    assert found.l0 is not None and found.fired is not None
    assert float(found.l0) == pytest.approx(float(active.sum()) / ROWS)
    assert torch.equal(found.fired, active.any(dim=0))


def test_relu_pass_under_autocast_is_as_exact_as_autocast() -> None:
    given = tensors()
    exact = gradients(*dense(given), given)
    with torch.autocast("cpu", torch.bfloat16):
        found, (y_hat, sparsity) = relu_pass(*given), dense(given)
    assert found.y_hat.dtype == torch.bfloat16 and found.sparsity.dtype == torch.float32
    assert error(found.sparsity, dense(given)[1]) <= 1e-3
    plain = gradients(y_hat.float(), sparsity.float(), given)
    mine = gradients(found.y_hat.float(), found.sparsity, given)
    for name in NAMES:
        assert error(mine[name], exact[name]) <= max(1.3 * error(plain[name], exact[name]), 4e-3), name


def test_relu_pass_gives_the_input_no_gradient_unless_it_wants_one() -> None:
    given = tensors()
    given[0].requires_grad_(False)
    found = relu_pass(*given)
    loss(found.y_hat, found.sparsity).backward()
    assert given[0].grad is None and given[1].grad is not None


def test_relu_pass_of_rows_on_which_nothing_is_active_leaves_only_the_bias_to_learn() -> None:
    given = tensors(bias=-1000.0)
    found = relu_pass(*given, count=True, fired=True)
    assert torch.equal(found.y_hat, given[4].expand(ROWS, -1))
    assert found.l0 == 0 and found.fired is not None and not found.fired.any()
    learned = gradients(found.y_hat, found.sparsity, given)
    assert [name for name in NAMES if learned[name].any()] == ["b_dec"]


def test_relu_pass_uses_its_buffer_again_but_never_one_that_is_still_needed() -> None:
    given = tensors()
    first, second = relu_pass(*given), relu_pass(*[t.detach().clone().mul_(2).requires_grad_() for t in given])
    expected = gradients(*dense(given), given)
    del second
    assert_close(gradients(first.y_hat, first.sparsity, given), expected, TOLERANCE[torch.float32])
    with torch.no_grad():
        relu_pass(*given)
    third = relu_pass(*given)
    assert_close(gradients(third.y_hat, third.sparsity, given), expected, TOLERANCE[torch.float32])


def test_relu_pass_refuses_a_second_backward_pass() -> None:
    given = tensors()
    total = loss(*relu_pass(*given)[:2])
    total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="has used z up"):
        total.backward()


@pytest.mark.parametrize("encode", [encode_topk, encode_batch_topk])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_sparse_features_and_their_gradients_equal_the_dense_ones(
    encode: Encode, dtype: torch.dtype, rows: int, products: str
) -> None:
    given = tensors(dtype, rows)
    z = encode(*given[:3], K)
    pre = functional.relu(functional.linear(*given[:3]))
    kept = (torch.topk(pre, K, dim=1) if encode is encode_topk else torch.topk(pre.flatten(), K * rows)).indices
    view = pre if encode is encode_topk else pre.flatten()
    expected = torch.zeros_like(view).scatter(-1, kept, view.gather(-1, kept)).view_as(pre)
    assert torch.equal(dense_of(z), expected)
    y_hat, sparsity = decode_sparse(z, given[3]) + given[4], z.values.sum() / rows
    y_dense, sparsity_dense = dense(given, z)
    assert error(y_hat, y_dense) <= TOLERANCE[dtype]
    assert_close(gradients(y_hat, sparsity, given), gradients(y_dense, sparsity_dense, given), TOLERANCE[dtype])


@pytest.mark.parametrize("encode", [encode_topk, encode_batch_topk])
def test_sparse_features_under_autocast_are_as_exact_as_autocast(encode: Encode, products: str) -> None:
    given = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        z = encode(*given[:3], K)
        y_hat = decode_sparse(z, given[3]) + given[4]
    exact_y, exact_sparsity = dense(given, z)
    assert z.values.dtype == torch.bfloat16
    assert error(y_hat, exact_y) <= TOLERANCE[torch.bfloat16]
    found = gradients(y_hat.float(), z.values.sum(dtype=torch.float32) / ROWS, given)
    assert_close(found, gradients(exact_y, exact_sparsity, given), TOLERANCE[torch.bfloat16])


def test_ragged_and_empty_rows_are_decoded(products: str) -> None:
    draw = torch.Generator().manual_seed(3)
    offsets = torch.tensor([0, 0, 3, 3, 4, 9, 9])
    values = torch.randn(9, generator=draw).requires_grad_()
    z = Sparse(values, torch.tensor([5, 0, 159, 5, 1, 2, 3, 4, 159]), offsets, N_FEATURES)
    w_dec = tensors()[3]
    y, expected = decode_sparse(z, w_dec), dense_of(z) @ w_dec.T
    assert error(y, expected) <= TOLERANCE[torch.float32]
    assert not y[0].any() and not y[2].any()
    ours, theirs = (torch.autograd.grad(loss(out, out.sum()), (values, w_dec)) for out in (y, expected))
    for mine, its in zip(ours, theirs, strict=True):
        assert error(mine, its) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("encode", [encode_topk, encode_batch_topk])
def test_k_may_be_all_features(encode: Encode, products: str) -> None:
    given = tensors()
    z = encode(*given[:3], N_FEATURES)
    assert error(decode_sparse(z, given[3]) + given[4], dense(given)[0]) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("encode", [encode_topk, encode_batch_topk])
def test_rows_on_which_nothing_is_active_have_entries_of_zero(encode: Encode, products: str) -> None:
    given = tensors(bias=-1000.0)
    z = encode(*given[:3], K)
    assert len(z.values) == K * ROWS and not z.values.any()
    learned = gradients(decode_sparse(z, given[3]) + given[4], z.values.sum(), given)
    assert [name for name in NAMES if learned[name].any()] == ["b_dec"]


@pytest.mark.parametrize(("columns", "k"), [(160, 12), (1024, 3), (1024, 64), (96, 1), (64, 64), (45, 2), (1000, 1)])
def test_greatest_finds_what_a_sort_finds_among_ties_too(columns: int, k: int) -> None:
    draw = torch.Generator().manual_seed(columns)
    for distinct in (3, 10**6):
        matrix = torch.randint(-distinct, distinct, (50, columns), generator=draw).float()
        values, index = greatest(matrix, k)
        assert torch.equal(values.sort(dim=1).values, matrix.sort(dim=1).values[:, -k:])
        assert torch.equal(matrix.gather(1, index), values)
        assert all(len(set(row)) == k for row in index.tolist())


def test_the_width_of_groups_divides_the_columns() -> None:
    for columns, k, width in ((8192, 64, 16), (49_152, 64, 32), (12_288, 1200, 4), (3072 * 16, 3072, 4), (45, 2, 1)):
        assert kernels._group_width(columns, k) == width
        assert columns % width == 0 and columns // width >= k


@pytest.mark.parametrize("autocast", [False, True])
def test_the_same_input_gives_the_same_bits(autocast: bool, products: str) -> None:
    def run() -> list[Tensor]:
        given = tensors()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            done = relu_pass(*given)
            z, batch = encode_topk(*given[:3], K), encode_batch_topk(*given[:3], K)
            y_hat = done.y_hat + decode_sparse(z, given[3]) + decode_sparse(batch, given[3])
        total = loss(y_hat.float(), done.sparsity)
        return [y_hat, total, *torch.autograd.grad(total, given)]

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_no_dense_matrix_is_kept_for_the_backward_pass_of_topk() -> None:
    given = tensors()
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        decode_sparse(encode_topk(*given[:3], K), given[3])
        decode_sparse(encode_batch_topk(*given[:3], K), given[3])
    assert sizes and max(sizes) < ROWS * N_FEATURES / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_products_pay_where_few_features_are_active(dtype: torch.dtype) -> None:
    pays = [kernels.sparse_pays(4096, 512, 8192, k, "cpu", dtype) for k in (1, 64, 1024, 8192)]
    assert pays == [True, True, False, False]


def test_unit_columns_have_unit_norm_and_zero_columns_stay_zero() -> None:
    weight = tensors()[3].detach().clone()
    weight[:, 3] = 0
    expected = weight / weight.norm(dim=0, keepdim=True).clamp_min(1e-12)
    kernels.unit_columns_(weight)
    assert torch.allclose(weight, expected, rtol=1e-6, atol=0)
    assert not weight[:, 3].any()


def test_the_script_for_gpus_runs_at_a_small_size_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu_step.main(["--small"])
    assert [line["step"] for line in found["steps"] if line.get("tflops", 0) > 0] == [
        "reference's loop, float32",
        "reference's loop, autocast",
        "ours",
        "TopK, sparse products",
        "TopK, dense products",
        "TopK, plain torch.topk",
    ]
    assert max(found["errors"].values()) < 0.03
    assert "rows/s" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_kernels_on_cuda_equal_the_dense_ones(autocast: bool, products: str) -> None:
    given = [tensor.detach().cuda().requires_grad_() for tensor in tensors()]
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        done, z = relu_pass(*given), encode_topk(*given[:3], K)
        y_hat = decode_sparse(z, given[3]) + given[4]
    tolerance = TOLERANCE[torch.bfloat16 if autocast else torch.float32]
    assert error(done.y_hat, dense(given)[0]) <= tolerance
    assert error(y_hat, dense(given, z)[0]) <= tolerance
    found = torch.autograd.grad(done.y_hat.float().square().mean() + y_hat.float().square().mean(), given)
    expected = torch.autograd.grad(dense(given)[0].square().mean() + dense(given, z)[0].square().mean(), given)
    for mine, its in zip(found, expected, strict=True):
        assert error(mine, its) <= tolerance
