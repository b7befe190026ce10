"""Tables and plots of the committed results.

python -m benchmarks.report            # writes the tables into the texts and the plots into docs/images
python -m benchmarks.report --check    # writes nothing; fails if a text is not up to date

A text holds `<!-- benchmarks: NAME -->` ... `<!-- end -->`. The table of that name, from the JSON files under `benchmarks/results/`,
replaces what is between the two.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.generalisation import pictures as generalisation_pictures
from benchmarks.generalisation import tables as generalisation_tables
from benchmarks.generalisation.plan import PLANS
from benchmarks.summary import markdown, with_range

ROOT = Path(__file__).parent.parent
RESULTS, IMAGES = ROOT / "benchmarks/results", ROOT / "docs/images"
TEXTS = (ROOT / "benchmarks/README.md", *(ROOT / "docs" / f"{name}.md" for name in ("deployment", "evidence", "speed")))
MARK = re.compile(r"(<!-- benchmarks: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def results(name: str) -> list[dict]:
    """Every machine's results of one benchmark; `folder` is the machine."""
    files = sorted(RESULTS.glob(f"*/{name}.json"))
    return [{**json.loads(file.read_text(encoding="utf-8")), "folder": file.parent.name} for file in files]


def with_source(content: dict, table: str) -> str:
    """A table below the command and the machine that gave it."""
    facts = content["machine"]
    threads = f"{facts['processes']} processes of one thread" if "processes" in facts else f"{facts['threads']} threads"
    where = facts.get("gpu") or f"{facts['cpu']}, {threads}"
    versions = f"torch {facts['torch']}, timm {facts['timm']}"
    return f"`{content['command']}` on {where}; {versions}; {link(content)}:\n\n{table}"


def link(content: dict) -> str:
    """A link to the results of a machine."""
    return f"[{content['folder']}](benchmarks/results/{content['folder']})"


def pivot(rows: Iterable[dict], keys: Sequence[str], column: str) -> dict[tuple, dict[str, dict]]:
    """Values of `keys` -> value of `column` -> row."""
    table: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        table.setdefault(tuple(row[key] for key in keys), {})[row[column]] = row
    return table


def short_name(model: str) -> str:
    """A timm name without patch and image size."""
    return model.partition("_patch")[0]


def shape(size: int, batch: int) -> str:
    """Images of a training step."""
    return f"{size} x {size}, {batch}"


def throughput(content: dict) -> str:
    """Cost of each form over the bare backbone."""
    forms = list(dict.fromkeys(row["form"] for row in content["rows"] if not row["form"].startswith("bare")))
    lines = []
    for (model, size, batch, step), found in pivot(content["rows"], ("model", "size", "batch", "step"), "form").items():
        bare = f"{1000 * found['bare']['seconds']:.0f} ms"
        least = f"{100 / found['rein']['ceiling'] - 100:.1f}"
        costs = [cost(found[form]) if form in found else "" for form in forms]
        reached = f"{found['rein']['share_of_ceiling']:.2f}"
        repeats = found["bare"]["repeats"]
        lines.append([short_name(model), shape(size, batch), step, repeats, bare, least, *costs, reached])
    return markdown(
        ["backbone", "pixels, images", "step", "repeats", "bare", "least", *forms, "rein's share of the ceiling"], lines
    )


def cost(row: dict) -> str:
    """Median and quartiles of the cost of one form."""
    low, median, high = row["cost_percent_quartiles"]
    return with_range(median, low, high)


def headline(content: dict) -> str:
    """The throughput table with the published form and rein only."""
    return throughput({**content, "rows": [row for row in content["rows"] if row["form"] in ("bare", "published", "rein")]})


def r_squared(points: list[tuple[float, float]]) -> float:
    """R² of a straight line through points."""
    count = len(points)
    x, y = ([point[axis] for point in points] for axis in (0, 1))
    mx, my = sum(x) / count, sum(y) / count
    xx, yy = sum((each - mx) ** 2 for each in x), sum((each - my) ** 2 for each in y)
    xy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return xy**2 / (xx * yy) if xx and yy else 1.0


