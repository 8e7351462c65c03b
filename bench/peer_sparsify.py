"""eai-sparsify in the comparison: its `Trainer.fit`, hooked to a model that gives rows where another would compute them."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.peer import NotSupportedError, Task, Trainer, main


class Rows(nn.Module):
    """A model whose one layer gives the next batch, whatever it is asked."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.width, self.device = width, torch.device("cpu")
        self.dummy_inputs = {"x": torch.zeros(1, 1, dtype=torch.long)}
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.source: Iterator[Tensor] | None = None

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.source is None:
            return torch.as_tensor(self.layer(torch.zeros(*x.shape, self.width)))
        return torch.as_tensor(self.layer(next(self.source)[None]))


class Sparsify:
    """A `SparseCoder` of `Trainer`; signum, its default optimizer, and its other defaults."""

    def __init__(self, task: Task) -> None:
        if task.activation != "topk":
            raise NotSupportedError("it has TopK and GroupMax alone")
        if task.bfloat16:
            raise NotSupportedError("its autocast is for CUDA alone")
        from sparsify import SparseCoderConfig, TrainConfig
        from sparsify import Trainer as SparsifyTrainer

        self.task, self.folder = task, Path(tempfile.mkdtemp())
        self.rows = torch.from_numpy(np.load(task.rows))
        self.model = Rows(self.rows.shape[1])
        config = TrainConfig(
            SparseCoderConfig(num_latents=task.n_features, k=task.k), batch_size=1, lr=task.lr, hookpoints=["layer"],
            save_every=10**9, save_dir=str(self.folder), log_to_wandb=False,
        )  # fmt: skip
        self.trainer = SparsifyTrainer(config, Sequences(10**6, task.batch), self.model)

    def batches(self) -> Iterator[Tensor]:
        """As its `DataLoader` over a memory-mapped file of ids makes them, each id a row here."""
        from sparsify.data import MemmapDataset
        from torch.utils.data import DataLoader

        whole = len(self.rows) // self.task.batch * self.task.batch
        np.random.default_rng(0).permutation(len(self.rows))[:whole].astype(np.uint32).tofile(self.folder / "ids")
        data = MemmapDataset(str(self.folder / "ids"), self.task.batch, dtype=np.uint32)
        while True:
            for batch in DataLoader(data, batch_size=1, shuffle=False):
                yield self.rows[batch["input_ids"][0]]

    def train(self, batches: Iterable[Tensor]) -> None:
        self.model.source = iter(batches)
        try:
            self.trainer.fit()
        except StopIteration:
            pass
        finally:
            self.model.source = None

    def weights(self) -> dict[str, Tensor]:
        for optimizer in self.trainer.optimizers:
            optimizer.eval()  # schedule-free: the averaged weights
        coder = self.trainer.saes["layer"]
        return {
            "encoder.weight": coder.encoder.weight, "encoder.bias": coder.encoder.bias,
            "decoder.weight": coder.W_dec.T, "pre_bias": coder.b_dec,
        }  # fmt: skip


class Sequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """So many sequences of so many ids, all zero."""

    def __init__(self, count: int, length: int) -> None:
        self.count, self.ids = count, torch.zeros(length, dtype=torch.long)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids}


def make(task: Task) -> Trainer:
    return Sparsify(task)


if __name__ == "__main__":
    main(make)
