"""Tables and plots from committed results: `python -m benchmarks.report` writes them into the texts, between their marks.

A text holds `<!-- benchmarks: NAME -->` ... `<!-- end -->`; what stands between is the table of that name, made of the JSON files
under `benchmarks/results/`. With --check nothing is written, and texts that are not up to date are an error.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.generalisation import pictures as generalisation_pictures
from benchmarks.generalisation import tables as generalisation_tables
from benchmarks.generalisation.plan import PLANS

ROOT = Path(__file__).parent.parent
RESULTS, IMAGES = ROOT / "benchmarks/results", ROOT / "docs/images"
TEXTS = (ROOT / "README.md", ROOT / "benchmarks/README.md")
MARK = re.compile(r"(<!-- benchmarks: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def results(name: str) -> list[dict]:
    """Every machine's results of one benchmark."""
    files = sorted(RESULTS.glob(f"*/{name}.json"))
    return [{**json.loads(file.read_text(encoding="utf-8")), "folder": file.parent.name} for file in files]


def markdown(head: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    head = list(head)
    body = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in body)


def with_source(content: dict, table: str) -> str:
    """A table with the command and the machine that gave it."""
    facts = content["machine"]
    threads = f"{facts['processes']} processes of one thread" if "processes" in facts else f"{facts['threads']} threads"
    where = facts.get("gpu") or f"{facts['cpu']}, {threads}"
    versions = f"torch {facts['torch']}, timm {facts['timm']}"
    return f"`{content['command']}` on {where}; {versions}; [{content['folder']}](benchmarks/results/{content['folder']}):\n\n{table}"


def spread(values: list[float], unit: str = "") -> str:
    """Median and quartiles."""
    low, median, high = values
    return f"{median:.1f}{unit} [{low:.1f}, {high:.1f}]"


def throughput(content: dict) -> str:
    """Cost over bare, form by form."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in content["rows"]:
        cases.setdefault((row["model"], row["size"], row["batch"], row["step"]), {})[row["form"]] = row
    forms = list(dict.fromkeys(row["form"] for row in content["rows"] if not row["form"].startswith("bare")))
    lines = []
    for (model, size, batch, step), found in cases.items():
        bare = f"{1000 * found['bare']['seconds']:.0f} ms"
        floor = f"{100 / found['rein']['ceiling'] - 100:.1f}"
        costs = [spread(found[form]["cost_percent_quartiles"]) if form in found else "" for form in forms]
        reached = f"{found['rein']['share_of_ceiling']:.2f}"
        repeats = found["bare"]["repeats"]
        lines.append([model.partition("_patch")[0], f"{size} x {size}, {batch}", step, repeats, bare, floor, *costs, reached])
    return markdown(
        ["backbone", "pixels, images", "step", "repeats", "bare", "least", *forms, "rein's share of the ceiling"], lines
    )


def headline(content: dict) -> str:
    """The published form and rein alone."""
    return throughput({**content, "rows": [row for row in content["rows"] if row["form"] in ("bare", "published", "rein")]})


def straightness(points: list[tuple[float, float]]) -> float:
    """R^2 of a straight line through points."""
    count = len(points)
    x, y = ([point[axis] for point in points] for axis in (0, 1))
    mx, my = sum(x) / count, sum(y) / count
    xx, yy = sum((each - mx) ** 2 for each in x), sum((each - my) ** 2 for each in y)
    xy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return xy**2 / (xx * yy) if xx and yy else 1.0


def lines_of(content: dict) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Seconds against each varied quantity, for each step."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in content["rows"]:
        if "step" in row:
            found.setdefault((row["varied"], row["step"]), []).append((row["value"], row["seconds"]))
    return found


def scaling(content: dict) -> str:
    """How straight the lines are, and adapters exchanged in a second."""
    lines = []
    for (varied, step), points in lines_of(content).items():
        ends = [f"{1000 * seconds:.1f} ms at {value}" for value, seconds in (points[0], points[-1])]
        lines.append([varied, step, *ends, f"{straightness(points):.3f}"])
    swaps = [
        [row["model"], row["value"], row["from"], row["swaps_per_second"]]
        for row in content["rows"]
        if row["varied"] == "adapters held"
    ]
    return markdown(["varied", "step", "first", "last", "R² of a line"], lines) + (
        "\n" + markdown(["backbone", "adapters held", "from", "swaps per second"], swaps) if swaps else ""
    )


def recipe(content: dict) -> str:
    """The paper's cost table."""
    lines = []
    for row in content["rows"]:
        if row["step"] == "training":
            peak = f"{row['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in row else "not measured on a CPU"
            paper = f"{row['paper_hours']} h, {row['paper_gigabytes']} GB" if "paper_hours" in row else ""
            case = f"{row['size']} x {row['size']}, {row['batch']}"
            lines.append(
                [row["model"], case, row["method"], f"{row['seconds']:.3f} s", f"{row['hours_of_40000_steps']} h", peak, paper]
            )
    return markdown(["backbone", "pixels, images", "method", "step", "40,000 steps", "peak", "paper"], lines)