def scaling_curves(content: dict) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Varied quantity and step -> points of value and seconds."""
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in content["rows"]:
        if "step" in row:
            curves.setdefault((row["varied"], row["step"]), []).append((row["value"], row["seconds"]))
    return curves


def scaling(content: dict) -> str:
    """First and last point of each curve and how straight it is; adapter swaps per second."""
    lines = []
    for (varied, step), points in scaling_curves(content).items():
        ends = [f"{1000 * seconds:.1f} ms at {value}" for value, seconds in (points[0], points[-1])]
        lines.append([varied, step, *ends, f"{r_squared(points):.3f}"])
    swaps = [
        [row["model"], row["value"], row["from"], row["swaps_per_second"]]
        for row in content["rows"]
        if row["varied"] == "adapters held"
    ]
    return markdown(["varied", "step", "first", "last", "R² of a line"], lines) + (
        "\n" + markdown(["backbone", "adapters held", "from", "swaps per second"], swaps) if swaps else ""
    )


def routing(content: dict) -> str:
    """Cost of several adapters in one batch, and of one pass per adapter, over one adapter."""
    lines = []
    for (model, size, batch), found in pivot(content["rows"], ("model", "size", "batch"), "form").items():
        by_count = pivot(
            (row for row in content["rows"] if (row["model"], row["size"], row["batch"]) == (model, size, batch)),
            ("adapters",),
            "form",
        )
        for (count,), forms in by_count.items():
            if "routed" in forms:
                time = f"{1000 * found['one']['seconds']:.0f} ms"
                passes = cost(forms["split"]) if "split" in forms else ""
                lines.append([short_name(model), shape(size, batch), time, count, cost(forms["routed"]), passes])
    return markdown(["backbone", "pixels, images", "one adapter", "adapters", "routed", "one pass per adapter"], lines)


def plan(content: dict) -> str:
    """The estimate of `rein plan` beside the measured peak."""
    lines = []
    for row in content["rows"]:
        what = f"{row['crop']} x {row['crop']}, {row['batch']}, {row['precision']}"
        sizes = [f"{row[key] / 1e9:.3f} GB" for key in ("estimated_bytes", "peak_bytes")]
        lines.append([row["case"], what, *sizes, f"{row['error_percent']:+.1f} %"])
    return markdown(["configuration", "crop, images, precision", "estimate", "measured peak", "error"], lines)


def recipe(content: dict) -> str:
    """The paper's cost table."""
    lines = []
    for row in content["rows"]:
        if row["step"] == "training":
            peak = f"{row['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in row else "not measured on a CPU"
            paper = f"{row['paper_hours']} h, {row['paper_gigabytes']} GB" if "paper_hours" in row else ""
            times = f"{row['seconds']:.3f} s", f"{row['hours_of_40000_steps']} h"
            lines.append([row["model"], shape(row["size"], row["batch"]), row["method"], *times, peak, paper])
    return markdown(["backbone", "pixels, images", "method", "step", "40,000 steps", "peak", "paper"], lines)


def data(content: dict) -> str:
    """Images per second and core."""
    lines = []
    for row in content["rows"]:
        rate = row["images_per_second_and_core"]
        images = with_range(rate["median"], rate["least"], rate["most"], number_format="")
        lines.append([row["data"], " x ".join(map(str, row["size"])), row["what"], images])
    return markdown(["data", "pixels", "what", "images per second and core"], lines)


def params(content: dict) -> str:
    """Parameters by backbone and method, and the published counts."""
    rows = [row for row in content["rows"] if "family" in row]
    names = list(dict.fromkeys(row["method"] for row in rows if row["method"] not in ("full", "freeze")))
    lines = []
    for (family, variant), found in pivot(rows, ("family", "variant"), "method").items():
        total = f"{found['full']['total_parameters'] / 1e6:.1f} M"
        lines.append([f"{family} {variant}", total, *(trainable(found[name]) for name in names)])
    published = sum("published_parameters" in row for row in content["rows"])
    note = f"All {published} published counts are met exactly. – : the method does not fit the blocks; the JSON says why.\n"
    return markdown(["backbone", "parameters", *names], lines) + "\n" + note


def trainable(row: dict) -> str:
    """Trainable parameters and their share of all."""
    if "trainable_parameters" not in row:
        return "–"
    return f"{row['trainable_parameters'] / 1e6:.2f} M ({row['fraction']:.2%})"


