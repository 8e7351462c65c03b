"""One training step at full size on one GPU: `python bench/gpu_step.py [--batch 4096] [--json FILE]`.

Imports torch only and loads `train/learning/kernels.py` by its path, so this file and that one are all that a machine with a GPU needs
(both may lie in one folder).  Under 8 minutes and 40 GB at d_model 3072, 49,152 features.

1. The kernels against plain operations on dense matrices, on the device, in float32 and under autocast.
2. The bfloat16 peak: the best rate of a large square product.
3. Steps of the recipe of record: the loop written as the reference's is described (rows gathered at random, with replacement,
   from a buffer in RAM; AdamW parameter by parameter; decoder columns divided by their norms), in float32 and under autocast;
   ours (`relu_pass`, fused AdamW); plain operations that `torch.compile` has fused, with fused AdamW.
4. Steps of TopK: sparse products, products of dense matrices, and plain `torch.topk` with a scattered matrix.

TFLOP/s count 12 * d_model * n_features a row.  Goals: ours at least twice the reference's rate under autocast, and at least
45 % of the peak measured here.  CUDA graphs are left out: about a hundred kernels a step cost under 1 ms of about 20 to start.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

L1, K, SIGMAS = 3e-4, 64, (1.0, 0.75390625, 0.5, 0.25)
Features = Callable[["Model", Tensor], tuple[Tensor, Tensor]]
"""(y_hat, mean sum of |z|) of prepared rows"""


def load_kernels() -> ModuleType:
    """`train/learning/kernels.py`, beside this file or where the checkout has it; without the package, which wants more than torch."""
    here = Path(__file__).resolve().parent
    path = next(
        path for path in (here / "kernels.py", here.parent / "train" / "learning" / "kernels.py") if path.exists()
    )
    spec = importlib.util.spec_from_file_location("granary_kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Model(nn.Module):
    """The architecture of record, with the initialisation of the recipe of record."""

    def __init__(self, d_model: int, n_features: int, device: torch.device, width: int = 256) -> None:
        super().__init__()
        with device:
            self.encoder, self.decoder = nn.Linear(d_model, n_features), nn.Linear(n_features, d_model)
            self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
            self.mod_linear = nn.Linear(width, 2 * d_model)
            self.embedding = torch.randn(len(SIGMAS), width)  # stands for the sinusoids, which cost nothing
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.decoder.weight)
            self.encoder.weight.copy_(self.decoder.weight.T)
            self.decoder.weight.div_(self.decoder.weight.norm(dim=0, keepdim=True))

    def prepare(self, x: Tensor, step: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            modulation = self.mod_linear(self.time_mlp(self.embedding))
            modulation = functional.one_hot(step, len(SIGMAS)).float() @ modulation
            scale, shift = modulation.chunk(2, dim=-1)
            return torch.addcmul(x + shift, x, scale)


def plain_relu(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    z = functional.relu(model.encoder(x))
    return model.decoder(z), z.sum(dtype=torch.float32) / len(z)


def plain_topk(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    top = torch.topk(functional.relu(model.encoder(x)), K, dim=1, sorted=False)
    z = torch.zeros(len(x), model.encoder.out_features, dtype=top.values.dtype, device=x.device)
    return model.decoder(z.scatter(1, top.indices, top.values)), torch.zeros((), device=x.device)


def our_relu(kernels: ModuleType) -> Features:
    def features(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        encoder, decoder = model.encoder, model.decoder
        return kernels.relu_pass(x, encoder.weight, encoder.bias, decoder.weight, decoder.bias)[:2]  # type: ignore[no-any-return]

    return features


def our_topk(kernels: ModuleType, dense: bool) -> Features:
    def features(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        kernels.PAYS = dict.fromkeys(kernels.PAYS, 10**9 if dense else 0)
        z = kernels.encode_topk(x, model.encoder.weight, model.encoder.bias, K)
        return kernels.decode_sparse(z, model.decoder.weight) + model.decoder.bias, torch.zeros((), device=x.device)

    return features


def total_loss(features: Features, model: Model, x: Tensor, y: Tensor, step: Tensor, autocast: bool) -> Tensor:
    """The loss of record; TopK has no L1."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y_hat, sparsity = features(model, model.prepare(x, step))
    residual = (y - y_hat.float()).square().sum(dim=1).mean() / (y.var(dim=0, correction=0).sum() + 1e-6)
    return residual + L1 * sparsity


