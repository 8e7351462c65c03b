"""Kept rows leave a GPU while it computes: `python bench/gpu_staging.py [--small] [--json FILE]`.

Imports torch only and loads `harvest/lanes.py` by its path, so this file and that one are all that a machine with a GPU needs (both may
lie in one folder).  Under 3 minutes and 30 GB with the sizes of FLUX.1 at 512 pixels: 16 blocks of two streams, d_model 3072,
1024 image and 512 text tokens, batches of 4, four steps; a stand-in for the model multiplies matrices as large as its blocks do.

1. Bytes: what arrives is what `.cpu()` gives of the same rows, for 64 tokens and for all, bfloat16 kept and float32 converted.
2. Overlap: seconds of the steps alone; with rows selected and sent through the ring; and with a plain `.cpu()` of each site's
   rows in its hook, as a straightforward harvest would.  "Waited" is the time in which the GPU had nothing left to compute.
3. Rate: bytes a second through pinned memory on a side stream while nothing computes, which bounds a harvest of all tokens.

Goal: 64 tokens through the ring cost at most 1.08 of the steps alone.  Without a GPU (`--small`) the same ring runs in a CPU's memory.
"""

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

POINTS = ("mlp_in", "mlp_out")


def load_lanes() -> ModuleType:
    """`harvest/lanes.py`, beside this file or where the checkout has it; without the package, which wants more than torch."""
    here = Path(__file__).resolve().parent
    path = next(path for path in (here / "lanes.py", here.parent / "harvest" / "lanes.py") if path.exists())
    spec = importlib.util.spec_from_file_location("granary_lanes", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Sizes:
    """What stands for the model, and what is kept of it."""

    blocks: int
    d_model: int
    tokens: dict[str, int]
    batch: int
    steps: int
    few: int
    """image tokens, where not all are kept; as many text tokens"""


FLUX = Sizes(16, 3072, {"img": 1024, "txt": 512}, 4, 4, 64)
SMALL = Sizes(2, 16, {"img": 12, "txt": 8}, 2, 3, 5)


class StandIn:
    """Blocks of two matrix products, as wide as an MLP of FLUX, and attention over both streams; calls `hook` as blocks end."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        rng = torch.Generator(device).manual_seed(0)
        wide = 4 * sizes.d_model
        self.sizes = sizes

        def weight(rows: int, columns: int) -> Tensor:
            values: Tensor = torch.randn(rows, columns, generator=rng, device=device, dtype=dtype)
            return values / math.sqrt(columns)

        self.up = [weight(wide, sizes.d_model) for _ in range(4)]  # a few that blocks share, to spare memory
        self.down = [weight(sizes.d_model, wide) for _ in range(4)]
        total = sum(sizes.tokens.values())
        self.begin = torch.randn(sizes.batch, total, sizes.d_model, generator=rng, device=device, dtype=dtype)

    @torch.inference_mode()
    def step(self, number: int, hook: Callable[[int, str, str, Tensor], None] | None) -> Tensor:
        """One denoising step; `hook(block, stream, point, rows)`."""
        hidden = self.begin * (1 + number)
        for block in range(self.sizes.blocks):
            heads = hidden.view(*hidden.shape[:2], max(self.sizes.d_model // 128, 1), -1).transpose(1, 2)
            mixed = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
            ends = {"txt": mixed[:, : self.sizes.tokens["txt"]], "img": mixed[:, self.sizes.tokens["txt"] :]}
            outs = []
            for stream, part in ends.items():
                given = torch.nn.functional.layer_norm(part, part.shape[-1:])
                inner = torch.nn.functional.gelu(given @ self.up[block % 4].T, approximate="tanh")
                out = inner @ self.down[block % 4].T
                if hook is not None:
                    hook(block, stream, "mlp_in", given)
                    hook(block, stream, "mlp_out", out)
                outs.append(out)
            hidden = mixed + torch.cat(outs, 1)
        return hidden


class Memory:
    """A CPU's memory in place of a device (`harvest.lanes.Port`): to try a ring where there is no GPU."""

    def on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    pinned = on_device

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        for source, target in pairs:
            target.copy_(source)

    def wait(self, copied: None) -> None:
        pass

    def mark(self) -> None:
        pass

    def passed(self, mark: None) -> bool:
        return True


class Kept:
    """Goes the way of `harvest.staging` with the lanes themselves: hooks fill slots, steps send them, a thread moves them."""

    def __init__(self, lanes: ModuleType, sizes: Sizes, few: bool, device: torch.device, stored: torch.dtype) -> None:
        self.lanes, self.sizes, self.stored, self.device = lanes, sizes, stored, device
        self.lane = lanes.lane_of(device) if device.type == "cuda" else lanes.Ring(Memory())
        self.kept = {stream: min(sizes.few, total) if few else total for stream, total in sizes.tokens.items()}
        self.index = {stream: self._index(stream) if few else None for stream in sizes.tokens}
        self.arrays = {
            (stream, step, point): torch.zeros(
                sizes.blocks, sizes.batch, self.kept[stream], sizes.d_model, dtype=stored
            )
            for stream in sizes.tokens
            for step in range(sizes.steps)
            for point in POINTS
        }
        self.waited = 0.0
        self.traffic = lanes.Traffic(2, self._move, self._wait, idle=self.lane.idle)
        self.slot: Any = None

    @property
    def bytes(self) -> int:
        """Of what is kept of all steps."""
        return sum(array.nbytes for array in self.arrays.values())

    def _index(self, stream: str) -> Tensor:
        rng = torch.Generator().manual_seed(1)
        total, count = self.sizes.tokens[stream], self.kept[stream]
        rows = [torch.randperm(total, generator=rng)[:count].sort().values + i * total for i in range(self.sizes.batch)]
        return torch.stack(rows).to(self.device)

    def hook(self, block: int, stream: str, point: str, rows: Tensor) -> None:
        if self.slot is None:
            self.slot = self.traffic.take()
        piece = self.slot.pieces.get((stream, point))
        if piece is None:
            shape = (self.sizes.blocks, self.sizes.batch, self.kept[stream], self.sizes.d_model)
            with torch.inference_mode(False):
                piece = self.slot.pieces[stream, point] = self.lane.piece(shape, rows.dtype, self.stored)
        self.lanes.select_into(piece.staged[block], rows, self.index[stream], None)

    def step_ended(self, step: int) -> None:
        self.lane.send(self.slot, self.sizes.batch)
        self.traffic.send(self.slot, step)
        self.slot = None

    def _move(self, slot: Any, step: int) -> None:
        self.lane.arrive(slot)
        for (stream, point), piece in slot.pieces.items():
            self.lane.move(piece, self.arrays[stream, step, point])

    def _wait(self, seconds: float) -> None:
        self.waited += seconds


def draw(model: StandIn, kept: Kept | None) -> None:
    """All steps, and the end of all that was sent."""
    for step in range(model.sizes.steps):
        model.step(step, None if kept is None else kept.hook)
        if kept is not None:
            kept.step_ended(step)
    synchronize(model.begin.device)
    if kept is not None:
        kept.traffic.drain()


def draw_plainly(model: StandIn, kept: Kept, into: dict[Any, Tensor]) -> None:
    """The same rows, each site's selected, converted and taken by `.cpu()` in its hook, before the model goes on."""
    for step in range(model.sizes.steps):

        def hook(block: int, stream: str, point: str, rows: Tensor, step: int = step) -> None:
            index = kept.index[stream]
            chosen = rows if index is None else rows.flatten(0, 1)[index]
            into[block, stream, step, point] = chosen.to(kept.stored).cpu()

        model.step(step, hook)
    synchronize(model.begin.device)


def synchronize(device: torch.device) -> None:
    """Wait for all that was asked of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def differing(model: StandIn, kept: Kept) -> int:
    """How many sites' rows differ in a bit from those that a plain `.cpu()` gives; two passes, so that slots go round."""
    expected: dict[Any, Tensor] = {}
    draw_plainly(model, kept, expected)
    draw(model, kept)
    draw(model, kept)
    return sum(
        not torch.equal(kept.arrays[stream, step, point][block], rows)
        for (block, stream, step, point), rows in expected.items()
    )


def best(work: Callable[[], object], rounds: int) -> float:
    """The shortest of so many runs, after one to warm up."""
    seconds = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])


