"""The sigmas of a run that nobody recorded: as FLUX computes them, and as its transformer receives them in bfloat16.

1. n values from 1 down to 1/n.
2. FLUX.1[dev] moves them towards 1, the more the more image tokens there are: s -> e^m / (e^m + 1/s - 1), with m on the
   line through 0.5 at 256 tokens and 1.15 at 4096.  FLUX.1[schnell] leaves them.  (diffusers, FluxPipeline and
   FlowMatchEulerDiscreteScheduler, with the configurations that the two models are published with.)
3. The pipeline rounds sigma * 1000 to bfloat16, and divides by 1000 in bfloat16: schnell's 0.75 arrives as 0.75390625.
"""

import math
from typing import Literal

import ml_dtypes
import numpy as np

Schedule = Literal["schnell", "dev"]


def scheduler_sigmas(name: Schedule, steps: int, image_tokens: int) -> np.ndarray:
    """The scheduler's own values, float32 (step,), descending from 1."""
    sigmas = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    if name == "dev":
        slope = (1.15 - 0.5) / (4096 - 256)
        shift = math.exp(image_tokens * slope + (0.5 - slope * 256))
        sigmas = (shift / (shift + (1 / sigmas - 1))).astype(np.float32)
    return sigmas


def received_sigmas(scheduled: np.ndarray) -> np.ndarray:
    """What a transformer in bfloat16 is called with for those values, float32 (step,)."""
    timesteps = (scheduled * np.float32(1000)).astype(ml_dtypes.bfloat16).astype(np.float32)
    return (timesteps / np.float32(1000)).astype(ml_dtypes.bfloat16).astype(np.float32)
