"""The matrices that a store keeps, each file named by its content: the MLP of a site, the attention of a traced block.

`sha256-<hash>.safetensors` holds `net.0.proj.weight`, `net.0.proj.bias`, `net.2.weight` and `net.2.bias` in the model's
dtype.  The hash is over names and tensors and not over the site, so that two sites with equal matrices share a file.
"""

import safetensors.torch
import torch
from torch import nn

from harvest.capture import mlp_of
from harvest.model import tensors_hash
from store.sites import Site
from store.traces import MATRICES

WIDENING = 4
"""hidden units of an MLP by d_model, in every FluxTransformerBlock"""
HEADER_BYTES = 360
"""what safetensors says of four tensors, about"""


def mlp_tensors(transformer: nn.Module, site: Site) -> dict[str, torch.Tensor]:
    """The four tensors of a site's MLP, on the host."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in mlp_of(transformer, site).state_dict().items()}


def weights_files(transformer: nn.Module, sites: tuple[Site, ...]) -> dict[str, str]:
    """{site: name of its file}; reads one site's matrices at a time."""
    return {str(site): f"sha256-{tensors_hash(mlp_tensors(transformer, site))}.safetensors" for site in sites}


def weights_bytes(transformer: nn.Module, site: Site) -> bytes:
    """The content of a site's file."""
    content: bytes = safetensors.torch.save(mlp_tensors(transformer, site))
    return content


def file_bytes(d_model: int, dtype: str) -> int:
    """Bytes of a site's file by the geometry alone: 151 MB for FLUX in bfloat16."""
    numbers = 2 * WIDENING * d_model * d_model + WIDENING * d_model + d_model
    return numbers * (4 if dtype == "float32" else 2) + HEADER_BYTES


def attention_of(block: nn.Module) -> dict[str, torch.Tensor]:
    """`to_v.weight` and so on (`store.traces.MATRICES`): what a trace of a double block needs of its attention, where it lies."""
    attention: nn.Module = block.attn  # type: ignore[assignment]
    found = attention.state_dict()
    return {name: found[name].detach() for name in sorted(found) if name.rpartition(".")[0] in MATRICES}


def attention_tensors(transformer: nn.Module, block: int) -> dict[str, torch.Tensor]:
    """The matrices of a traced block, on the host."""
    module: nn.Module = transformer.transformer_blocks[block]  # type: ignore[index, union-attr, assignment]
    return {name: tensor.cpu().contiguous() for name, tensor in attention_of(module).items()}


def attention_file(transformer: nn.Module, block: int) -> str:
    """The name of a traced block's file."""
    return f"sha256-{tensors_hash(attention_tensors(transformer, block))}.safetensors"


def attention_bytes(transformer: nn.Module, block: int) -> bytes:
    """The content of a traced block's file."""
    content: bytes = safetensors.torch.save(attention_tensors(transformer, block))
    return content


def attention_file_bytes(d_model: int, dtype: str) -> int:
    """Bytes of a traced block's file by the geometry alone: 75 MB for FLUX in bfloat16."""
    numbers = len(MATRICES) * (d_model * d_model + d_model)
    return numbers * (4 if dtype == "float32" else 2) + 2 * HEADER_BYTES