def cases(lanes: ModuleType, sizes: Sizes, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """Every case, as it is measured."""
    for computed, stored in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)):
        model = StandIn(sizes, device, computed)
        for few in (True, False):
            kept = Kept(lanes, sizes, few, device, stored)
            wrong = differing(model, kept)
            alone = best(lambda model=model: draw(model, None), rounds)  # type: ignore[misc]
            kept.waited = 0.0
            ring = best(lambda model=model, kept=kept: draw(model, kept), rounds)  # type: ignore[misc]
            waited = kept.waited / (rounds + 1)
            plain = best(lambda model=model, kept=kept: draw_plainly(model, kept, {}), rounds)  # type: ignore[misc]
            slot = kept.traffic.take()
            one_step = sum(piece.landed.nbytes for piece in slot.pieces.values())

            def copy(kept: Kept = kept, slot: Any = slot) -> None:
                kept.lane.send(slot, sizes.batch)
                kept.lane.arrive(slot)

            rate = one_step / best(copy, rounds)
            kept.traffic.close()
            yield {
                "computed": str(computed), "stored": str(stored), "tokens": dict(kept.kept), "bytes": kept.bytes, "wrong": wrong,
                "alone": alone, "ring": ring, "waited": waited, "plain": plain, "overhead": ring / alone,
                "plain_overhead": plain / alone, "bytes_a_second": rate,
            }  # fmt: skip


def main(words: list[str] | None = None) -> list[dict[str, Any]]:
    """Run every case and print it; exit code 1 where a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="sizes for a test")
    parser.add_argument("--device", help="default: cuda, and a CPU for --small where there is none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    chosen = parser.parse_args(words)
    if chosen.device is None and not chosen.small and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --small tries this script on a CPU")
    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.backends.cuda.matmul.allow_tf32 = True
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    found = []
    for case in cases(load_lanes(), SMALL if chosen.small else FLUX, device, chosen.rounds):
        found.append(case)
        print(
            f"{case['computed']} -> {case['stored']}, {case['tokens']} tokens, {case['bytes'] / 1e6:,.0f} MB: "
            f"{case['wrong']} sites differ; steps alone {case['alone']:.3f} s, ring {case['ring']:.3f} s ({case['overhead']:.3f}), waited "
            f"{case['waited']:.3f} s, .cpu() in hooks {case['plain']:.3f} s ({case['plain_overhead']:.3f}); "
            f"{case['bytes_a_second'] / 1e9:.1f} GB/s",
            flush=True,
        )
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "cases": found}, indent=1))
    if any(case["wrong"] for case in found):
        sys.exit("what arrived is not what .cpu() gives")
    return found


if __name__ == "__main__":
    main()
