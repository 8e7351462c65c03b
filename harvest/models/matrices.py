"""The matrices of a model as numbers, wherever offloading or quantisation put them.

While the model runs a layer's weights may lie elsewhere than on the device that computes: accelerate keeps them in a map and
puts them in place during the layer's own forward pass only, and diffusers' group offload leaves them on the host until then.
"""

from typing import Any

import torch
from torch import Tensor, nn

from store.errors import UsageError


def tensor_of(layer: nn.Module, name: str, what: str) -> Tensor:
    """A layer's own parameter, detached, as numbers that can be multiplied with; `what` names it in errors.

    `UsageError` for a quantised weight that is not simply a matrix once it is unpacked: the model computes something else then.
    """
    tensor = _placed(layer, name, what)
    refuse_inexact(tensor, what)
    if (state := getattr(tensor, "quant_state", None)) is not None:  # of bitsandbytes, 4 bits a number
        from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-not-found, unused-ignore]

        unpacked: Tensor = dequantize_4bit(tensor.data, state)
        return unpacked
    if _of_torchao(tensor):
        return tensor.dequantize().detach()
    return tensor.detach()


def tensors_of(module: nn.Module, what: str) -> dict[str, Tensor]:
    """Every parameter and buffer that `module.state_dict()` names, as `tensor_of` gives it."""
    found: dict[str, Tensor] = {}
    for path, layer in module.named_modules():
        own = [name for name, _ in layer.named_parameters(recurse=False)]
        own += [name for name, _ in layer.named_buffers(recurse=False) if name not in layer._non_persistent_buffers_set]
        found |= {f"{path}.{name}" if path else name: tensor_of(layer, name, what) for name in own}
    return found


def columns_of(layer: nn.Module, count: int, what: str) -> Tensor:
    """The last `count` columns of a linear layer's weight: (d_model, count).  In a single-stream block they are the MLP's."""
    weight = tensor_of(layer, "weight", what)
    if weight.ndim != 2 or weight.shape[1] < count:
        raise UsageError(f"{what}: a weight of shape {tuple(weight.shape)} has no {count} last columns")
    return weight[:, weight.shape[1] - count :]


def rows_of(layer: nn.Module, name: str, before: int, what: str) -> Tensor:
    """A linear layer's weight or bias without the first `before` outputs."""
    return tensor_of(layer, name, what)[before:]


def refuse_inexact(tensor: Tensor, what: str) -> None:
    """`UsageError` for a weight that the model does not multiply with as it is, or unpacked."""
    kind: Any = type(tensor)
    if getattr(tensor, "quant_state", None) is not None:
        return
    if _of_torchao(tensor):
        if "Activation" not in kind.__name__ and getattr(tensor, "act_quant_kwargs", None) is None:
            return
    elif tensor.is_floating_point() and tensor.itemsize >= torch.float16.itemsize:
        return
    raise UsageError(
        f"{what} is quantised ({kind.__name__}, {tensor.dtype}) together with what it is multiplied with, so that its matrix alone "
        "does not say what the model computes. Leave such sites, copied weights and recomputed targets out (double blocks, "
        "--targets stored, --weights none), or choose another --quantize"
    )


def _of_torchao(tensor: Tensor) -> bool:
    return type(tensor).__module__.partition(".")[0] == "torchao"


def _placed(layer: nn.Module, name: str, what: str) -> Tensor:
    """The parameter itself, also where accelerate would put it in place only when the layer runs."""
    tensor: Tensor = getattr(layer, name)
    if tensor.device.type != "meta":
        return tensor
    weights = getattr(getattr(layer, "_hf_hook", None), "weights_map", None)
    if weights is None:
        raise UsageError(f"{what}: its weights are not here while the model runs; choose another --offload")
    here: Tensor = weights[name]
    return here
