"""The activations of the features that are looked at and no others: drawing three of 49,152 costs three, not 49,152.

With ReLU, JumpReLU and BatchTopK (by its threshold) every feature is judged alone, so the others need not be computed.  In TopK
features compete, and all of them are needed to know which ones stay.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from train import Dictionary

ALONE = ("relu", "jumprelu", "batchtopk")


def judged_alone(dictionary: Dictionary) -> bool:
    """Whether a feature's activation depends on no other feature, so that `activations_of` can be had."""
    return dictionary.config.activation in ALONE


@torch.inference_mode()
def activations_of(
    dictionary: Dictionary, features: Sequence[int], x: Float[Tensor, "row d_model"], sigma: Float[Tensor, " row"]
) -> Float[Tensor, "row chosen"]:
    """z of these features alone, in their order, float32: what `encode` gives where `judged_alone`.

    Rows of the encoder are picked from its tensors: a report asks for other features on every image, thousands of times.
    """
    assert judged_alone(dictionary)
    index = torch.as_tensor(list(features), dtype=torch.int64)
    weight, bias = dictionary.encoder.weight[index], dictionary.encoder.bias[index]
    pre = functional.linear(dictionary.prepare(x.float(), sigma), weight, bias)
    if dictionary.config.activation == "jumprelu":
        return pre * (pre > dictionary.log_threshold[index].exp())
    z = functional.relu(pre)
    return z * (z > dictionary.threshold) if dictionary.config.activation == "batchtopk" else z
