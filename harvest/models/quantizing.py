"""Quantised transformers: the configurations that diffusers takes, which package each needs, and what a store says of them.

    nf4, int8           bitsandbytes, on CUDA only: 4 bits a weight; 8 bits with 8-bit activations (LLM.int8)
    int8wo, float8wo    torchao, weights only, on CUDA and on a CPU: 8 bits with a scale for each output

Linear layers of the transformer alone are quantised; text encoders can be freed instead (`--text-encoders first`).  What the
model computes is then another model's: a store says so, and its weights' hash is that of the quantised ones.
"""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Literal

import torch

from store.errors import UsageError

Quantize = Literal["none", "nf4", "int8", "int8wo", "float8wo"]
PACKAGE = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int8wo": "torchao", "float8wo": "torchao"}


def check_quantize(quantize: Quantize, device: torch.device) -> None:
    """`UsageError` where the package that it needs, or the device, is not there; needs no model."""
    if quantize == "none":
        return
    package = PACKAGE[quantize]
    if package == "bitsandbytes" and device.type != "cuda":
        raise UsageError(
            f"--quantize {quantize} is bitsandbytes', which diffusers runs on a CUDA device only: "
            f"on a {device.type.upper()} choose int8wo or float8wo"
        )
    if find_spec(package) is None:
        raise UsageError(f"--quantize {quantize} needs the package {package}: pip install {package}")


def quantization(quantize: Quantize, dtype: torch.dtype) -> dict[str, Any]:
    """The keyword that makes a pipeline load its transformer so; nothing for `none`."""
    if quantize == "none":
        return {}
    from diffusers import PipelineQuantizationConfig

    return {"quantization_config": PipelineQuantizationConfig(quant_mapping={"transformer": _config(quantize, dtype)})}


def _config(quantize: Quantize, dtype: torch.dtype) -> Any:
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    if quantize == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import (  # type: ignore[import-not-found, unused-ignore]
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
    )

    return TorchAoConfig(Int8WeightOnlyConfig() if quantize == "int8wo" else Float8WeightOnlyConfig())


def quantized_facts(quantize: Quantize) -> dict[str, str]:
    """What a store says of it: how, and the version of the package that did it."""
    package = PACKAGE[quantize]
    try:
        return {"as": quantize, package: version(package)}
    except PackageNotFoundError:  # a folder on the path, without metadata
        return {"as": quantize, package: "unknown"}
