"""How far a picture moved towards what a feature stands for, by CLIP and without a word for it.

The concept of a feature is a direction between embeddings of length 1: from the mean over pictures of the store towards the mean over
the feature's best pictures.  The change along it is (embedding of the changed picture - of the plain one) . direction: above 0 when
the picture became more like those on which the feature is strongest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from PIL import Image

from analyze.features.clip import Clip
from analyze.responsive.candidates import evenly
from analyze.steering.distances import unit_embeddings
from store import Store
from store.errors import UsageError

BEST = 10
"""pictures that stand for a feature"""
ALL = 256
"""pictures, evenly spread over the store, that stand for everything"""


@dataclass
class Concepts:
    """Directions of features in the embeddings of one CLIP model over one store's pictures."""

    store: Store
    clip: Clip
    _mean: Float[np.ndarray, " dim"] | None = field(default=None, repr=False)

    def direction(self, best: Sequence[int]) -> Float[np.ndarray, " dim"]:
        """The direction towards these images, of length 1; zeros where they are no different from all."""
        if self._mean is None:
            self._mean = self._embedded(evenly(self.store.n_images, ALL)).mean(0)
        found = self._embedded(best).mean(0) - self._mean
        length = float(np.linalg.norm(found))
        return np.asarray(found / length if length > 0 else found)

    def changes(
        self, direction: Float[np.ndarray, " dim"], plain: Sequence[Image.Image], changed: Sequence[Image.Image]
    ) -> Float[np.ndarray, " shot"]:
        """How far each picture moved along the direction."""
        moved = unit_embeddings(self.clip, changed) - unit_embeddings(self.clip, plain)
        return np.asarray(moved @ direction)

    def _embedded(self, images: Sequence[int]) -> Float[np.ndarray, "image dim"]:
        pictures = [self.store.picture(image) for image in images]
        if (missing := [image for image, one in zip(images, pictures, strict=True) if one is None]) or not pictures:
            raise UsageError(
                f"{self.store.path} holds no picture of image {missing[0] if missing else '?'}: rank by flip, which needs none"
            )
        return unit_embeddings(self.clip, [picture for picture in pictures if picture is not None])
