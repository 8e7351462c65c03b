"""A dictionary cut down to the features that are looked at: drawing three features of 49,152 costs three, not 49,152.

With ReLU, JumpReLU and BatchTopK (by its threshold) every feature is judged alone, so the others need not be computed.  In TopK
features compete, and all of them are needed to know which ones stay.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from train import Dictionary
from train.dictionaries.dictionary import build

FEATURE_AXIS = {"encoder.weight": 0, "encoder.bias": 0, "decoder.weight": 1, "log_threshold": 0}
ALONE = ("relu", "jumprelu", "batchtopk")


def judged_alone(dictionary: Dictionary) -> bool:
    """Whether a feature's activation depends on no other feature, so that `narrowed` gives the same."""
    return dictionary.config.activation in ALONE


@torch.inference_mode()
def narrowed(dictionary: Dictionary, features: Sequence[int]) -> Dictionary:
    """The dictionary with these features alone, in their order; what belongs to no feature is shared, not copied.

    Its activations are those of the whole one where `judged_alone`; what it decodes is the part of these features.
    """
    assert judged_alone(dictionary) and len(features) > 0
    whole = dictionary.config
    k = None if whole.k is None else min(whole.k, len(features))
    index = torch.as_tensor(list(features), dtype=torch.int64)
    state = {
        name: tensor.index_select(FEATURE_AXIS[name], index.to(tensor.device)) if name in FEATURE_AXIS else tensor
        for name, tensor in dictionary.state_dict().items()
    }
    small = build(replace(whole, n_features=len(features), k=k, nested=()), empty=True)
    small.load_state_dict(state, assign=True)
    return small.requires_grad_(False)
