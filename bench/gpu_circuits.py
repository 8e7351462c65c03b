"""Attribution graphs at full FLUX dimensions with random weights on one GPU: `python bench/gpu_circuits.py [--json FILE]`.

Needs torch and this checkout, with the little that its modules of arrays import (numpy, ml_dtypes, jaxtyping); no diffusers, no zarr.
Under 8 minutes and 75 GB.

1. A transformer of FLUX.1's sizes (`bench.plain_flux`) runs once on random latents: 1,024 image and 512 text tokens.  What its
   first double blocks did is the trace; transcoders are random, each feature active at `--share` of the tokens.
2. The rate of a plain square product on the device, in float32, in TF32 and in bfloat16.
3. Ours: a graph is grown to `--nodes` expanded nodes, `--batch` at once, in float32 and with TF32 products.
4. The reference's way (`bench.reference_circuits`) on some of the same nodes, evenly over their blocks: one forward pass of the
   patched transformer to its end and one backward pass a node, in `--dtype` (bfloat16, as FLUX is run; float32 wants 141 GB).

Goals: at least 20 times the reference's speed, and 1,000 nodes in under a minute.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
GOAL_NODES, GOAL_SECONDS = 1_000, 60


def without_programs() -> None:
    """Let the modules of arrays be imported where the programs cannot be: no `train/__init__.py`, and no store without zarr."""
    if "train" not in sys.modules:
        package: Any = ModuleType("train")
        package.__path__ = [str(ROOT / "train")]
        sys.modules["train"] = package
        package.Dictionary = importlib.import_module("train.dictionaries.dictionary").Dictionary
    if importlib.util.find_spec("zarr") is None:
        store: Any = importlib.import_module("store")
        store.Store = object  # only named in annotations


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the table and the JSON; the JSON is given back as well."""
    sizes = settings(arguments)
    without_programs()
    bench = Bench(sizes)
    found: dict[str, Any] = {"device": bench.name, "torch": torch.__version__, "settings": vars(sizes) | {"json": None}}
    found["tflops"] = {kind: bench.plain_rate(kind) for kind in ("float32", "tf32", "bfloat16")}
    rates = ", ".join(f"{kind} {rate:.3g}" for kind, rate in found["tflops"].items())
    print(f"{bench.name}, torch {torch.__version__}; plain products, TFLOP/s: {rates}", flush=True)
    found["ours"] = [bench.ours(kind, found["tflops"][kind]) for kind in ("float32", "tf32")]
    found["reference"] = bench.reference()
    for line in found["ours"]:
        line["speed"] = found["reference"]["seconds_per_node"] / line["seconds_per_node"]
        print(
            f"{line['kind']:<8} {1e3 * line['seconds_per_node']:>9.3f} ms a node, {line['speed']:>6.1f} times the reference's speed; "
            f"{GOAL_NODES:,} nodes in {GOAL_NODES * line['seconds_per_node']:.1f} s (goal {GOAL_SECONDS})"
        )
    print(json.dumps(found))
    if sizes.json is not None:
        sizes.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


