"""What all tests share: shapes and types checked while they run, no waiting for a disk, a small store."""

import gc
import importlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

gc.disable()  # until `pytest_collection_finish`: a tenth of the time of importing is spent looking for garbage that is not there

from tests.runtime_types import check_while_running  # noqa: E402

check_while_running()

from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402

from tests.object_server import bucket, hub, s3_server, session  # noqa: E402, F401
from tests.small_store import SmallStore, make_store  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where all are hidden; where one is named and is not there, such tests fail."""
    if not os.environ["CUDA_VISIBLE_DEVICES"]:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(
                    pytest.mark.skip("needs a CUDA device, and CUDA_VISIBLE_DEVICES hides all: make test-gpu")
                )


def pytest_collection_finish() -> None:
    """Collect garbage from now on, and never look through the million objects that imports and tests are."""
    importlib.import_module("hypothesis")  # later, it would count references to what it does not see any more, and warn
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def no_disk_is_waited_for() -> Iterator[None]:
    """What fsync promises shows when the power goes, which no test does; a test that wants to see it called replaces it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture
def small_store(tmp_path: Path) -> Callable[..., SmallStore]:
    """Writes a small store of random activations with the real writer: `small_store(n_images=10, tokens=5)`."""

    def make(**options: object) -> SmallStore:
        return make_store(tmp_path / f"store-{len(list(tmp_path.iterdir()))}", **options)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def pack_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 40 images to make packs of; never written to."""
    from tests.toy_stores import toy_store

    return toy_store(tmp_path_factory.mktemp("pack") / "s", n_images=40)


@pytest.fixture(scope="session")
def large_pack_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A store of a few MB a site, and the digests of its pack of several shards, made from memory."""
    from tests.small_packs import digests, make
    from tests.toy_stores import toy_store

    folder = tmp_path_factory.mktemp("large")
    path = toy_store(folder / "s", n_images=150, sites=("img_0", "txt_0"), img_tokens=256, d_model=16, chunk_images=32)
    return path, digests(make(path, folder / "p", shard_mb=1).path)


@pytest.fixture(scope="session")
def scored_small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A small store with dictionaries, and the bytes of their scores; never written to."""
    from tests.small_scoring import scored_store

    return scored_store(tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="session")
def planted_scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted store, its dictionaries and scores, to be scanned; what scans write in its OUT has names of their own."""
    from tests.small_scans import planted_scans

    return planted_scans(tmp_path_factory.mktemp("scan"))


@pytest.fixture(scope="session")
def traced_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `store` of tiny-flux with traces and its `dictionaries`; never written to."""
    from tests.traced_tiny_flux import traced_folder

    return traced_folder(tmp_path_factory.mktemp("traced"))


@pytest.fixture(scope="session")
def graph_pages(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A page of two graphs, and a report beside which they stand, too; never written to."""
    from tests.graph_pages import Fixture

    return Fixture(tmp_path_factory.mktemp("graphs"))


@pytest.fixture
def packs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A train and a val pack to learn from in a second; made once a session, never written to."""
    from tests.small_training import small_packs

    return small_packs(tmp_path_factory)


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training makes its table and draws nothing."""
    from tests.small_training import leave_out_pictures

    leave_out_pictures(monkeypatch)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the browser puts what a page hands out."""
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads: Path) -> Iterator[Any]:
    """A browser for the tests of a module; one that needs it otherwise makes its own."""
    from tests.chromium import chromium

    yield from chromium(downloads)
