"""The prompts of a store as texts, also where they were left out when it was shared (`store push --no-prompts`)."""

from store import Store


def prompt_texts(store: Store) -> list[str]:
    """One text an image: its prompt, or `(prompt of image 17 left out)`, different for each, where the store has none."""
    table = store.prompts()
    if "prompt" in table.column_names:
        return [str(text) for text in table["prompt"].to_pylist()]
    return [f"(prompt of image {image} left out)" for image in range(store.n_images)]