def settings(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for; `--small` shrinks everything, so that the script can be tried on a CPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--nodes", type=int, default=GOAL_NODES, help="expanded nodes")
    parser.add_argument("--batch", type=int, default=50, help="nodes that are expanded at once")
    parser.add_argument("--blocks", type=int, default=16, help="double blocks traced")
    parser.add_argument("--features", type=int, default=49_152, help="features of a transcoder")
    parser.add_argument("--share", type=float, default=0.01, help="of the features that are active at a token")
    parser.add_argument("--threshold", type=float, default=1e-4, help="edges under it are summed up only")
    parser.add_argument("--memory", type=float, default=48.0, help="GB for our model, half of it for blocks")
    parser.add_argument("--sample", type=int, default=8, help="nodes that the reference's way is timed on")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the transformer")
    parser.add_argument("--small", action="store_true", help="small sizes, also without a GPU: whether it runs at all")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    sizes = parser.parse_args(arguments)
    if sizes.small:
        sizes.nodes, sizes.batch, sizes.blocks, sizes.features, sizes.share, sizes.sample = 9, 4, 3, 64, 0.2, 3
        sizes.dtype = "float32"
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --small runs on a CPU")
    return sizes


class Bench:
    """A random transformer, its trace and its transcoders on the device."""

    def __init__(self, sizes: argparse.Namespace) -> None:
        cases, flux, way = (
            importlib.import_module(f"bench.{name}") for name in ("circuit_cases", "plain_flux", "reference_circuits")
        )
        self.sizes, self.cases, self.way = sizes, cases, way
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        shape = flux.Shape(2, 16, 4, 2, 12, 20, 10, (4, 6, 6)) if sizes.small else flux.Shape()
        n_txt, grid = (4, (2, 3)) if sizes.small else (512, (32, 32))
        self.case = cases.Case(shape, n_txt, grid, sizes.blocks, sizes.features, sizes.share)
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, sizes.dtype))
        try:
            with self.device:
                torch.manual_seed(0)
                transformer = flux.PlainFlux(shape).requires_grad_(False)
                inputs = {key: value.to(self.device) for key, value in cases.random_inputs(self.case).items()}
        finally:
            torch.set_default_dtype(dtype)
        for name in ("img_ids", "txt_ids"):
            inputs[name] = inputs[name].float()
        self.recording = way.record(transformer, inputs, sizes.blocks)
        self.transcoders = {
            site: dictionary.to(getattr(torch, sizes.dtype))
            for site, dictionary in cases.random_transcoders(self.recording, sizes.features, sizes.share).items()
        }
        self.nodes: list[Any] = []

    def plain_rate(self, kind: str) -> float:
        """TFLOP/s of a product of large square matrices."""
        size = 256 if self.sizes.small else 8192
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        with _Tf32(kind == "tf32"):
            best = min(self.seconds(lambda: torch.mm(a, b)) for _ in range(5))
        return 2 * size**3 / best / 1e12

    def seconds(self, work: Any) -> float:
        """How long `work` takes, the device's queue emptied before and after."""
        self.wait()
        begun = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - begun

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def ours(self, kind: str, rate: float) -> dict[str, Any]:
        """The graph grown by our model; its nodes are kept for the reference."""
        self.recording.transformer.single_transformer_blocks.to(
            "cpu"
        )  # what makes room for tables of decoder directions
        before = self._allocated()
        with _Tf32(kind == "tf32"):
            first, seconds, active = self._grown_twice()
        peak = self._peak() - before
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.recording.transformer.single_transformer_blocks.to(self.device)
        work, number = self._work(self.nodes, active, self.sizes.batch).ours, len(self.nodes)
        line = {
            "kind": kind, "nodes": number, "seconds": seconds, "seconds_per_node": seconds / number, "first_batch": first,
            "tflop_per_node": work / number / 1e12, "tflops": work / seconds / 1e12,
            "of_floor": seconds / (work / rate / 1e12), "peak_gb": peak / 1e9,
        }  # fmt: skip
        print(
            f"ours, {kind}: {number:,} nodes in {seconds:.2f} s, {line['tflops']:.3g} TFLOP/s ({line['of_floor']:.2f} of the floor), "
            f"{line['peak_gb']:.1f} GB; first batch, model read: {first:.2f} s",
            flush=True,
        )
        return line

    def _grown_twice(self) -> tuple[float, float, dict[Any, int]]:
        """Seconds of the first batch, for which the model is read, and of the whole graph; active features of each site."""
        frozen, trace = (importlib.import_module(f"analyze.circuits.{name}") for name in ("frozen", "trace"))
        source = trace.Trace(self.recording, torch.float32, self.device)
        model = frozen.FrozenModel(source, self.transcoders, int(self.sizes.memory * 1e9))
        first = self.seconds(partial(self.grow, frozen, model, self.sizes.batch))
        seconds = self.seconds(partial(self.grow, frozen, model, self.sizes.nodes))
        return first, seconds, {site: len(model.active(site).token) for site in model.sites}

    def grow(self, frozen: Any, model: Any, count: int) -> None:
        """Expand the strongest source of image feature after image feature, from the most active one of the topmost block on."""
        site = max((site for site in model.sites if site.stream == "img"), key=lambda site: int(site.layer))
        active = model.active(site)
        best = int(active.z.argmax())
        waiting = {self.cases.Node(site, int(active.token[best]), int(active.feature[best])): 1.0}
        done: dict[Any, None] = {}
        while waiting and len(done) < count:
            few = min(self.sizes.batch, count - len(done))
            nodes = sorted(waiting, key=lambda node: -waiting[node])[:few]
            targets = [frozen.Target((frozen.Member(node.site, node.token, node.feature),)) for node in nodes]
            found = model.attribute(targets, self.sizes.threshold)
            done |= dict.fromkeys(nodes)
            for node in nodes:
                del waiting[node]
            strongest = np.argsort(-np.abs(found.value))[: 4 * self.sizes.batch]
            for at in strongest[np.asarray([model.sites[found.site[at]].layer > 0 for at in strongest], dtype=bool)]:
                node = self.cases.Node(model.sites[found.site[at]], int(found.token[at]), int(found.feature[at]))
                if node not in done:
                    waiting[node] = max(waiting.get(node, 0.0), abs(float(found.value[at])))
        self.nodes = list(done)

    def reference(self) -> dict[str, Any]:
        """The reference's way on some of the nodes, evenly over their blocks."""
        ordered = sorted(self.nodes, key=lambda node: int(node.site.layer))
        places = np.linspace(0, len(ordered) - 1, min(self.sizes.sample, len(ordered))).round().astype(int)
        nodes = [ordered[place] for place in places]
        before = self._allocated()
        reference = self.way.Reference(self.recording, self.transcoders, self.sizes.threshold)
        with reference.patched():
            reference.edges(nodes[0].site, nodes[0].token, nodes[0].feature)
            seconds = [self.seconds(lambda n=node: reference.edges(n.site, n.token, n.feature)) for node in nodes]
        work = self._work(nodes, {}, len(nodes)).reference
        total = sum(seconds)
        line = {
            "dtype": self.sizes.dtype, "nodes": len(nodes), "seconds": total, "seconds_per_node": total / len(nodes),
            "tflop_per_node": work / len(nodes) / 1e12, "tflops": work / total / 1e12, "peak_gb": (self._peak() - before) / 1e9,
        }  # fmt: skip
        print(
            f"the reference's way, {line['dtype']}: {1e3 * line['seconds_per_node']:.1f} ms a node, {line['tflops']:.3g} TFLOP/s, "
            f"{line['peak_gb']:.1f} GB beside the transformer", flush=True,
        )  # fmt: skip
        return line

    def _work(self, nodes: Sequence[Any], active: dict[Any, int], batch: int) -> Any:
        shape = self.case.shape
        return self.cases.operations(self.case, nodes, active, batch, shape.double_blocks, shape.single_blocks)

    def _allocated(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())

    def _peak(self) -> int:
        return int(torch.cuda.max_memory_allocated()) if self.device.type == "cuda" else 0


class _Tf32:
    """While it lasts, float32 products may be made in TF32, or may not."""

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.allowed

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self.before


if __name__ == "__main__":
    main()
