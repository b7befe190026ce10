"""The paper's experiments as YAML files, one for each row of its tables; `rein recipes` lists them.

A recipe is a configuration of `rein fit / test`. Its first line says what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from rein.errors import InputError

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """One file.

    Attributes:
        name: as `--config` takes it.
        title: its first line.
        path: the file.
        aim: the published mean in per cent, or the figure of one domain, and where it was published; empty where there is none.
    """

    name: str
    title: str
    path: Path
    aim: str = ""


def listed() -> list[Recipe]:
    """All recipes, by name."""
    return [_read(path) for path in sorted(FOLDER.glob("*.yaml"))]


def _read(path: Path) -> Recipe:
    text = path.read_text(encoding="utf-8")
    published = yaml.safe_load(text).get("published") or {}
    figures = {"mean": published["mean"]} if "mean" in published else published.get("miou", {})
    aim = ", ".join(f"{name} {value}" for name, value in figures.items())
    return Recipe(path.stem, text.partition("\n")[0].lstrip("# "), path, aim and f"{aim} ({published['source']})")


def find(name: str) -> Recipe:
    """One recipe.

    Raises:
        InputError: there is none of that name.
    """
    for recipe in listed():
        if recipe.name == name:
            return recipe
    near = [recipe.name for recipe in listed() if name.partition("-")[0] in recipe.name][:6]
    raise InputError(f"there is no recipe {name!r}; " + (f"near it are {', '.join(near)}." if near else "see rein recipes."))


def resolved(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments in which the names of recipes have become their paths."""
    found = list(arguments)
    for place, argument in enumerate(found):
        option, equals, value = argument.partition("=")
        if option not in ("--config", "-c") or (not equals and place + 1 >= len(found)):
            continue
        value = value if equals else found[place + 1]
        if not Path(value).is_file() and not value.endswith((".yaml", ".yml", ".json")):
            path = str(find(value).path)
            if equals:
                found[place] = f"{option}={path}"
            else:
                found[place + 1] = path
    return found