def data(content: dict) -> str:
    """Images a second and core."""
    lines = []
    for row in content["rows"]:
        rate = row["images_per_second_and_core"]
        lines.append(
            [row["data"], " x ".join(map(str, row["size"])), row["what"], f"{rate['median']} [{rate['least']}, {rate['most']}]"]
        )
    return markdown(["data", "pixels", "what", "images per second and core"], lines)


def params(content: dict) -> str:
    """Parameters by backbone and method, and the published counts."""
    rows = [row for row in content["rows"] if "family" in row]
    names = list(dict.fromkeys(row["method"] for row in rows if row["method"] not in ("full", "freeze")))
    variants: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        variants.setdefault((row["family"], row["variant"]), {})[row["method"]] = row
    lines = []
    for (family, variant), found in variants.items():
        lines.append(
            [f"{family} {variant}", f"{found['full']['total_parameters'] / 1e6:.1f} M", *(share(found[name]) for name in names)]
        )
    same = sum("published_parameters" in row for row in content["rows"])
    said = f"All {same} published counts are met exactly. – : the method does not fit the blocks; the JSON says why.\n"
    return markdown(["backbone", "parameters", *names], lines) + "\n" + said


def share(row: dict) -> str:
    """Trainable parameters and their share of all."""
    if "trainable_parameters" not in row:
        return "–"
    return f"{row['trainable_parameters'] / 1e6:.2f} M ({row['fraction']:.2%})"


def memory(content: dict) -> str:
    """Kept and peak memory of a step, and what fits."""
    mib, added = 2**20, {}
    rows = content["rows"]
    for row in rows:
        if row["measure"] == "adapter":
            added[row["model"], row["size"], row["batch"], row["form"]] = f"{row['added_per_layer_over_nc']:.2f}"
    steps = [
        [
            row["model"].partition("_patch")[0],
            f"{row['size']} x {row['size']}, {row['batch']}",
            row["form"],
            f"{row['kept_bytes'] / mib:.0f}",
            added.get((row["model"], row["size"], row["batch"], row["form"]), ""),
            f"{row['peak_bytes'] / mib:.0f}" if row["peak_bytes"] is not None else "",
            f"{(row['gradient_bytes'] + row['optimizer_bytes']) / mib:.0f}",
        ]
        for row in rows
        if row["measure"] == "step"
    ]
    fits: dict[tuple, dict[str, object]] = {}
    for row in rows:
        if row["measure"].startswith("largest"):
            what = row["measure"].removeprefix("largest ")
            fits.setdefault((row["model"], row["budget_bytes"], row["form"]), {})[what] = row[
                "batch" if what == "batch" else "size"
            ]
    lines = [
        [model, f"{budget / 2**30:.0f} GiB", form, found["batch"], found["crop"]] for (model, budget, form), found in fits.items()
    ]
    head = ["backbone", "pixels, images", "form", "kept, MiB", "added per layer, N C", "peak, MiB", "gradients, AdamW, MiB"]
    return markdown(head, steps) + "\n" + markdown(["backbone", "budget", "form", "largest batch at 512", "largest crop"], lines)


