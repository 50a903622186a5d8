"""Charts of results, one PNG for each JSON: kernels by the share of their ceiling, training steps by time and memory.

    pip install -e '.[bench]'
    python bench/plot.py --out charts bench/results/lora-h100-2026-11-25.json bench/results/rms_norm-h100-*.json

The ceiling is the copy's bandwidth for memory-bound kernels, and the plain matmuls' time for adapters and the head.
Needs no GPU.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

COLOURS = {
    "ours": "#1f6f8b", "ours, compiled": "#0b3c4d", "rewriter-eager": "#1f6f8b", "rewriter-inductor": "#0b3c4d",
    "eager": "#b8b8b8", "torch.compile": "#e08e45", "compile-blocks": "#e08e45", "liger": "#7a9e5f",
    "liger-compile": "#4d6b38", "bitsandbytes": "#7a9e5f", "in place": "#d9c27e",
}  # fmt: skip


@dataclasses.dataclass
class Panel:
    """Groups of bars: values[name][i] stands in groups[i]; a text stands for what has no value, None for nothing."""

    title: str
    groups: list[str]
    values: dict[str, list]
    ceiling: float | None = None


def panel(title, points, ceiling=None):
    """A panel of (group, name, value)."""
    groups, names = (list(dict.fromkeys(p[i] for p in points)) for i in (0, 1))
    at = {point[:2]: point[2] for point in points}
    return Panel(title, groups, {name: [at.get((group, name)) for group in groups] for name in names}, ceiling)


def family(data):
    """Families of memory-bound kernels: a panel for each count of bytes."""
    rows = [row for row in data["rows"] if "bytes" in row]
    several = len({row["dtype"] for row in rows}) > 1
    points = {}
    for row in rows:
        group = f"{row['variant']}\n{'x'.join(map(str, row['shape']))}, {row['tokens']} tokens"
        for label in row["bytes"]:
            share = row.get("of_copy", {}).get(label, "failed")
            points.setdefault(label, []).append((f"{group}, {row['dtype']}" if several else group, row["name"], share))
    return [panel(f"{label}, of a copy's bandwidth", found, 1.0) for label, found in points.items()]


def lora(data):
    rows = [row for row in data["rows"] if "of_frozen" in row]
    return [
        panel(
            f"{way}, speed of the frozen matmuls",
            [(f"{row['shape']}\nrank {row['rank']}", row["name"], 1 / row["of_frozen"][i]) for row in rows],
            1.0,
        )
        for i, way in enumerate(("forward", "backward"))
    ]


def unpacking(data):
    points = []
    for row in data["rows"]:
        group = f"{'x'.join(map(str, row['shape']))}\n{row['type']}{' nested' * row['nested']}, {row['dtype']}"
        points += [(group, name, share) for name, share in row.get("of a copy", {}).items()]
    return [panel("of a copy's bandwidth", points, 1.0)]


def head(data):
    points = [
        ("x".join(map(str, row["shape"])) + ("\ntrained" if row["trained"] else "\nfrozen"), row["name"],
         1 / row["of matmuls"] if "of matmuls" in row else "failed")
        for row in data["rows"]
    ]  # fmt: skip
    return [panel("speed of the plain matmuls, both ways", points, 1.0)]


def training(data):
    def points(key):
        return [
            (run["work"], run["mode"], run.get(key) if run["status"] == "ok" else run["status"]) for run in data["runs"]
        ]

    return [panel("ms a step", points("median_ms")), panel("peak GiB", points("peak_gib"))]


def panels(data):
    """The panels of a result, or none if there is no chart for its kind."""
    if data.get("benchmark") == "training":
        return training(data)
    rows = data.get("rows", [])
    kinds = {"of_copy": family, "of_frozen": lora, "of a copy": unpacking, "of matmuls": head}
    return next((draw(data) for key, draw in kinds.items() if any(key in row for row in rows)), [])


def device(data):
    """What the result says it was measured on."""
    environment = next((run["environment"] for run in data.get("runs", ()) if "environment" in run), data)
    versions = environment.get("versions", environment)
    return f"{environment['device']}, torch {versions['torch']}"


def draw(panels, title, path):
    """Panels side by side, groups below one another, each bar with its value or with the text that stands for it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = max(len(p.groups) * (len(p.values) + 1) for p in panels)
    size = (2 + 3.2 * len(panels), 1.2 + 0.13 * lines)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, p in zip(axes[0], panels, strict=True):
        height = 0.85 / len(p.values)
        for i, (name, values) in enumerate(p.values.items()):
            places = [group - 0.425 + (i + 0.5) * height for group in range(len(p.groups))]
            lengths = [v if isinstance(v, float) else 0.0 for v in values]
            axis.barh(places, lengths, height, label=name, color=COLOURS.get(name))
            for place, value in zip(places, values, strict=True):
                text = value if isinstance(value, str) else "" if value is None else f" {value:.3g}"
                axis.text(value if isinstance(value, float) else 0, place, text, va="center", fontsize=5)
        if p.ceiling:
            axis.axvline(p.ceiling, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(p.title, fontsize=8, loc="left")
        axis.set_yticks(range(len(p.groups)), p.groups if axis is axes[0][0] else [], fontsize=6)
        axis.set_ylim(len(p.groups) - 0.5, -0.5)
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=7, ncols=min(len(names), 6), loc="outside lower center", frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON of training.py or of a script in kernels/")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the PNGs; default: here")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for file in arguments.files:
        data = json.loads(file.read_text(encoding="utf-8"))
        found = panels(data)
        if not found:
            sys.exit(f"{file}: there is no chart for this kind of result")
        path = arguments.out / f"{file.stem}.png"
        draw(found, f"{file.stem.split('-')[0]} ({device(data)})", path)
        print(path)


if __name__ == "__main__":
    main()
