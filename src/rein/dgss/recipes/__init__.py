"""The paper's experiments as YAML files, one for each row of its tables; `rein recipes` lists them.

A recipe is a configuration of `rein fit / test`. Its first line says what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rein.errors import InputError

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """One file.

    Attributes:
        name: as `--config` takes it.
        title: its first line.
        path: the file.
    """

    name: str
    title: str
    path: Path


def listed() -> list[Recipe]:
    """All recipes, by name."""
    return [
        Recipe(path.stem, path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# "), path)
        for path in sorted(FOLDER.glob("*.yaml"))
    ]


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
        if not Path(value).exists() and not value.endswith((".yaml", ".yml", ".json")):
            path = str(find(value).path)
            if equals:
                found[place] = f"{option}={path}"
            else:
                found[place + 1] = path
    return found