def files(content: dict) -> str:
    """Sizes and times of files, and of importing."""
    lines = []
    for row in content["rows"]:
        if row["measure"] == "size":
            took = (
                f"{row['file_bytes'] / 1e6:.2f} MB, {row['fraction']:.1%} of the backbone's {row['backbone_bytes'] / 1e6:.0f} MB"
            )
            lines.append([row["model"], "size of the file", took])
            continue
        least, most = 1000 * row["seconds_least"], 1000 * row["seconds_most"]
        took = f"{1000 * row['seconds']:.1f} ms [{least:.1f}, {most:.1f}]"
        if row["measure"] == "import":
            after = f" after {row['after']}" if row["after"] else ""
            lines.append(["", f"`import {row['import']}`{after}", took])
        else:
            lines.append([row["model"], row["measure"], took])
    return markdown(["backbone", "what", "median [least, most]"], lines)


def generalisation(content: dict) -> str:
    """mIoU of every method in every domain, and what was on which budget."""
    budget = content["budget"]
    seeds = len({row["seed"] for row in content["rows"] if row["purpose"] == "evaluate"})
    facts = (
        f"Head {content['head']}, {budget['steps']} steps of {budget['batch']} crops of {budget['crop']} x {budget['crop']}; mean ± "
        f"standard deviation over {seeds} seeds, differences in the mean of the unseen with their 95 % confidence interval; "
        f"{content['fit_cpu_seconds'] / 3600:.1f} hours of one core for fitting.\n\n"
    )
    return facts + markdown(*generalisation_tables.table(content))


def demo() -> str:
    """mIoU of `rein demo`'s methods over the seeds of each machine."""
    folders: dict[str, list[dict]] = {}
    for file in sorted(RESULTS.glob("*/demo-seed*.json")):
        folders.setdefault(file.parent.name, []).append(json.loads(file.read_text(encoding="utf-8")))
    found = []
    for folder, runs in folders.items():
        runs.sort(key=lambda run: run["schedule"]["seed"])
        first = runs[0]
        domains = [f"{name} (source)" if name == first["source"] else name for name in first["results"][0]["miou"]]
        lines = []
        unseen = [
            {run["schedule"]["seed"]: 100 * run["results"][place]["mean_miou_of_unseen"] for run in runs}
            for place in range(len(first["results"]))
        ]
        for place, results in enumerate(zip(*(run["results"] for run in runs), strict=True)):
            tuned = results[0]["tuned_parameters"]
            columns = zip(*(result["miou"].values() for result in results), strict=True)
            cells = [generalisation_tables.spread(100 * value for value in column) for column in columns]
            cells.append(generalisation_tables.spread(unseen[place].values()))
            led = generalisation_tables.difference(unseen[place], unseen[0]) if place else ""
            lines.append([results[0]["method"], f"{tuned:,} ({tuned / results[0]['backbone_parameters']:.1%})", *cells, led])
        named = first["results"][0]["method"]
        table = markdown(["method", "tuned in the backbone", *domains, "mean of unseen", f"minus {named} [95 %]"], lines)
        seeds = ", ".join(str(run["schedule"]["seed"]) for run in runs)
        facts = f"{first['schedule']['steps']} steps, seeds {seeds}; torch {first['versions']['torch']}"
        found.append(
            f"`OMP_NUM_THREADS=1 rein demo --full --seed N`, {facts}; [{folder}](benchmarks/results/{folder}):\n\n{table}"
        )
    return "\n".join(found)


TABLES = {
    "params": params,
    "memory": memory,
    "files": files,
    "throughput": throughput,
    "headline": headline,
    "scaling": scaling,
    "recipe": recipe,
    "data": data,
    **{plan.benchmark: generalisation for plan in PLANS.values()},
}
SOURCES = {"headline": "throughput"}


