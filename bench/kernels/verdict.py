"""What a family's rows say: its lines of text, and each figure that misses its target.

Targets: a share of the copy's bandwidth (in the rows), no part slower than Liger or Inductor, errors within the rule.
Imports nothing that takes time.
"""

OURS = ("ours", "ours, compiled")
PEERS = ("liger", "torch.compile")
NOISE = 1.01  # the median of one function, taken twice in a run, differs by so much


def title(row):
    return f"{row['variant']} {'x'.join(map(str, row['shape']))}, {row['tokens']} tokens, {row['dtype']}"


def text(rows):
    """The lines of one case."""
    copied = rows[0].get("copy_ms", {})
    copies = ", ".join(f"{label} {rows[0]['bytes'][label] / ms / 1e6:.0f} GB/s" for label, ms in copied.items())
    lines = [f"{title(rows[0])} (a copy of as many bytes: {copies})"]
    for row in rows:
        if "error" in row:
            lines.append(f"    {row['name']:15} {row['error']}")
            continue
        parts = "  ".join(f"{part} {row['ms'][part]:7.3f} ms" for part in ("forward", "backward") if part in row["ms"])
        shares = "  ".join(f"{label} {share:6.1%}" for label, share in row["of_copy"].items())
        extra = "" if row["extra_mib"] is None else f"  extra {row['extra_mib']:7.1f} MiB"
        worst = "error {:.1e} (eager's {:.1e})".format(*max(row["errors"]))
        lines.append(f"    {row['name']:15} {parts}  of a copy: {shares}{extra}  {worst}")
    return "\n".join(lines)


def misses(rows, timed=True):
    """A line for each part of a case, and each way of calling ours, that misses something; timed: judge times, too."""
    cases = {}
    for row in rows:
        cases.setdefault(title(row), {})[row["name"]] = row
    found = []
    for name, case in cases.items():
        for ours in OURS:
            if ours in case:
                found += [f"{name}, {ours}: {miss}" for miss in _misses(case, case[ours], timed)]
    return found


def _misses(case, row, timed):
    if "error" in row:
        return [row["error"]]
    found = [] if row["good"] else [f"errors (eager's) {', '.join(f'{a:.1e} ({b:.1e})' for a, b in row['errors'])}"]
    for part in ("forward", "backward", "both") if timed else ():
        reasons = [
            f"{row['of_copy'][label]:.1%} of a copy's bandwidth for {target:.0%}"
            for label, target in row["targets"].items()
            if row["parts"][label] == part and row["of_copy"][label] < target
        ]
        for peer in PEERS:
            theirs = case.get(peer, {}).get("ms", {}).get(part) if part in row["compared"] else None
            if theirs and row["ms"][part] > NOISE * theirs:
                reasons.append(f"{row['ms'][part] / theirs:.2f} of {peer}'s time")
        if reasons:
            found.append(f"{part}: {'; '.join(reasons)}")
    return found


def summary(results):
    lines = [f"{results['family']}: {len(results['rows'])} rows in {results['seconds']:.0f} s"]
    if results["not_compiled"]:
        lines.append(f"no time to compile: {'; '.join(results['not_compiled'])}")
    lines += [f"MISS {line}" for line in results["misses"]] or ["every target is met"]
    return "\n".join(lines)


def worst(rows):
    """("forward 91%, backward 86%", "1.02 of liger"), the least and the most of ours over all cases; "-" for none."""
    shares, slower, cases = {}, (0.0, ""), {}
    for row in rows:
        if "of_copy" in row:
            cases.setdefault(title(row), {})[row["name"]] = row
    for case in cases.values():
        for row in (case[name] for name in OURS if name in case):
            for label in row["targets"]:
                shares[label] = min(shares.get(label, float("inf")), row["of_copy"][label])
            for part in row["compared"]:
                for peer in PEERS:
                    if peer in case and part in row["ms"]:
                        slower = max(slower, (row["ms"][part] / case[peer]["ms"][part], peer))
    least = ", ".join(f"{label} {share:.0%}" for label, share in shares.items())
    return least or "-", "{:.2f} of {}".format(*slower) if slower[1] else "-"


def table(rows):
    """Aligned text of rows of strings; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)
