"""The prompts of a store as texts, also where they were left out when it was shared (`store push --no-prompts`)."""

from store import Store


def prompt_texts(store: Store) -> list[str]:
    """One text an image: its prompt, or `(prompt of image 17 left out)`, different for each, where the store has none."""
    table = store.prompts()
    if "prompt" in table.column_names:
        return [str(text) for text in table["prompt"].to_pylist()]
    return [_left_out(image) for image in range(store.n_images)]


def prompt_text(store: Store, image: int) -> str:
    """The text of one image, as `prompt_texts` has it."""
    table = store.prompts()
    return str(table["prompt"][image].as_py()) if "prompt" in table.column_names else _left_out(image)


def _left_out(image: int) -> str:
    return f"(prompt of image {image} left out)"
