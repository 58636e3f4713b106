"""Tables and charts of a record, for the README and the terminal.

Every other formulation is given as a multiple of our time, measured in the same run. Slower rows
are printed like faster ones; what has no record says so.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from benchmarks import charts, records
from benchmarks.records import Key, Multiple, Record, Row, grouped

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("cuda", "triton", "cpu", "retrieval", "reference")  # ours: the first that was timed
OTHERS = ("eager", "tidy", "compiled", "autotuned")  # and third parties, where they were installed
NOT_OPS = ("training_step",)
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
MISSING = "not measured"
Peers = dict[str, Row]


def ours_of(peers: Peers) -> tuple[str, Row] | None:
    """The room that a user gets, or None where only others were timed."""
    room = next((r for r in ROOMS if r in peers), None)
    return None if room is None else (room, peers[room])


def milliseconds(row: Row) -> str:
    """Median and quartiles."""
    low, middle, high = (1e3 * s for s in row["seconds"])
    digits = 3 if middle < 0.1 else 2
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def multiple(peers: Peers, name: str, ours: Row) -> str:
    """Of our time."""
    if name not in peers:
        return "-"
    times = Multiple.of(peers[name], ours).middle
    return f"{times:,.0f}x" if times >= 100 else f"{times:.1f}x"


def third_parties(peers: Peers, ours: Row) -> str:
    """The packages that were timed."""
    names = sorted(set(peers) - set(ROOMS) - set(OTHERS))
    return ", ".join(f"{name} {multiple(peers, name, ours)}" for name in names) or "-"


def megabytes(row: Row | None) -> str:
    """Extra memory."""
    return f"{row['extra_memory'] / 1e6:.1f}" if row and "extra_memory" in row else "-"


def ops_of(record: Record, mode: str | None = None) -> dict[Key, Peers]:
    """Groups of ops that have a room of ours, of one mode if wanted."""
    return {
        key: peers
        for key, peers in grouped(record).items()
        if key[0] not in NOT_OPS and key[2] in ("forward", "training")
        and mode in (None, key[2]) and ours_of(peers)
    }  # fmt: skip


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def table(record: Record, mode: str | None = None, keys: Container[Key] | None = None) -> str:
    """Ops: our time, the others as multiples of it, fraction of the ceiling, extra memory.

    Args:
        record: of a run.
        mode: one alone.
        keys: these rows alone.
    """
    gpu = record["kind"] == "gpu"
    others = OTHERS if gpu else OTHERS[:3]
    heads = ["op", "shape", *([] if mode else ["mode"]), *(["type"] if gpu else []), "room",
             "ms (quartiles)", *others, "third parties", "of ceiling", "MB, tidy"]  # fmt: skip
    heads += ["graph us", "launches"] if gpu else []
    rows = []
    for key, peers in ops_of(record, mode).items():
        if keys is not None and key not in keys:
            continue
        op, shape, kind, precision = key
        room, ours = ours_of(peers) or ("", {})
        row = [f"`{op}`", shape, *([] if mode else [kind]), *([precision] if gpu else []), room]
        row += [milliseconds(ours), *(multiple(peers, name, ours) for name in others)]
        fraction = f"{ours['fraction']:.2f}" if "fraction" in ours else "-"
        memory = f"{megabytes(ours)}, {megabytes(peers.get('tidy'))}"
        row += [third_parties(peers, ours), fraction, memory]
        if gpu:
            graph = f"{1e6 * ours['graph'][1]:.1f}" if "graph" in ours else "-"
            row += [graph, number(ours.get("launches"))]
        rows.append(row)
    return markdown(heads, rows)


def slower(record: Record) -> list[Key]:
    """Rows in which another formulation takes less time than ours."""
    found = []
    for key, peers in ops_of(record).items():
        _, ours = ours_of(peers) or ("", {})
        others = (row for row in peers.values() if row is not ours)
        if any(Multiple.of(row, ours).middle < 1 for row in others):
            found.append(key)
    return found


def number(value: int | None) -> str:
    """A count, where there is one."""
    return "-" if value is None else str(value)


def steps(record: Record) -> dict[str, Peers]:
    """Shape -> forms of the whole training step."""
    return {key[1]: peers for key, peers in grouped(record).items() if key[0] == "training_step"}


def steps_table(record: Record) -> str:
    """Whole steps: milliseconds and pictures per second, and what they cost above the backbone."""
    heads = ["method, batch", "type", "ours, ms (quartiles)", "images/s", "published",
             "plain PyTorch ops", "bare backbone", "overhead, ours", "overhead, published",
             "ops", "waits", "launches"]  # fmt: skip
    rows = []
    for shape, peers in steps(record).items():
        if "ours" not in peers:
            continue
        ours = peers["ours"]
        row = [shape, ours.get("precision", "-"), milliseconds(ours)]
        row.append(f"{ours['images_per_second']:.1f}" if "images_per_second" in ours else "-")
        row += [multiple(peers, name, ours) for name in ("published", "reference", "backbone")]
        row += [overhead(peers, name) for name in ("ours", "published")]
        forms = [peers.get(name, {}) for name in ("ours", "published")]
        for what in ("dispatched", "waits", "launches"):
            row.append(", ".join(number(form.get(what)) for form in forms))
        rows.append(row)
    return markdown(heads, rows) if rows else ""


def overhead(peers: Peers, form: str) -> str:
    """Of a step's time above that of the bare backbone."""
    if form not in peers or "backbone" not in peers:
        return "-"
    share = peers[form]["seconds"][1] / peers["backbone"]["seconds"][1] - 1
    return f"{100 * share:+.0f} %"


