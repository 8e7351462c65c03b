"""Traces of a small random FluxTransformer2DModel, captured as harvest captures them, without a pipeline."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from harvest.models.weights import attention_tensors
from harvest.tracing import Tracer, tracing
from store.traces import Traced, TraceDtype, parse_trace_file
from tests.circuit_oracle import HandMade
from tests.small_store import small_meta

N_BLOCKS, SIGMAS = 3, (1.0, 0.75390625)


def flux_traces(seed: int, rows: int, columns: int, n_txt: int, dtype: TraceDtype) -> list[HandMade]:
    """One trace a step of an image of `rows` x `columns` tokens: three blocks with two heads of 16."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=N_BLOCKS, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=10, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm1" in name or name.endswith("bias"):
                parameter.normal_(std=0.1)
    traced = Traced((0,), (0, 1), tuple(range(N_BLOCKS)), dtype)
    meta = replace(small_meta(d_model=32, store_dtype="float16"), traces=traced.attributes())
    files: dict[str, dict[str, Tensor]] = {}
    tracer = Tracer(meta, {0: 0}, lambda traces: files.update({trace.name: dict(trace.tensors) for trace in traces}))
    ids = torch.zeros(rows * columns, 3)
    ids[:, 1], ids[:, 2] = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    with torch.no_grad(), tracing(model, tracer):
        for step, sigma in enumerate(SIGMAS):
            tracer.step = step
            model(
                hidden_states=torch.randn(1, rows * columns, 4), encoder_hidden_states=torch.randn(1, n_txt, 10),
                pooled_projections=torch.randn(1, 8), timestep=torch.tensor([sigma]), img_ids=ids, txt_ids=torch.zeros(n_txt, 3),
            )  # fmt: skip
    found: dict[int, dict[int, dict[str, np.ndarray]]] = {}
    for name, tensors in files.items():
        parsed = parse_trace_file(name)
        assert parsed is not None
        found.setdefault(parsed[1], {})[parsed[2]] = {key: _numpy(values) for key, values in tensors.items()}
    weights = [{name: _numpy(t) for name, t in attention_tensors(model, block).items()} for block in range(N_BLOCKS)]
    return [
        HandMade([found[step][block] for block in range(N_BLOCKS)], weights, sigma) for step, sigma in enumerate(SIGMAS)
    ]


def _numpy(values: Tensor) -> np.ndarray:
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return values.numpy()
