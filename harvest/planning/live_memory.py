"""How much memory a computation holds at its height, found without a device: it is run on tensors that have sizes and no values.

A tensor on torch's `meta` device costs nothing, and its storage says how many bytes it would take.  Every storage that an
operation makes is counted until it is freed, so that the peak is that of the very code that will run, whatever model it is.
Attention is counted as the fused kernels do it, which hold its output and no matrix of patterns.  What libraries take for
themselves (workspaces of convolutions and matrix products, what an allocator rounds up) is not counted.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")


def peak_bytes(work: Callable[[], object], *there: nn.Module) -> int:
    """Bytes that `work` holds at its height beside the weights of the modules that are there; `work` runs on `meta`."""
    count = _Live([tensor for module in there for tensor in (*module.parameters(), *module.buffers())])
    with META, torch.no_grad(), count, _FusedAttention():
        work()
    return count.peak


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts the bytes of storages that were made and are alive."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in weights}

    def __torch_dispatch__(
        self, operation: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = operation(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _FusedAttention(TorchFunctionMode):
    """Answers attention with its output alone; on `meta` it would be taken apart into the patterns that no fused kernel holds."""

    def __torch_function__(
        self, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            query, value = (
                args[place] if len(args) > place else kwargs[name] for place, name in ((0, "query"), (2, "value"))
            )
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return function(*args, **kwargs)