class Buffer:
    """Rows in RAM."""

    def __init__(self, rows: int, d_model: int, batch: int, device: torch.device) -> None:
        self.x, self.y = (torch.randn(rows, d_model).bfloat16() for _ in range(2))
        self.step = torch.randint(len(SIGMAS), (rows,))
        self.batch, self.device, self.taken = batch, device, 0

    def gathered(self) -> list[Tensor]:
        """As the reference takes them: at random, with replacement."""
        index = torch.randint(len(self.x), (self.batch,))
        return [
            self.x[index].to(self.device).float(),
            self.y[index].to(self.device).float(),
            self.step[index].to(self.device),
        ]

    def run(self) -> list[Tensor]:
        """The next rows, on the device already: our loader copies ahead on a stream of its own."""
        if self.taken == 0:
            self.ready = [t[: self.batch].to(self.device) for t in (self.x, self.y, self.step)]
        self.taken += 1
        return [self.ready[0].float(), self.ready[1].float(), self.ready[2]]


def synchronised(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The best of repeated runs within about so many seconds, after two to warm up."""
    best, ends = float("inf"), 0.0
    for turn in range(10_000):
        begun = synchronised(device)
        work()
        ended = synchronised(device)
        if turn == 1:
            ends = ended + seconds
        if turn > 1:
            best = min(best, ended - begun)
            if ended > ends:
                break
    return best


def step_of(
    features: Features, sizes: argparse.Namespace, buffer: Buffer, *, autocast: bool, reference: bool, unit: Callable[[Tensor], object],
    compiled: bool = False,
) -> Callable[[], None]:  # fmt: skip
    """A training step of a fresh model."""
    model = Model(sizes.d_model, sizes.n_features, buffer.device)
    how: dict[str, Any] = {"foreach": False} if reference else {"fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0, **how)
    loss = torch.compile(total_loss) if compiled else total_loss

    def step() -> None:
        x, y, index = buffer.gathered() if reference else buffer.run()
        optimizer.zero_grad(set_to_none=True)
        loss(features, model, x, y, index, autocast).backward()
        optimizer.step()
        with torch.no_grad():
            unit(model.decoder.weight)

    return step


def divide_by_norms(weight: Tensor) -> None:
    weight.div_(weight.norm(dim=0, keepdim=True))


def errors(kernels: ModuleType, device: torch.device) -> dict[str, float]:
    """Greatest relative error (Frobenius) of values and gradients against plain float32 operations on the same features."""
    torch.manual_seed(0)
    rows, d_model, n_features = 512, 96, 1024
    shapes = ((rows, d_model), (n_features, d_model), (n_features,), (d_model, n_features), (d_model,))
    given = [(torch.randn(*shape, device=device) * 0.2).requires_grad_() for shape in shapes]
    found: dict[str, float] = {}
    for name in ("relu", "topk sparse", "topk dense"):
        kernels.PAYS = dict.fromkeys(kernels.PAYS, 10**9 if name == "topk dense" else 0)
        for autocast in (False, True):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                if name == "relu":
                    y_hat, sparsity = kernels.relu_pass(*given)[:2]
                    kept: Tensor | float = 1.0
                else:
                    z = kernels.encode_topk(*given[:3], 16)
                    kept = kernels.dense_of(z._replace(values=torch.ones_like(z.values))).float().detach()
                    y_hat = kernels.decode_sparse(z, given[3]) + given[4]
                    sparsity = z.values.sum(dtype=torch.float32) / rows
            dense = functional.relu(functional.linear(*given[:3])) * kept
            y = functional.linear(dense, *given[3:])
            pairs = [(y_hat, y), (sparsity, dense.sum() / rows)]
            gradients = [
                torch.autograd.grad(out.float().square().mean() + 0.1 * s, given)
                for out, s in ((y_hat, sparsity), (y, pairs[1][1]))
            ]
            pairs += list(zip(*gradients, strict=True))
            worst = max(float(((a.float() - b).norm() / b.norm()).detach()) for a, b in pairs)
            found[f"{name}, {'bfloat16' if autocast else 'float32'}"] = worst
    return found


def peak(device: torch.device, size: int, seconds: float) -> float:
    """TFLOP/s of the quickest bfloat16 product of square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / seconds_of(lambda: torch.mm(a, b, out=out), device, seconds) / 1e12


def measure(sizes: argparse.Namespace, device: torch.device, kernels: ModuleType, top: float) -> list[dict[str, Any]]:
    """One line for each kind of step."""
    buffer = Buffer(sizes.buffer, sizes.d_model, sizes.batch, device)
    unit, ours = kernels.unit_columns_, our_relu(kernels)
    kinds: list[tuple[str, Features, dict[str, Any]]] = [
        ("reference's loop, float32", plain_relu, {"autocast": False, "reference": True, "unit": divide_by_norms}),
        ("reference's loop, autocast", plain_relu, {"autocast": True, "reference": True, "unit": divide_by_norms}),
        ("ours", ours, {"autocast": True, "reference": False, "unit": unit}),
        ("TopK, sparse products", our_topk(kernels, False), {"autocast": True, "reference": False, "unit": unit}),
        ("TopK, dense products", our_topk(kernels, True), {"autocast": True, "reference": False, "unit": unit}),
        ("TopK, plain torch.topk", plain_topk, {"autocast": True, "reference": False, "unit": unit}),
    ]
    if sizes.compile:
        how = {"autocast": True, "reference": False, "unit": torch.compile(unit), "compiled": True}
        kinds.insert(3, ("plain, torch.compile", plain_relu, how))
    lines = []
    for name, features, how in kinds:
        line: dict[str, Any] = {"step": name, "batch": sizes.batch}
        try:
            taken = seconds_of(step_of(features, sizes, buffer, **how), device, sizes.seconds)
            rate = 12 * sizes.d_model * sizes.n_features * sizes.batch / taken / 1e12
            line |= {"ms": 1e3 * taken, "rows_per_second": sizes.batch / taken, "tflops": rate, "of_peak": rate / top}
        except (torch.OutOfMemoryError, RuntimeError) as error:  # one kind that fails must not hide the others
            line["error"] = f"{type(error).__name__}: {error}"[:300]
        if device.type == "cuda":
            line["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            torch.cuda.reset_peak_memory_stats(device)
        lines.append(line)
        print(text_of(line), flush=True)
        gc.collect()
        with contextlib.suppress(AttributeError):
            torch.cuda.empty_cache()
    return lines


def text_of(line: dict[str, Any]) -> str:
    if "error" in line:
        return f"{line['step']:<28} {line['batch']:>6}   {line['error']}"
    memory = f"  {line['peak_gb']:>5.1f} GB" if "peak_gb" in line else ""
    return (
        f"{line['step']:<28} {line['batch']:>6}  {line['ms']:>9.2f} ms  {line['rows_per_second']:>10,.0f} rows/s  "
        f"{line['tflops']:>7.2f} TFLOP/s  {100 * line['of_peak']:>5.1f} % of peak{memory}"
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the table and the JSON; the JSON is given back as well."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--d-model", type=int, default=3072)
    parser.add_argument("--n-features", type=int, default=49_152)
    parser.add_argument("--batch", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--seconds", type=float, default=8.0, help="spent on each kind of step, beside its warm-up")
    parser.add_argument("--small", action="store_true", help="small sizes, also without a GPU: whether it runs at all")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    sizes = parser.parse_args(arguments)
    if sizes.small:
        sizes.d_model, sizes.n_features, sizes.batch, sizes.seconds = 64, 512, [256], 0.0
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --small runs on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    kernels = load_kernels()
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "errors": errors(kernels, device)}
    found["peak_tflops"] = peak(device, 128 if sizes.small else 8192, 0.0 if sizes.small else 3.0)
    print(f"{name}, torch {torch.__version__}; bfloat16 peak measured here {found['peak_tflops']:.1f} TFLOP/s")
    print("greatest relative errors: " + ", ".join(f"{what} {error:.1e}" for what, error in found["errors"].items()))
    sizes.buffer, sizes.compile, found["steps"] = 64 * min(sizes.batch) // 4, device.type == "cuda", []
    for batch in sizes.batch:
        found["steps"] += measure(
            argparse.Namespace(**{**vars(sizes), "batch": batch}), device, kernels, found["peak_tflops"]
        )
    print(json.dumps(found))
    if sizes.json is not None:
        sizes.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
