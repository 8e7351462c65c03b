"""The matrices that a store keeps, each file named by its content: the MLP of a site, the attention of a traced block.

`sha256-<hash>.safetensors` holds `net.0.proj.weight`, `net.0.proj.bias`, `net.2.weight` and `net.2.bias` in the model's
dtype; of a single-stream block `proj_mlp.weight`, `proj_mlp.bias` and `proj_out.weight`, the latter only the columns that the
MLP writes through, and no bias, which the attention writes as much.  The hash is over names and tensors and not over the site,
so that two sites with equal matrices share a file.
"""

import safetensors.torch
import torch
from torch import nn

from harvest.models.architectures import architecture_of
from harvest.models.matrices import columns_of, rows_of, tensors_of
from harvest.models.model import tensors_hash
from store.sites import Site
from store.traces import MATRICES

WIDENING = 4
"""hidden units of an MLP by d_model, in every FluxTransformerBlock"""
INTO, OUT = "proj_mlp", "proj_out"
"""what the two layers of a single-stream block's MLP are called in its file"""
HEADER_BYTES = 360
"""what safetensors says of four tensors, about"""


def mlp_tensors(transformer: nn.Module, site: Site) -> dict[str, torch.Tensor]:
    """The tensors of a site's MLP, on the host."""
    return {name: tensor.cpu().contiguous() for name, tensor in _mlp(transformer, site).items()}


def _mlp(transformer: nn.Module, site: Site) -> dict[str, torch.Tensor]:
    """The tensors of a site's MLP, where they lie."""
    architecture = architecture_of(transformer)
    spot, what = architecture.spot(site), f"the MLP of {site}"
    reads = architecture.module(transformer, site, spot.reads)
    if spot.writes is None:
        return tensors_of(reads, what)
    writes = architecture.module(transformer, site, spot.writes)
    d_model = writes.out_features  # as wide as the attention's share of what `writes` reads
    found = {f"{INTO}.weight": rows_of(reads, "weight", spot.rows_before * d_model, what)}
    if reads.bias is not None:
        found[f"{INTO}.bias"] = rows_of(reads, "bias", spot.rows_before * d_model, what)
    return found | {f"{OUT}.weight": columns_of(writes, writes.in_features - d_model, what)}


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
    found: dict[str, torch.Tensor] = {}
    for layer in MATRICES:
        tensors = tensors_of(attention.get_submodule(layer), f"the attention's {layer}")
        found |= {f"{layer}.{name}": tensor for name, tensor in tensors.items()}
    return {name: found[name] for name in sorted(found)}


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