def memory(content: dict) -> str:
    """Memory of a training step, and the largest batch and crop in each budget."""
    rows, mib = content["rows"], 2**20
    cases = pivot((row for row in rows if "form" in row), ("model", "size", "batch", "form"), "measure")
    steps = [
        [
            short_name(model),
            shape(size, batch),
            form,
            f"{row['kept_bytes'] / mib:.0f}",
            f"{found['adapter']['added_per_layer_over_nc']:.2f}" if "adapter" in found else "",
            f"{row['peak_bytes'] / mib:.0f}" if row["peak_bytes"] is not None else "",
            f"{(row['gradient_bytes'] + row['optimizer_bytes']) / mib:.0f}",
        ]
        for (model, size, batch, form), found in cases.items()
        if (row := found.get("step"))
    ]
    largest = pivot((row for row in rows if "budget_bytes" in row), ("model", "budget_bytes", "form"), "measure")
    lines = [
        [model, f"{budget / 2**30:.0f} GiB", form, found["largest batch"]["batch"], found["largest crop"]["size"]]
        for (model, budget, form), found in largest.items()
    ]
    head = ["backbone", "pixels, images", "form", "kept, MiB", "added per layer, N C", "peak, MiB", "gradients, AdamW, MiB"]
    return markdown(head, steps) + "\n" + markdown(["backbone", "budget", "form", "largest batch at 512", "largest crop"], lines)


def files(content: dict) -> str:
    """Sizes and times of files, and of imports."""
    lines = []
    for row in content["rows"]:
        if row["measure"] == "size":
            share = f"{row['fraction']:.1%} of the backbone's {row['backbone_bytes'] / 1e6:.0f} MB"
            lines.append([row["model"], "size of the file", f"{row['file_bytes'] / 1e6:.2f} MB, {share}"])
            continue
        seconds = (row[key] for key in ("seconds", "seconds_least", "seconds_most"))
        times = with_range(*(1000 * value for value in seconds), unit=" ms")
        if row["measure"] == "import":
            after = f" after {row['after']}" if row["after"] else ""
            lines.append(["", f"`import {row['import']}`{after}", times])
        else:
            lines.append([row["model"], row["measure"], times])
    return markdown(["backbone", "what", "median [least, most]"], lines)


def generalisation(content: dict) -> str:
    """mIoU of every method in every domain, and the budget of the runs."""
    budget = content["budget"]
    seeds = len({row["seed"] for row in content["rows"] if row["purpose"] == "evaluate"})
    facts = (
        f"Head {content['head']}, {budget['steps']} steps of {budget['batch']} crops of {budget['crop']} x {budget['crop']}; mean ± "
        f"standard deviation over {seeds} seeds, differences in the mean of the unseen "
        f"({generalisation_tables.covered(content)}) with their 95 % confidence interval; "
        f"{content['fit_cpu_seconds'] / 3600:.1f} hours of one core for fitting.\n\n"
    )
    return facts + markdown(*generalisation_tables.table(content))


def depth(content: dict) -> str:
    """The errors of depth of each method in each domain, over seeds; the first method is the reference."""
    lines = []
    for error, factor, title in (("abs_rel", 100, "AbsRel, %"), ("rmse", 1, "RMSE, m"), ("delta_1.25", 100, "delta 1.25, %")):
        runs: dict[str, dict[int, dict[str, float]]] = {}
        for row in content["rows"]:
            runs.setdefault(row["method"], {}).setdefault(row["seed"], {})[row["domain"]] = factor * row[error]
        for domains in (domains for seeds in runs.values() for domains in seeds.values()):
            domains[generalisation_tables.UNSEEN] = statistics.fmean(list(domains.values())[1:])  # the first is the source
        lines += [[title, method, *generalisation_tables.cells(runs, method, [next(iter(runs))])] for method in runs]
    day, *others = dict.fromkeys(row["domain"] for row in content["rows"])
    header = ["error", "method", f"{day} (source)", *others, generalisation_tables.UNSEEN, f"minus {lines[0][1]} [95 %]"]
    return markdown(header, lines)


