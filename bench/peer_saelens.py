"""sae-lens in the comparison: its `SAETrainer` and its `mixing_buffer`, over the rows in RAM."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from bench.peer import Task, Trainer, main

BUFFER = 64
"""batches in the mixing buffer; its default is 20 contexts of 2048"""


class SaeLens:
    """A `TopKTrainingSAE` or `StandardTrainingSAE`; Adam and its other defaults."""

    def __init__(self, task: Task) -> None:
        from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        self.task = task
        self.rows = torch.from_numpy(np.load(task.rows))
        width = self.rows.shape[1]
        if task.activation == "topk":
            self.sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=width, d_sae=task.n_features, k=task.k))
        else:
            self.sae = StandardTrainingSAE(
                StandardTrainingSAEConfig(d_in=width, d_sae=task.n_features, l1_coefficient=task.l1)
            )
        config = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=task.batch,
            lr=task.lr,
            lr_end=task.lr,
            lr_warm_up_steps=20,
            autocast=task.bfloat16,
        )
        self.trainer = SAETrainer(config, self.sae, iter(()))

    def batches(self) -> Iterator[Tensor]:
        from sae_lens.training.mixing_buffer import mixing_buffer

        return mixing_buffer(BUFFER * self.task.batch, self.task.batch, self._chunks())

    def _chunks(self) -> Iterator[Tensor]:
        while True:
            yield from self.rows.split(BUFFER // 4 * self.task.batch)

    def train(self, batches: Iterable[Tensor]) -> None:
        for batch in batches:
            self.trainer.step(batch)
            self.trainer.n_training_steps += 1

    def weights(self) -> dict[str, Tensor]:
        if self.task.activation == "topk":
            self.sae.fold_W_dec_norm()
        return {
            "encoder.weight": self.sae.W_enc.T, "encoder.bias": self.sae.b_enc,
            "decoder.weight": self.sae.W_dec.T, "pre_bias": self.sae.b_dec,
        }  # fmt: skip


def make(task: Task) -> Trainer:
    return SaeLens(task)


if __name__ == "__main__":
    main(make)
