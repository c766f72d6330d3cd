"""Paths as a recipe writes them: relative ones count from the recipe's own folder, URLs stand as they are."""

from pathlib import Path

from pydantic import ValidationInfo


def beside_recipe(path: str, info: ValidationInfo) -> str:
    """`path` from the folder that the validation context calls "base"; for pydantic's AfterValidator."""
    base = (info.context or {}).get("base")
    return path if base is None or "://" in path else str(Path(base, Path(path).expanduser()))