def others_table(record: Record, without: Container[str] = ()) -> str:
    """What is no op: the evaluator, re-ranking, search, loading, each in its own words."""
    rows = []
    for (op, shape, _, _), peers in grouped(record).items():
        what = op.split("[")[0]
        for name, row in sorted(peers.items()):
            if "found" in row and what not in without:
                size = shape or op.removeprefix(what).strip("[]")
                time = milliseconds(row) if row.get("rounds", 1) > 1 else "-"
                rows.append([f"`{what}`", size, name, time, in_words(row["found"])])
    heads = ["what", "size", "by", "ms (quartiles)", "found"]
    return markdown(heads, rows) if rows else ""


def in_words(found: dict[str, Any]) -> str:
    """`ratio to product 1.49; seconds: ours 0.67, product 0.45`."""
    parts = []
    for name, value in found.items():
        label, unit = name.replace("_", " "), 1.0
        if label.endswith("megabytes"):
            label = label.replace("megabytes", "MB")
        elif label.endswith("bytes"):
            label, unit = label.replace("bytes", "MB"), 1e6
        if isinstance(value, dict):
            pairs = ", ".join(f"{k} {figure(v / unit)}" for k, v in value.items())
            parts += [f"{label}: {pairs}"] if pairs else []
        else:
            parts.append(f"{label} {figure(value / unit)}")
    return "; ".join(parts) or "-"


