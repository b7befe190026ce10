"""Recipes: the paper's experiments as YAML files, one for each row of its tables; `rein recipes` lists them.

A recipe is a configuration of `rein fit`, `validate`, `test` and `predict`. Its first line is its title. Its key `bases` names the
files of `bases/`, or other recipes, whose settings it shares: they are merged in order, and the recipe's keys come last.

Belongs here: the files, and what finds and merges them. It imports nothing of `dgss`; imported by the commands.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from rein.errors import InputError, one_line

FOLDER = Path(__file__).parent
BASES = FOLDER / "bases"
_KEY_ORDER = ("out", "state", "checkpoint_every", "published", "model", "data", "trainer")
_MAX_TEXT, _MAX_VALUES, _MAX_DEPTH = 1_000_000, 100_000, 50  # of a configuration; those of the recipes are far below
_FastLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times as fast, but not in every build of PyYAML


class _Loader(_FastLoader):
    """Refuses a key that stands twice in a mapping, of which others would ignore the first."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key.value, str) and key.value != "<<"]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise ValueError(f"the key {twice[0]!r} stands twice in one mapping")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


@dataclass(frozen=True)
class Recipe:
    """One recipe.

    Attributes:
        name: the file's name without its suffix; `--config` accepts it.
        title: the file's first line.
        path: the file.
        published: the published mIoU in per cent (the mean, or that of single domains) and its source; empty if there is none.
    """

    name: str
    title: str
    path: Path
    published: str = ""


def listed() -> list[Recipe]:
    """All recipes, sorted by name."""
    return [_read(path) for path in sorted(FOLDER.glob("*.yaml"))]


def find(name: str) -> Recipe:
    """The recipe with this name.

    Raises:
        InputError: there is no such recipe.
    """
    return _read(_find_path(name))


def resolve(name_or_path: str | Path) -> dict[str, Any]:
    """Merge a recipe, or a configuration file, with its bases.

    Args:
        name_or_path: name of a recipe, or path of a YAML file. A string is a path if it ends in .yaml, .yml or .json, or if there is
            such a file.

    Returns:
        The complete configuration, without `bases`. `out` is `runs/<name of the file>` if the file and its bases do not set it.

    Raises:
        InputError: there is no such recipe, base or file; a file is not a YAML mapping; or `bases` is not a list of names, or has
            a cycle.
    """
    path = _path(name_or_path)
    merged = {"out": f"runs/{path.stem}", **_expand(path)}
    return {key: merged[key] for key in sorted(merged, key=_key_rank)}


def title_of(name_or_path: str | Path) -> str:
    """The comment on the first line of a recipe or a configuration file; empty if there is none. Raises as `resolve`."""
    path = _path(name_or_path)
    _load(path)
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    return line.lstrip("# ") if line.startswith("#") else ""


def to_yaml(config: dict[str, Any], title: str) -> str:
    """The text of a configuration file: the title as a comment, then the settings; each item of a list is on one line."""
    comment = f"# {title}\n" if title else ""
    text: str = yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return comment + text


def resolved(arguments: Sequence[str]) -> list[str]:
    """Replace each recipe, and each file with `bases`, in command-line arguments by the text of its complete configuration.

    jsonargparse's `--config` takes YAML text as well as a path. A file without `bases` stays a path, and YAML text is kept.

    Raises:
        InputError: as for `resolve`.
    """
    replaced = list(arguments)
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option not in ("--config", "-c"):
            continue
        if equals:
            replaced[index] = f"{option}={_config_value(value)}"
        elif index + 1 < len(arguments):
            replaced[index + 1] = _config_value(arguments[index + 1])
    return replaced


def _read(path: Path) -> Recipe:
    published = resolve(path).get("published") or {}
    figures = {"mean": published["mean"]} if "mean" in published else published.get("miou", {})
    text = ", ".join(f"{name} {value}" for name, value in figures.items())
    return Recipe(path.stem, title_of(path), path, text and f"{text} ({published['source']})")


def _path(name_or_path: str | Path) -> Path:
    return Path(name_or_path) if _is_path(name_or_path) else _find_path(str(name_or_path))


def _is_path(value: str | Path) -> bool:
    return isinstance(value, Path) or value.endswith((".yaml", ".yml", ".json")) or os.path.isfile(value)


def _is_yaml_text(value: str) -> bool:
    return "\n" in value or (": " in value and not os.path.isfile(value))


def _config_value(value: str) -> str:
    """What `--config` passes to jsonargparse for one value: a recipe's name, a path or YAML text."""
    if _is_yaml_text(value):
        return value
    if _is_path(value) and "bases" not in _load(Path(value)):
        return value
    return to_yaml(resolve(value), title_of(value))


