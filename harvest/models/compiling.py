"""`--compile`: the transformer's blocks through `torch.compile`, with hooks that still see every value.

One block of each kind is compiled and serves all of its kind: weights are inputs of the compiled code.  A hook inside a block
writes to Python objects that differ from layer to layer; compiled with the block it would be compiled once a layer, up to
dynamo's limit of eight, and then not at all.  So hooks stay outside: the block is cut in two where they are.

Shapes are fixed in the compiled code (`dynamic=False`): a batch of another size is compiled for itself, and what a batch gives
does not depend on the sizes of those before it.
"""

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from os import environ
from typing import Any, TypeVar

import torch
from torch import nn

from store.errors import UsageError

BACKEND = "inductor"
Hook = TypeVar("Hook", bound=Callable[..., Any])


def check_compile(device: torch.device) -> None:
    """`UsageError` where what writes the compiled code is missing: a C++ compiler on a CPU, triton on CUDA."""
    if device.type == "cpu" and shutil.which(environ.get("CXX", "g++")) is None:
        raise UsageError("--compile needs a C++ compiler on a CPU: install g++ (or set CXX), or leave --compile out")
    if device.type == "cuda" and find_spec("triton") is None:
        raise UsageError("--compile needs the package triton on CUDA: pip install triton, or leave --compile out")


def compile_blocks(transformer: nn.Module, backend: str = BACKEND) -> None:
    """Have the blocks of `transformer` compiled when they first run: 77 s with tiny-flux on one busy core."""
    # Else code that was made for a pass without hooks, or for a block with others, would serve on and leave them out.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    transformer.compile_repeated_blocks(backend=backend, dynamic=False)  # type: ignore[operator]


def is_compiled(transformer: nn.Module) -> bool:
    """Whether some of its blocks are compiled."""
    return any(module._compiled_call_impl is not None for module in transformer.modules())


def outside(transformer: nn.Module) -> Callable[[Hook], Hook]:
    """What makes a hook one that is never part of compiled code; asked once for all hooks, for it looks at every module."""
    if not is_compiled(transformer):
        return lambda hook: hook  # what else is done imports the compiler, which takes seconds
    return lambda hook: torch.compiler.disable(hook)  # type: ignore[no-any-return, no-untyped-call]