def int8(content: dict) -> str:
    """Size, speed and mIoU with float32 and with int8 weights of the frozen backbone."""
    lines = []
    for (model,), found in pivot([row for row in content["rows"] if row["measure"] == "size"], ("model",), "weights").items():
        for key, title in (("frozen_bytes", "frozen weights"), ("onnx_bytes", "ONNX file")):
            lines.append([f"{title} of {model}", *(f"{found[kind][key] / 1e6:.1f} MB" for kind in ("float32", "int8")), ""])
    speeds = [row for row in content["rows"] if row["measure"] == "speed"]
    for (model, size), found in pivot(speeds, ("model", "size"), "form").items():
        for runtime in ("eager", "onnxruntime"):
            plain, whole = found[f"{runtime} float32"], found[f"{runtime} int8"]
            times = [f"{1000 * row['seconds']:.1f} ms" for row in (plain, whole)]
            lines.append([f"{model}, one image of {size} x {size}, {runtime}", *times, f"{cost(whole)} %"])
    domains: dict[str, list[dict]] = {}
    for row in content["rows"]:
        if row["measure"] == "mIoU":
            domains.setdefault(row["domain"], []).append(row)
    for domain, rows in domains.items():
        means = [f"{statistics.fmean(row[kind] for row in rows):.2f}" for kind in ("float32", "int8")]
        changes = [row["int8"] - row["float32"] for row in rows]
        lines.append([f"mIoU, {domain}, {len(rows)} seeds", *means, f"{min(changes):+.2f} to {max(changes):+.2f}"])
    return markdown(["", "float32", "int8", "difference [quartiles]; of mIoU, least to most"], lines)


def demo() -> str:
    """mIoU of the methods of `rein demo` over the seeds of each machine."""
    machines: dict[str, dict[int, dict]] = {}
    for content in results("demo-seed*"):
        machines.setdefault(content["folder"], {})[content["runs"][0]["seed"]] = content
    return "\n".join(demo_of_machine(dict(sorted(contents.items()))) for contents in machines.values())


def demo_of_machine(contents: dict[int, dict]) -> str:
    """The table of one machine, from the `results.json` of each seed."""
    runs: dict[str, dict[int, dict[str, float]]] = {}
    for seed, content in contents.items():
        for result in content["results"]:
            shares = {**result["miou"], generalisation_tables.UNSEEN: result["mean_miou_of_unseen"]}
            runs.setdefault(result["method"], {})[seed] = {domain: 100 * share for domain, share in shares.items()}
    first = next(iter(contents.values()))
    roles = first.get("roles") or dict.fromkeys(first["sources"], "held-out source")  # older files have no roles
    names = first["results"][0]["miou"]
    domains = [name if roles.get(name, "unseen") == "unseen" else f"{name} ({roles[name]})" for name in names]
    unseen = first.get("unseen") or [name for name in names if name not in roles]
    reference = first["results"][0]["method"]
    lines = []
    for result in first["results"]:
        tuned = result["tuned_parameters"]
        cells = generalisation_tables.cells(runs, result["method"], [reference])
        lines.append([result["method"], f"{tuned:,} ({tuned / result['backbone_parameters']:.1%})", *cells])
    table = markdown(
        ["method", "tuned in the backbone", *domains, generalisation_tables.UNSEEN, f"minus {reference} [95 %]"], lines
    )
    steps = f"{first['runs'][0]['steps']} steps, " if "steps" in first["runs"][0] else ""
    facts = f"{steps}seeds {', '.join(map(str, contents))}; {generalisation_tables.UNSEEN}: {', '.join(unseen)}; "
    facts += f"torch {first['versions']['torch']}"
    return f"`OMP_NUM_THREADS=1 rein demo --seed N --out runs/demo-N`, {facts}; {link(first)}:\n\n{table}"


TABLES = {
    "params": params,
    "memory": memory,
    "files": files,
    "throughput": throughput,
    "headline": headline,
    "scaling": scaling,
    "routing": routing,
    "plan": plan,
    "recipe": recipe,
    "data": data,
    "depth": depth,
    "int8": int8,
}
SOURCES = {"headline": "throughput"}


def render(name: str) -> str:
    """The text between the marks of that name."""
    if name == "demo":
        return demo()
    table = TABLES.get(name) or (generalisation if name.startswith("generalisation-") else None)
    if table is None:
        raise KeyError(f"no table {name!r}")
    return "\n".join(with_source(content, table(content)) for content in results(SOURCES.get(name, name)))