def figure(value: float) -> str:
    """Three digits; large numbers whole."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def signature(record: Record) -> str:
    """Where, when and how."""
    machine = record["machine"]
    rates = machine.get("ceilings", {})
    parts = [record["date"], f"commit {record['commit']}", machine.get("device", "?"),
             machine.get("vectors", "") if record["kind"] == "cpu" else "",
             f"{machine.get('threads', '?')} threads" if record["kind"] == "cpu" else "",
             f"PyTorch {machine.get('torch', '?')}"]  # fmt: skip
    text = ", ".join(part for part in parts if part) + f"; `{record['command']}`"
    if rates:
        units = {"copy": "copy {:.1f} GB/s"}
        units |= {
            name: name + " product {:.0f} GFLOP/s" for name in ("float32", "bfloat16", "tf32")
        }
        known = [u.format(rates[n] / 1e9) for n, u in units.items() if n in rates]
        text += f"; measured in the same run: {', '.join(known)}"
    return text


def chosen(record: Record) -> dict[str, tuple[Key, Peers]]:
    """One row of each op for the charts: training if it has that, where we take longest."""
    found: dict[str, tuple[Key, Peers]] = {}
    for key, peers in ops_of(record).items():
        _, ours = ours_of(peers) or ("", {})
        rank = (key[2] == "training", key[3] == "bfloat16", ours["seconds"][1])
        if key[0] in found:
            old, theirs = found[key[0]]
            _, before = ours_of(theirs) or ("", {})
            if rank <= (old[2] == "training", old[3] == "bfloat16", before["seconds"][1]):
                continue
        found[key[0]] = (key, peers)
    return found


def speed_chart(record: Record) -> str:
    groups = []
    for op, (key, peers) in chosen(record).items():
        _, ours = ours_of(peers) or ("", {})
        bars = []
        for name in OTHERS:
            if name in peers:
                low, middle, high = Multiple.of(peers[name], ours)
                bars.append(charts.Bar(NAMES[name], middle, low, high))
        if bars:
            groups.append(charts.Group(f"{op} {key[2]}", bars))
    title = "times our time: right of 1 ours is faster (whiskers: quartiles)"
    axis = charts.axis_for(title, groups, log=True, mark=1.0)
    return charts.chart("Speed-up", groups, axis, unit="x", note=plain(record), series=SERIES)


NAMES = {"eager": "published formulation", "tidy": "tidy eager PyTorch",
         "compiled": "torch.compile", "autotuned": "torch.compile, max-autotune"}  # fmt: skip
SERIES = ("ours", *NAMES.values(), "our ops in plain PyTorch")


def ceiling_chart(record: Record) -> str:
    groups = [
        charts.Group(f"{op} {key[2]}", [
            charts.Bar(label, peers[name]["fraction"])
            for name, label in ((room, "ours"), ("tidy", NAMES["tidy"]))
            if name in peers and "fraction" in peers[name]
        ])
        for op, (key, peers) in chosen(record).items()
        for room, _ in [ours_of(peers) or ("", {})]
    ]  # fmt: skip
    groups = [group for group in groups if group.bars]
    title = "time of the necessary bytes and products at the measured rates, over the time taken"
    axis = charts.axis_for(title, groups, log=False, mark=1.0)
    return charts.chart("Fraction of the ceiling", groups, axis, note=plain(record), series=SERIES)


def memory_chart(record: Record) -> str:
    groups = []
    for op, (key, peers) in chosen(record).items():
        room, _ = ours_of(peers) or ("", {})
        bars = [
            charts.Bar(label, peers[name]["extra_memory"] / 1e6)
            for name, label in ((room, "ours"), *((n, NAMES[n]) for n in OTHERS[:2]))
            if name in peers and peers[name].get("extra_memory")
        ]
        if bars:
            groups.append(charts.Group(f"{op} {key[2]}", bars))
    axis = charts.axis_for("MB held at once by a step, results included", groups, log=True)
    return charts.chart("Extra memory", groups, axis, note=plain(record), series=SERIES)


def steps_chart(record: Record) -> str:
    labels = {"ours": "ours", "reference": "our ops in plain PyTorch", "published": NAMES["eager"]}
    groups = []
    for shape, peers in steps(record).items():
        if "backbone" not in peers:
            continue
        a, b, c = peers["backbone"]["seconds"]
        bars = []
        for form, label in labels.items():
            if form in peers:
                low, middle, high = peers[form]["seconds"]
                bars.append(charts.Bar(label, middle / b, low / c, high / a))
        groups.append(charts.Group(shape, bars))
    title = "times a step of the bare backbone on the same images (whiskers: quartiles)"
    axis = charts.axis_for(title, groups, log=False, mark=1.0)
    return charts.chart("Training steps", groups, axis, unit="x", note=plain(record), series=SERIES)


def plain(record: Record) -> str:
    return signature(record).split(";")[0]


CHARTS = {"speed-up": speed_chart, "ceiling": ceiling_chart, "memory": memory_chart,
          "steps": steps_chart}  # fmt: skip


def files_of(path: Path, record: Record) -> dict[Path, str]:
    """Charts and the table of forward passes beside a record."""
    found = {path.parent / f"{name}.svg": draw(record) for name, draw in CHARTS.items()}
    heading = f"# {record['machine'].get('device', '?')}\n\n{signature(record)}\n\n"
    parts = (table(record), steps_table(record), others_table(record))
    found[path.parent / "tables.md"] = heading + "\n\n".join(filter(None, parts)) + "\n"
    return found


def gpu_summary(found: dict[str, Any]) -> str:
    """The short table at the end of `make gpu`: of every op the row of the charts."""
    record = records.flattened(found)
    kept = {key for key, _ in chosen(record).values()}
    rows = [row for row in record["rows"] if (row["op"], row["shape"], row["mode"],
                                              row["precision"]) in kept]  # fmt: skip
    parts = [table({**record, "rows": rows})] if rows else []
    return "\n\n".join(filter(None, [*parts, steps_table(record), signature(record)]))


def everything(record: Record, mode: str | None = None) -> str:
    """All tables, for the terminal."""
    parts = [table(record, mode), steps_table(record), others_table(record), signature(record)]
    return "\n\n".join(part for part in parts if part)