def _expand(path: Path, parents: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Merge the file at `path` with its bases. `parents` are the files through which it was reached."""
    if path in parents:
        cycle = " -> ".join(other.stem for other in (*parents[parents.index(path) :], path))
        raise InputError(f"`bases` has a cycle: {cycle}. Expected that no file is a base of itself. Remove one of these names.")
    config = _load(path)
    bases = config.pop("bases", [])
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        raise InputError(
            f"`bases` of {path} is {one_line(repr(bases))}. Expected a list of names of recipes or bases. "
            "Write it as in `bases: [gtav-dinov2-l-rein]`."
        )
    merged: dict[str, Any] = {}
    for name in bases:
        merged = _merge(merged, _expand(_find_base(name, path), (*parents, path)))
    merged.pop("published", None)  # of the base's settings, and of no others
    return _merge(merged, config)


def _find_path(name: str) -> Path:
    """The file of a recipe."""
    path = _file_in(name, FOLDER)
    if path is None:
        raise InputError(
            f"There is no recipe {name!r}. Expected the name of a recipe or a YAML file.{_similar(name, FOLDER)} "
            "`rein recipes` lists all recipes."
        )
    return path


def _find_base(name: str, path: Path) -> Path:
    """The file of a recipe or a base that the file at `path` names."""
    base = _file_in(name, FOLDER, BASES)
    if base is None:
        raise InputError(
            f"`bases` of {path} names {one_line(repr(name))}, which does not exist. Expected the name of a recipe or of a file of "
            f"{BASES}.{_similar(name, FOLDER, BASES)} `rein recipes` lists all recipes."
        )
    return base


def _file_in(name: str, *folders: Path) -> Path | None:
    paths = [folder / f"{name}.yaml" for folder in folders]
    return next((path for path in paths if path.parent in folders and os.path.isfile(path)), None)


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_TEXT + 1)
        if len(text) > _MAX_TEXT:
            raise ValueError(f"it has more than {_MAX_TEXT:,} characters")
        config = yaml.load(text, _Loader)
        _check_extent(config)
    except Exception as error:  # the parser's, and what Python raises for a date or a number that does not exist
        raise InputError(
            f"{path} cannot be read: {one_line(error)}. Expected a YAML file. Check its path and its syntax."
        ) from error
    if not isinstance(config, dict):
        raise InputError(
            f"{path} contains {type(config).__name__}. Expected a mapping. Write settings as in `model: {{lr: 0.0001}}`."
        )
    for key in ("model", "data", "trainer"):
        if not isinstance(config.get(key, {}), dict):
            raise InputError(
                f"{key!r} of {path} is {one_line(repr(config[key]))}. Expected a mapping. Write settings as in "
                "`model: {lr: 0.0001}`."
            )
    return config


def _check_extent(config: Any) -> None:
    """Raise ValueError if the values are too many or nested too deeply, with every alias written out: an alias may name itself."""
    pending, count = [(config, 0)], 0
    while pending:
        value, depth = pending.pop()
        count += 1
        if depth > _MAX_DEPTH or count > _MAX_VALUES:
            raise ValueError(f"it has more than {_MAX_VALUES:,} values, or more than {_MAX_DEPTH} inside each other")
        if isinstance(value, dict | list | set | tuple):
            inner = [*value, *value.values()] if isinstance(value, dict) else value
            pending += [(entry, depth + 1) for entry in inner]


def _merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings deeply; any other value of `override` replaces that of `base`."""
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _key_rank(key: str) -> int:
    return _KEY_ORDER.index(key) if key in _KEY_ORDER else len(_KEY_ORDER)


def _similar(name: str, *folders: Path) -> str:
    """The part of an error text that lists names like `name`."""
    names = sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))
    similar = [other for other in names if other.startswith(name)][:5] or get_close_matches(name, names, n=5)
    return f" Similar names: {', '.join(similar)}." if similar else ""


class _Dumper(yaml.SafeDumper):
    """Writes mappings in block style and each item of a list on one line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        node = super().represent_sequence(tag, sequence, flow_style=False)
        items = [item for item in node.value if isinstance(item, yaml.CollectionNode)]
        for item in items:
            item.flow_style = True
        node.flow_style = not items
        return node

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        return super().increase_indent(flow, False)  # indent lists below their key

    def ignore_aliases(self, data: Any) -> bool:
        return True  # equal lists are written out: a reader of the file needs no anchors
