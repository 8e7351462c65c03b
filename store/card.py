"""The dataset card of a store, `README.md`: for people who find it on a shelf, and for `datasets`, which finds the tables by it.

It is written at creation from the metadata alone, so equal stores have equal cards.
"""

import json
from itertools import groupby

from store.format import StoreMeta
from store.sites import Site

PROMPTS, PICTURES = "prompts", "images"
"""what `datasets.load_dataset(STORE, …)` calls the two tables"""

DTYPES = {
    "bfloat16": "bfloat16 (its bits in a uint16 array: view them as bfloat16)",
    "float16": "float16",
    "float32": "float32",
    "fp8-e4m3": "float8 e4m3 (its bits in a uint8 array) times a float32 scale a row, in the array `<point>_scale`; "
    "Granary reads it as bfloat16",
}


def card_of(meta: StoreMeta) -> str:
    """The text of a store's `README.md`, front matter first; a function of the metadata alone."""
    return "\n".join([*_front_matter(meta), "", *_about(meta), "", *_how_to_open(meta), "", *_licence(meta)]) + "\n"


def has_prompts(meta: StoreMeta) -> bool:
    """Whether the texts of the prompts are there; a subset can have been taken without them."""
    return meta.parent is None or bool(meta.parent.get("prompts", True))


def _front_matter(meta: StoreMeta) -> list[str]:
    """YAML that the hub and `datasets` read.  Strings are JSON strings, which YAML reads as they are meant."""
    tables = [PROMPTS] if meta.pictures == "none" else [PROMPTS, PICTURES]
    lines = ["---", "license: unknown", "tags:", "- granary", "- activations", "- interpretability", "- zarr"]
    lines.append("configs:")
    for name in tables:
        lines += [f"- config_name: {name}", f'  data_files: "{name}/*.parquet"']
    return [*lines, "---"]


def _about(meta: StoreMeta) -> list[str]:
    model, sampler = meta.model, meta.scheduler
    tokens = ", ".join(f"{stream} {kept.text}" for stream, kept in meta.tokens.items())
    pictures = "none" if meta.pictures == "none" else meta.pictures
    facts = [
        ("model", f"{_code(model.get('id'))}, revision {_code(model.get('revision'))}"),
        *((f"weights of {name}", f"SHA-256 {_code(found)}") for name, found in sorted(_hashes(meta).items())),
        ("images", f"{meta.n_images} of {meta.height} x {meta.width} pixels, pictures: {pictures}"),
        ("prompts", f"{_code(meta.prompts.get('source'))}" + ("" if has_prompts(meta) else ", their texts left out")),
        ("sampler", f"{meta.num_inference_steps} steps of {sampler.get('class')}, guidance {meta.guidance:g}"),
        ("sites", _spans(meta.site_objects)),
        ("steps kept", ", ".join(map(str, meta.steps))),
        ("points", ", ".join(meta.points) + _targets(meta)),
        ("tokens kept", tokens),
        ("channels", str(meta.d_model)),
        *([("traces", f"{meta.traced.text()} (for attribution graphs)")] if meta.traced is not None else []),
        ("stored as", DTYPES[meta.store_dtype] + ("" if meta.codec == "none" else f", compressed by {meta.codec}")),
        ("computed in", f"{meta.dtype} on {meta.device}"),
        *_parent(meta),
    ]
    return [
        f"# Activations of {' '.join(str(model.get('id')).split())}",
        "",
        "A Granary store: what the MLPs of a diffusion transformer received and gave while it drew pictures, with every file's checksum.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts),
    ]


def _how_to_open(meta: StoreMeta) -> list[str]:
    site, step, point = meta.site_objects[0], meta.steps[0], meta.points[0]
    array = f"activations/{site.path}/step.{step}/{point}"
    pictures = (
        [] if meta.pictures == "none" else [f'pictures = datasets.load_dataset("STORE", "{PICTURES}", split="train")']
    )
    return [
        "## How to open it",
        "",
        "`STORE` is this folder, or where it lies on a server (`s3://…`, `hf://datasets/OWNER/NAME`, `https://…`; plain Zarr and",
        "`datasets` take some of these). With Granary, which checks what it reads:",
        "",
        "```python",
        "from store import Site, open_store",
        "",
        'store = open_store("STORE")',
        f'x = store.read(Site.parse("{site}"), step={step}, point="{point}", start=0, stop=1)  # (image, kept token, channel)',
        "```",
        "",
        "With plain Zarr (version 3), and the tables with `datasets`:",
        "",
        "```python",
        "import datasets",
        "import zarr",
        "",
        f'array = zarr.open_array("STORE/{array}", mode="r")  # see "stored as" above',
        f'prompts = datasets.load_dataset("STORE", "{PROMPTS}", split="train")  # one row an image',
        *pictures,
        "```",
        "",
        "`python -m store info STORE` says more, `python -m store verify STORE` reads every file against its checksum, and",
        f"`python -m store pull STORE FOLDER --layers {site.layer} --images …` copies a part of it.",
    ]


def _licence(meta: StoreMeta) -> list[str]:
    return [
        "## Licence",
        "",
        f"Not stated here: whoever shares this store decides, within the terms of {_code(meta.model.get('id'))} and of the prompts.",
    ]


def _hashes(meta: StoreMeta) -> dict[str, str]:
    found = meta.model.get("weights_sha256")
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def _targets(meta: StoreMeta) -> str:
    return "; mlp_out is recomputed from mlp_in by the weights in `weights/`" if meta.targets == "recomputed" else ""


def _parent(meta: StoreMeta) -> list[tuple[str, str]]:
    """Where a subset came from."""
    if meta.parent is None or "store" not in meta.parent:
        imported, assumed = ((meta.parent or {}).get(name) for name in ("imported", "assumed"))
        found = imported if isinstance(imported, list | tuple) else ()
        files = dict.fromkeys(str(each.get("file")) for each in found if isinstance(each, dict))
        rows = [("imported from", ", ".join(_code(file) for file in files))] if files else []
        return rows + [("assumed", _code(text)) for text in (assumed if isinstance(assumed, list | tuple) else ())]
    images = meta.parent.get("images")
    span = f", its images {images[0]} to {images[1] - 1}" if isinstance(images, list | tuple) else ""
    return [("taken from", f"store {_code(meta.parent['store'])}{span}")]


def _code(value: object) -> str:
    """A value of others, which may hold anything, as one cell of a table."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{' '.join(text.split())}`".replace("|", "\\|") if value is not None else "unknown"


def _spans(sites: tuple[Site, ...]) -> str:
    """`img_0-3, txt_6`: sites whose layers follow one another as one word."""
    words = []
    for _, group in groupby(enumerate(sites), lambda pair: (pair[1].stream, pair[1].layer - pair[0])):
        run = [site for _, site in group]
        words.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1].layer}")
    return ", ".join(words)
