"""What all tests share: shapes and types checked while they run, one CPU thread count, a small store."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from jaxtyping import install_import_hook

install_import_hook(["store", "harvest", "train", "analyze"], "beartype.beartype")

from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from tests.object_server import bucket, hub, s3_server, session  # noqa: E402, F401
from tests.small_store import SmallStore, make_store  # noqa: E402


@pytest.fixture
def small_store(tmp_path: Path) -> Callable[..., SmallStore]:
    """Writes a small store of random activations with the real writer: `small_store(n_images=10, tokens=5)`."""

    def make(**options: object) -> SmallStore:
        return make_store(tmp_path / f"store-{len(list(tmp_path.iterdir()))}", **options)  # type: ignore[arg-type]

    return make
