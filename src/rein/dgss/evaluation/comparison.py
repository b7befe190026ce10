"""`rein compare`: several evaluated runs side by side, as a table, as JSON and as panels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rein.checkpoint import replace_file
from rein.dgss import pages, panels
from rein.dgss.data.datamodule import PART, UNSEEN
from rein.dgss.evaluation.results import (
    EvaluatedRun,
    class_figures,
    method_table,
    page_notes,
    page_picture,
    protocol_fact,
    read_run,
    result_table,
    slug,
    write_results,
)
from rein.errors import InputError, one_line


def compare(folders: Sequence[Path], out: Path, names: Sequence[str] | None = None, shown: Sequence[str] | None = None) -> str:
    """Compare runs that `rein test` has evaluated on the same data.

    Writes to `out`: `table.txt`; `results.json`; `index.html` with tables and a slider between the methods; `panel.png` with one pair
    of every domain; and `<domain>.png` with several pairs, whose wrong pixels are red.

    Args:
        folders: the runs' folders, in the order of the columns.
        out: folder of the results.
        names: names of the runs; None names them by method or, where methods are equal, by folder.
        shown: the domains in `panel.png`; None shows all.

    Returns:
        The table, as text.

    Raises:
        InputError: a folder holds no results, the runs were not evaluated on the same domains and classes in the same way, or
            `out` cannot be written.
    """
    if not folders:
        raise InputError("no run was given. Pass the folders of runs that rein test has evaluated.")
    runs = [read_run(folder) for folder in folders]
    names = names or _default_names(runs)
    if len(names) != len(runs) or len(set(names)) < len(names):
        raise InputError(f"{len(runs)} runs need {len(runs)} different names; got {', '.join(names)}.")
    for run in runs[1:]:
        _check_comparable(runs[0], run)
    if unknown := [domain for domain in shown or () if domain not in runs[0].result.miou]:
        raise InputError(f"the runs have no domain {unknown[0]!r}; expected some of {', '.join(runs[0].result.miou)}.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {out} cannot be made: {error.strerror}. Choose another --out.") from error
    first, roles = runs[0], _common_roles(runs)
    overview = []
    pictures: dict[str, list[pages.Picture]] = {}
    for domain in first.result.miou:
        examples = _examples(runs, names, domain, roles[domain])
        of_errors = [f"errors of {name}" for name in names]
        pictures[domain] = [
            page_picture(f"{domain} {number}", each.image, each.label, each.predictions, of_errors)
            for number, each in enumerate(examples, 1)
        ]
        if examples:
            title = f"{domain}: predictions, and below them their errors in red (mIoU of the whole domain, %)"
            _write_panel(out / f"{slug(domain)}.png", [replace(each, name="") for each in examples], first, title, errors=True)
            if shown is None or domain in shown:
                overview.append(examples[len(examples) // 2])
    if overview:
        alike = all(run.sources == first.sources for run in runs)
        trained = f"Trained on {', '.join(first.sources)} only" if alike else "Trained on different sources"
        title = f"{trained} (mIoU of the whole domain, %)"
        _write_panel(out / "panel.png", overview, first, title)
    results = [replace(run.result, method=name) for run, name in zip(runs, names, strict=True)]
    sources = dict.fromkeys(name for run in runs for name in run.sources)
    settings = {
        "sources": list(sources),
        "targets": [name for name, role in roles.items() if role in (UNSEEN, PART)],
        "evaluation": first.evaluation,
        "runs": [run.settings | {"folder": str(run.folder)} for run in runs],
    }
    write_results(out / "results.json", settings, results, roles)
    tables = {
        domain: class_figures(
            {result.method: result.iou[domain] for result in results}, [result.miou[domain] for result in results], best=True
        )
        for domain in first.result.iou
    }
    backbones = dict.fromkeys(str(run.settings["backbone"]) for run in runs)
    facts = {"trained on": ", ".join(sources), "backbone": ", ".join(backbones), **protocol_fact(first.evaluation)}
    title = f"Comparison of {', '.join(names)}"
    page = pages.evaluation(
        title, facts, [method_table(results, roles)], tables, pictures, first.space, page_notes(results[0], roles)
    )
    replace_file(out / "index.html", page)
    table = result_table(results, roles)
    replace_file(out / "table.txt", (table + "\n").encode())
    return table


def _common_roles(runs: Sequence[EvaluatedRun]) -> dict[str, str]:
    """The role of each domain: unseen only if no run was trained on it, so that every mean covers the same domains."""
    roles = {}
    for domain in runs[0].result.miou:
        found = [run.roles[domain] for run in runs]
        roles[domain] = next((role for role in found if role not in (UNSEEN, PART)), found[0])
    return roles


def _check_comparable(first: EvaluatedRun, run: EvaluatedRun) -> None:
    if run.space.names != first.space.names or list(run.result.miou) != list(first.result.miou):
        raise InputError(
            f"{run.folder} was evaluated on {one_line(', '.join(run.result.miou))} with {len(run.space.names)} classes, "
            f"{first.folder} on {', '.join(first.result.miou)} with {len(first.space.names)}. Runs are comparable only on the same "
            "domains and classes."
        )
    keys = dict.fromkeys([*first.evaluation, *run.evaluation])
    differing = [key for key in keys if run.evaluation.get(key) != first.evaluation.get(key)]
    if differing:
        pairs = "; ".join(_describe_difference(key, run.evaluation.get(key), first.evaluation.get(key)) for key in differing)
        raise InputError(
            f"{run.folder} and {first.folder} were evaluated differently: {one_line(pairs)}. Run rein test again with equal settings."
        )


def _describe_difference(key: str, one: Any, other: Any) -> str:
    """Two values of a setting of the evaluation; protocols by their names, if these differ."""
    names = [value.get("name") if isinstance(value, dict) else value for value in (one, other)]
    return f"{key} {names[0]} and {names[1]}" if names[0] != names[1] else f"{key} {one} and {other}"


def _examples(runs: Sequence[EvaluatedRun], names: Sequence[str], domain: str, role: str) -> list[panels.Example]:
    """The pairs of a domain whose pictures every run has kept."""
    kept = runs[0].examples.get(domain, [])
    shared = [name for name in kept if all(name in run.examples.get(domain, []) for run in runs)]
    found = []
    for pair in shared:
        examples = [run.example(domain, pair) for run in runs]
        found.append(
            panels.Example(
                name=domain if role == UNSEEN else f"{domain} ({role})",
                image=examples[0].image,
                label=examples[0].label,
                predictions={name: example.prediction for name, example in zip(names, examples, strict=True)},
                miou={name: run.result.miou[domain] for name, run in zip(names, runs, strict=True)},
            )
        )
    return found


def _write_panel(path: Path, examples: Sequence[panels.Example], run: EvaluatedRun, title: str, *, errors: bool = False) -> None:
    buffer = io.BytesIO()
    panels.comparison(examples, run.space, title, errors=errors).save(buffer, "PNG")
    replace_file(path, buffer.getvalue())


def _default_names(runs: Sequence[EvaluatedRun]) -> list[str]:
    methods = [run.result.method for run in runs]
    return methods if len(set(methods)) == len(methods) else [run.folder.name for run in runs]
