"""`python -m bench.analyze_memory`: peak memory of `scores` and `coherence` at ten times the images, each in a process of its own."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analyze.scoring.matrices import IMAGE_BLOCK
from store import Site
from tests.toy_dictionaries import random_dictionary
from tests.toy_stores import toy_store
from train.dictionaries.checkpoint import save_dictionary

D_MODEL, N_FEATURES, TOKENS, SITE = 16, 4096, 16, "img_0"
DIM = 512
"""of the embeddings, as CLIP ViT-B/32 has it; `coherence` holds images x dim x 4 B of them, mapped from their file"""
FEW = IMAGE_BLOCK + IMAGE_BLOCK // 4
"""images of the small store: more than a block, so that it takes what a block takes"""
MORE = 10


@dataclass(frozen=True)
class Peaks:
    """The greatest resident memory of a command on a store and on one of ten times the images, in bytes."""

    what: str
    few: int
    many: int

    @property
    def ratio(self) -> float:
        return self.many / self.few


def peaks() -> Iterator[Peaks]:
    """Every command on both stores, in turn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dictionary = random_dictionary(site=Site.parse(SITE), d_model=D_MODEL, n_features=N_FEATURES)
        save_dictionary(folder / "dictionaries" / dictionary.name, dictionary, None, [])
        for images in (FEW, MORE * FEW):
            toy_store(
                folder / f"store-{images}",
                n_images=images,
                sites=(SITE,),
                steps=(0,),
                d_model=D_MODEL,
                img_tokens=TOKENS,
                chunk_images=64,
            )
            np.save(
                folder / f"embeddings-{images}.npy",
                np.random.default_rng(0).normal(size=(images, DIM)).astype(np.float32),
            )
        for command, flags, around in (("scores", (), ""), ("coherence", ("--embeddings",), f", {DIM} dims")):
            few, many = (_peak(folder, images, command, flags) for images in (FEW, MORE * FEW))
            yield Peaks(f"{command}: {FEW:,} and {MORE * FEW:,} images x {N_FEATURES:,} features{around}", few, many)


def _peak(folder: Path, images: int, command: str, flags: tuple[str, ...]) -> int:
    words = [
        command,
        "--store",
        f"{folder}/store-{images}",
        "--dictionaries",
        f"{folder}/dictionaries",
        "--out",
        f"{folder}/out-{images}",
    ]
    words += [word for flag in flags for word in (flag, f"{folder}/embeddings-{images}.npy")]
    code = (
        "import re, sys; from pathlib import Path; from analyze.__main__ import main; code = main(sys.argv[1:]); "
        r"print('PEAK', re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {done.stderr}")
    return 1024 * int(re.findall(r"PEAK (\d+)", done.stdout)[-1])


def main() -> None:
    """Print the peaks of each command, one by one."""
    for line in peaks():
        print(
            f"{line.what:<64} {line.few / 1e6:>7.0f} MB   {line.many / 1e6:>7.0f} MB   ratio {line.ratio:>5.2f}",
            flush=True,
        )
    print(
        "goal: scores unchanged, that is within the spread of two runs; coherence grows by the embeddings, "
        f"{(MORE - 1) * FEW * DIM * 4 / 1e6:.0f} MB, and by no copy of them"
    )


if __name__ == "__main__":
    main()
