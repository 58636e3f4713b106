"""The README's performance section: between two markers, every character from committed records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks import agreement, records, tables
from benchmarks.records import Record

README = tables.ROOT / "README.md"

HEAD = """## Benchmarks

Written by `python benchmarks/report.py --readme` from the records in `benchmarks/results`; a test
holds this section to them. `ms` is our step alone, over and over. Other columns are multiples of
our time, on a CPU of a call of ours before each of their rounds, when the caches hold what theirs
left: the published formulation (loops and broadcasts, written from the papers), tidy eager PyTorch,
`torch.compile` of that. Above 1x ours is faster; slower rows are shown like faster ones. No row is
timed before its results and gradients equal the float64 reference. `training` is forward and
backward. `of ceiling`: the time of the bytes and products that a row cannot do without, at the
rates measured in the same run, over its time (rows that stay in a CPU's cache may exceed 1). `MB,
tidy`: memory that a step holds beyond its arguments, ours and tidy eager. Large tensors of the ops'
rows come from memory that the process used before: else the first touch of new pages would decide
these times on a CPU.

```sh
make bench         # this machine: pytest benchmarks --benchmark-only, then this report
make bench-check   # ratios against the committed baseline of this device class
make gpu           # on a GPU: tests, sanitizer, counts, times, steps; resumable
```
"""


def section(folder: Path = records.RESULTS) -> str:
    """The whole section with its markers."""
    cpu, gpu = (records.latest(kind, folder) for kind in ("cpu", "gpu"))
    parts = [tables.BEGIN, HEAD.rstrip(), *_cpu(cpu), *_gpu(gpu, cpu), tables.END]
    return "\n\n".join(parts)


def _charts(path: Path, names: tuple[str, ...]) -> str:
    return "\n".join(f"![{name}]({_linked(path)}/{name}.svg)" for name in names)


def _linked(path: Path) -> str:
    """A record's folder as the README writes it."""
    folder, root = path.parent, tables.ROOT
    return (folder.relative_to(root) if folder.is_relative_to(root) else folder).as_posix()


def _body(path: Path, record: Record) -> Iterator[str]:
    yield tables.signature(record) + "."
    yield _charts(path, ("speed-up", "ceiling", "memory"))
    yield tables.table(record, keys={key for key, _ in tables.chosen(record).values()})
    count = len(tables.ops_of(record))
    yield (
        "Of each op the shape that takes longest, with its gradient where it has one; all "
        f"{count} rows: `{_linked(path)}/tables.md`."
    )
    slower = tables.slower(record)
    yield f"Rows in which another formulation is faster than ours: {len(slower)} of {count}."
    if slower:
        yield tables.table(record, keys=slower)
    yield from _spread(path, record)


def _spread(path: Path, record: Record) -> Iterator[str]:
    """How far the record before it is from this one."""
    earlier = records.before(path)
    if earlier is not None:
        found = agreement.summary(agreement.moves(earlier, record))
        when = f"{earlier['date']} {earlier.get('time', '')}".strip()
        yield f"Against the record before it ({when}, commit {earlier['commit']}): {found}."


def _steps(path: Path, record: Record) -> Iterator[str]:
    if not tables.steps(record):
        yield f"Whole training steps: {tables.MISSING}."
        return
    size = "small networks and images" if record["kind"] == "cpu" else "official size"
    yield (
        f"Whole training steps ({size}): bytes to the device, forward, losses, backward, "
        "optimiser. Multiples of our time; `overhead` is the step's time above that of the bare "
        "backbone on the same images; `ops` (dispatched by PyTorch), `waits` (for the device; on a "
        "CPU ops that would make one wait, its checks of labels among them) and `launches`: ours, "
        "published formulation."
    )
    yield tables.steps_table(record)
    yield _charts(path, ("steps",))


def _cpu(newest: tuple[Path, Record] | None) -> Iterator[str]:
    yield "### CPU"
    if newest is None:
        yield f"{tables.MISSING.capitalize()}."
        return
    yield from _body(*newest)
    yield from _steps(*newest)
    others = tables.others_table(newest[1], without=("waiting",))
    if others:
        yield (
            "What is no op: evaluation at the real size of SYSU-MM01, re-ranking, search, loading. "
            f"Waiting for data in a training step: `{_linked(newest[0])}/tables.md`."
        )
        yield others


def _gpu(newest: tuple[Path, Record] | None, cpu: tuple[Path, Record] | None) -> Iterator[str]:
    yield "### GPU"
    if newest is not None:
        yield from _body(*newest)
        yield from _steps(*newest)
        return
    names = sorted({key[0] for key in tables.ops_of(cpu[1])}) if cpu else []
    rows = [[f"`{name}`", tables.MISSING, tables.MISSING] for name in names]
    rows.append(["whole training steps, official size", tables.MISSING, tables.MISSING])
    yield tables.markdown(["op", "against eager", "of ceiling"], rows)


def replaced(text: str, new: str) -> str:
    """The README with its section exchanged.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    begin, end = text.find(tables.BEGIN), text.find(tables.END)
    if begin < 0 or end < begin or text.count(tables.BEGIN) + text.count(tables.END) != 2:
        raise ValueError(f"README.md: expected one {tables.BEGIN} and one {tables.END} after it")
    return text[:begin] + new + text[end + len(tables.END) :]


def files(folder: Path = records.RESULTS) -> dict[Path, str]:
    """Everything that is generated, with its text."""
    found = {README: replaced(README.read_text(), section(folder))}
    for kind in ("cpu", "gpu"):
        newest = records.latest(kind, folder)
        if newest is not None:
            found |= tables.files_of(*newest)
    return found


def write() -> list[Path]:
    """Write what changed."""
    changed = []
    for path, text in files().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            changed.append(path)
    return changed