def render(name: str) -> str:
    """What stands between the marks of that name."""
    if name == "demo":
        return demo()
    found = results(SOURCES.get(name, name))
    return "\n".join(with_source(content, TABLES[name](content)) for content in found)


def updated(path: Path) -> str:
    """A text with its tables made anew."""

    def fill(match: re.Match) -> str:
        table = render(match[2])
        if path.parent.name == "benchmarks":
            table = table.replace("](benchmarks/", "](")
        return f"{match[1]}{table}{match[3]}"

    return MARK.sub(fill, path.read_text(encoding="utf-8"))


def plots(folder: Path) -> None:
    """A picture for each result that is a curve or a comparison."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for content in results("throughput"):
        cases: dict[tuple, list[dict]] = {}
        for row in content["rows"]:
            cases.setdefault((row["model"], row["size"], row["batch"]), []).append(row)
        figure, axes = pyplot.subplots(1, len(cases), figsize=(4.2 * len(cases), 4.2), squeeze=False)
        for axis, (case, rows) in zip(axes[0], cases.items(), strict=True):
            forms = [form for form in dict.fromkeys(row["form"] for row in rows) if not form.startswith("bare")]
            for shift, step in ((-0.2, "inference"), (0.2, "training")):
                shown = [row for row in rows if row["step"] == step and row["form"] in forms]
                places = [forms.index(row["form"]) + shift for row in shown]
                low, middle, high = zip(*(row["cost_percent_quartiles"] for row in shown), strict=True)
                error = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
                axis.barh(places, middle, 0.36, xerr=error, label=step, color="tab:blue" if step == "inference" else "tab:orange")
                least = 100 / next(row["ceiling"] for row in shown if "ceiling" in row) - 100
                axis.axvline(least, color="tab:blue" if step == "inference" else "tab:orange", linestyle=":", linewidth=1)
            axis.set_yticks(range(len(forms)), forms)
            axis.invert_yaxis()
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set_title("{}\n{} px, batch {}".format(*case), fontsize=9)
            axis.set_xlabel("cost over the bare backbone, %\n(median, quartiles; dotted: least possible)", fontsize=8)
        axes[0][0].legend(fontsize=8)
        save(figure, folder / f"throughput-{content['folder']}.png")
    for name in TABLES:
        if name.startswith("generalisation"):
            for content in results(name):
                save(generalisation_pictures.differences(content), folder / f"{name}-{content['folder']}.png")
    for content in results("scaling"):
        curves = lines_of(content)
        varied = list(dict.fromkeys(name for name, _ in curves))
        figure, axes = pyplot.subplots(1, len(varied), figsize=(3.2 * len(varied), 3.2), squeeze=False)
        for axis, name in zip(axes[0], varied, strict=True):
            for step in ("inference", "training"):
                points = curves[name, step]
                axis.plot(*zip(*points, strict=True), "o-", label=f"{step}, R² {straightness(points):.3f}", markersize=4)
            axis.set_xlabel({"tokens": "patch tokens", "m": "tokens m", "r": "rank r"}.get(name, name))
            axis.set_xlim(0)
            axis.set_ylim(0)
            axis.legend(fontsize=7)
        axes[0][0].set_ylabel("seconds, adapter alone")
        save(figure, folder / f"scaling-{content['folder']}.png")


def save(figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    old = [path for path in TEXTS if path.read_text(encoding="utf-8") != updated(path)]
    empty = [name for path in TEXTS for _, name, _ in MARK.findall(path.read_text(encoding="utf-8")) if not render(name)]
    if empty:
        print(f"there are no results of {', '.join(empty)}", file=sys.stderr)
    if options.check:
        for path in old:
            print(f"{path.relative_to(ROOT)} is not what its results say; run python -m benchmarks.report", file=sys.stderr)
        return 1 if old or empty else 0
    for path in old:
        path.write_text(updated(path), encoding="utf-8")
    plots(IMAGES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
