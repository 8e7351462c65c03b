"""dictionary-learning in the comparison: its trainers, and its `ActivationBuffer` refilled from the rows in RAM."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.peer import NotSupportedError, Task, Trainer, main

BUFFER = 64
"""batches in the activation buffer; its default is 3e4 contexts of 128"""


class DictionaryLearning:
    """A `TopKTrainer` or `StandardTrainer` with its defaults, but a warm-up that fits a short training."""

    def __init__(self, task: Task) -> None:
        if task.bfloat16:
            raise NotSupportedError("its trainSAE turns autocast off on a CPU")
        from dictionary_learning.trainers.standard import StandardTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.task = task
        self.rows = torch.from_numpy(np.load(task.rows))
        about: dict[str, Any] = {
            "steps": 10**6, "activation_dim": self.rows.shape[1], "dict_size": task.n_features, "layer": 0, "lm_name": "rows",
            "lr": task.lr, "warmup_steps": 20, "device": "cpu",
        }  # fmt: skip
        if task.activation == "topk":
            self.trainer = TopKTrainer(**about, k=task.k)
        else:
            self.trainer = StandardTrainer(**about, l1_penalty=task.l1, sparsity_warmup_steps=20)
        self.step = 0

    def batches(self) -> Iterator[Tensor]:
        from dictionary_learning import ActivationBuffer

        rows = self.rows

        class Buffer(ActivationBuffer):  # type: ignore[misc]
            """The buffer as it is; a refill takes rows where the model would be run."""

            def refresh(self) -> None:
                kept = self.activations[~self.read]
                lacking = self.activation_buffer_size - len(kept)
                places = torch.arange(self.place, self.place + lacking) % len(rows)
                self.place = int(places[-1]) + 1
                self.activations = torch.cat([kept, rows[places]])
                self.read = torch.zeros(len(self.activations), dtype=torch.bool)

        class Model:
            dtype = torch.float32

        batch = self.task.batch
        buffer = Buffer(None, Model(), None, rows.shape[1], n_ctxs=BUFFER, ctx_len=batch, out_batch_size=batch)
        buffer.place = 0
        return iter(buffer)

    def train(self, batches: Iterable[Tensor]) -> None:
        for batch in batches:
            self.trainer.update(self.step, batch)
            self.step += 1

    def weights(self) -> dict[str, Tensor]:
        ae = self.trainer.ae
        bias = ae.b_dec if self.task.activation == "topk" else ae.bias
        return {
            "encoder.weight": ae.encoder.weight, "encoder.bias": ae.encoder.bias,
            "decoder.weight": ae.decoder.weight, "pre_bias": bias,
        }  # fmt: skip


def make(task: Task) -> Trainer:
    return DictionaryLearning(task)


if __name__ == "__main__":
    main(make)