def updated(path: Path) -> str:
    """A text with its tables replaced by those of the results."""

    def fill(match: re.Match) -> str:
        table = render(match[2])
        if path.parent != ROOT:
            table = table.replace("](benchmarks/", "](" if path.parent.name == "benchmarks" else "](../benchmarks/")
        return f"{match[1]}{table}{match[3]}"

    return MARK.sub(fill, path.read_text(encoding="utf-8"))


def plots(folder: Path) -> None:
    """Draw a picture of each result that is a curve or a comparison."""
    import matplotlib

    matplotlib.use("Agg")
    drawings = {"throughput": throughput_plot, "scaling": scaling_plot}
    drawings |= {plan.benchmark: generalisation_pictures.differences for plan in PLANS.values()}
    for name, draw in drawings.items():
        for content in results(name):
            save(draw(content), folder / f"{name}-{content['folder']}.png")


def throughput_plot(content: dict):
    """Bars of every form's cost, a panel for each backbone and shape."""
    from matplotlib import pyplot

    cases: dict[tuple, list[dict]] = {}
    for row in content["rows"]:
        cases.setdefault((row["model"], row["size"], row["batch"]), []).append(row)
    figure, axes = pyplot.subplots(1, len(cases), figsize=(4.2 * len(cases), 4.2), squeeze=False)
    for axis, (case, rows) in zip(axes[0], cases.items(), strict=True):
        forms = [form for form in dict.fromkeys(row["form"] for row in rows) if not form.startswith("bare")]
        for shift, step, colour in ((-0.2, "inference", "tab:blue"), (0.2, "training", "tab:orange")):
            shown = [row for row in rows if row["step"] == step and row["form"] in forms]
            positions = [forms.index(row["form"]) + shift for row in shown]
            low, median, high = zip(*(row["cost_percent_quartiles"] for row in shown), strict=True)
            error = [[m - a for m, a in zip(median, low, strict=True)], [b - m for m, b in zip(median, high, strict=True)]]
            axis.barh(positions, median, 0.36, xerr=error, label=step, color=colour)
            least = 100 / next(row["ceiling"] for row in shown if "ceiling" in row) - 100
            axis.axvline(least, color=colour, linestyle=":", linewidth=1)
        axis.set_yticks(range(len(forms)), forms)
        axis.invert_yaxis()
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title("{}\n{} px, batch {}".format(*case), fontsize=9)
        axis.set_xlabel("cost over the bare backbone, %\n(median, quartiles; dotted: least possible)", fontsize=8)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper left", fontsize=8)
    return figure


def scaling_plot(content: dict):
    """Seconds of the adapter, a panel for each varied quantity."""
    from matplotlib import pyplot

    curves = scaling_curves(content)
    varied = list(dict.fromkeys(name for name, _ in curves))
    figure, axes = pyplot.subplots(1, len(varied), figsize=(3.2 * len(varied), 3.2), squeeze=False)
    for axis, name in zip(axes[0], varied, strict=True):
        for step in ("inference", "training"):
            points = curves[name, step]
            axis.plot(*zip(*points, strict=True), "o-", label=f"{step}, R² {r_squared(points):.3f}", markersize=4)
        axis.set_xlabel({"tokens": "patch tokens", "m": "tokens m", "r": "rank r"}.get(name, name))
        axis.set_xlim(0)
        axis.set_ylim(0)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("seconds, adapter alone")
    return figure


def save(figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a text is not up to date")
    options = parser.parse_args(arguments)
    outdated = [path for path in TEXTS if path.read_text(encoding="utf-8") != updated(path)]
    empty = [name for path in TEXTS for _, name, _ in MARK.findall(path.read_text(encoding="utf-8")) if not render(name)]
    if empty:
        print(f"{RESULTS} has no results of {', '.join(empty)}. Run those benchmarks with --out there.", file=sys.stderr)
    if options.check:
        for path in outdated:
            print(f"{path.relative_to(ROOT)} differs from its results. Run python -m benchmarks.report.", file=sys.stderr)
        return 1 if outdated or empty else 0
    for path in outdated:
        path.write_text(updated(path), encoding="utf-8")
    plots(IMAGES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
