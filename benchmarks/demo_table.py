"""The README's table out of the results of several `rein demo` runs: mean and standard deviation over seeds, mIoU in per cent.

python benchmarks/demo_table.py benchmarks/results/epyc-2-cores/demo-seed*.json
"""

import json
import statistics
import sys
from pathlib import Path


def cell(values: list[float]) -> str:
    """Mean and sample standard deviation of values from 0 to 1, in per cent."""
    per_cent = [100 * value for value in values]
    return f"{statistics.mean(per_cent):.1f} ± {statistics.stdev(per_cent):.1f}"


def table(runs: list[dict]) -> str:
    """A Markdown table with one row per method."""
    by_method = zip(*(run["results"] for run in runs), strict=True)
    domains = list(runs[0]["results"][0]["miou"])
    titles = [f"{d} (source)" if d == runs[0]["source"] else d for d in domains]
    lines = [["method", "tuned in the backbone", *titles, "mean of unseen"]]
    lines.append(["---"] * len(lines[0]))
    for results in by_method:
        first = results[0]
        share = first["tuned_parameters"] / first["backbone_parameters"]
        lines.append(
            [
                first["method"],
                f"{first['tuned_parameters']:,} ({share:.1%})",
                *(cell([result["miou"][domain] for result in results]) for domain in domains),
                cell([result["mean_miou_of_unseen"] for result in results]),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table([json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:]]))
