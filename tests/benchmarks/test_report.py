"""Records to tables, charts and the README's section: what is generated, and that it is there."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks import agreement, charts, readme, records, report, tables
from benchmarks.records import Record


def row(peer: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "op": "gem_pool", "shape": "lba", "mode": "training", "precision": "float32",
        "peer": peer, "seconds": [0.9 * seconds, seconds, 1.1 * seconds], **more,
    }  # fmt: skip


def record(kind: str = "cpu", *rows: dict[str, Any]) -> Record:
    return {
        "kind": kind, "date": "2030-01-02", "commit": "0123abcd", "command": f"make {kind}",
        "machine": {"class": "some-machine", "device": "Some Machine", "threads": 2,
                    "torch": "2.13", "vectors": "AVX2", "ceilings": {"copy": 4e10}},
        "rows": list(rows),
    }  # fmt: skip


OURS = row("cpu", 2e-3, fraction=0.25, extra_memory=2_000_000)
EAGER = row("eager", 1e-3, extra_memory=4_000_000)  # twice as fast as ours
SLOW = row("tidy", 6e-3, extra_memory=8_000_000)


def step(peer: str, seconds: float, **more: Any) -> dict[str, Any]:
    return row(peer, seconds, op="training_step", shape="mpanet_16", **more)


STEPS = (
    step("ours", 1.1, images_per_second=14.5, dispatched=480, waits=0, launches=None),
    step("published", 2.2, dispatched=1200, waits=55, launches=None),
    step("backbone", 1.0),
)


def save(folder: Path, found: Record) -> Path:
    path = folder / found["machine"]["class"] / f"{found['date']}-{found['commit']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return path


class TestTables:
    def test_multiples_of_our_time(self) -> None:
        text = tables.table(record("cpu", OURS, EAGER, SLOW, row("torchsort", 8e-3)))
        head, _, line = text.splitlines()
        cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
        assert cells["ms (quartiles)"] == "2.00 (1.80-2.20)"
        assert cells["eager"] == "0.5x"  # slower than eager, and shown
        assert cells["tidy"] == "3.0x"
        assert cells["compiled"] == "-"
        assert cells["third parties"] == "torchsort 4.0x"
        assert cells["of ceiling"] == "0.25"
        assert cells["MB, tidy |"] == "2.0, 8.0 |"

    def test_multiples_measured_in_turns(self) -> None:
        """They stand, whatever the times of the two rows alone are."""
        eager = {**EAGER, "multiple": [1.4, 1.5, 1.6]}
        found = record("cpu", OURS, eager)
        assert "| 1.5x |" in tables.table(found)
        assert tables.slower(found) == []
        assert "1.5x" in tables.speed_chart(found)
        assert [str(m.first) for m in agreement.moves(found, found)] == ["1.50x (1.40-1.60)"]
        assert len(tables.slower(record("cpu", OURS, EAGER))) == 1

    def test_a_gpu_has_more_columns(self) -> None:
        ours = row("triton", 2e-4, precision="bfloat16", graph=[1e-4] * 3, launches=2)
        text = tables.table(record("gpu", ours, row("autotuned", 3e-4, precision="bfloat16")))
        assert "| 100.0 | 2 |" in text
        assert "| 1.5x |" in text
        assert "bfloat16" in text

    def test_rooms_stand_before_the_reference(self) -> None:
        text = tables.table(record("cpu", row("reference", 9.0), OURS))
        assert "| cpu | 2.00" in text

    def test_whole_steps(self) -> None:
        text = tables.steps_table(record("cpu", *STEPS))
        assert "| 2.0x | - | 0.9x | +10 % | +120 % | 480, 1200 | 0, 55 | -, - |" in text
        assert "| 14.5 |" in text

    def test_what_is_no_op(self) -> None:
        found = {
            "ratio_to_product": 1.4912,
            "seconds": {"ours": 0.5, "dense": 1234.5},
            "extra_bytes": {"ours": 2_500_000},
            "faster_than": {},
        }
        rows = [
            row("retrieval", 0.5, op="sysu_table", mode="", rounds=7, found=found),
            row("pack", 0.5, op="loader[mcja]", mode="", shape="", rounds=1, found={}),
        ]
        text = tables.others_table(record("cpu", *rows))
        words = "ratio to product 1.49; seconds: ours 0.5, dense 1,234; extra MB: ours 2.5"
        assert f"| `sysu_table` | lba | retrieval | 500.00 (450.00-550.00) | {words} |" in text
        assert "| `loader` | mcja | pack | - | - |" in text
        assert "sysu_table" not in tables.table(record("cpu", *rows))


class TestAgreement:
    """Two runs of one machine."""

    FIRST = record("cpu", OURS, EAGER, SLOW, *STEPS)
    # Ours and eager slowed down together: the multiple stays, whatever the machine did.
    SECOND = record("cpu", row("cpu", 4e-3), row("eager", 2e-3), row("tidy", 6e-3), *STEPS)

    def test_multiples_that_moved(self) -> None:
        text = agreement.text(self.FIRST, self.SECOND)
        assert "| tidy | 3.00x (2.45-3.67) | 1.50x (1.23-1.83) | 100 % |" in text
        assert "eager" not in text
        assert text.endswith("the quartile ranges of 3 meet")

    def test_a_rise_counts_as_much_as_a_fall(self) -> None:
        there, back = (
            {m.peer: m.change for m in agreement.moves(*pair)}
            for pair in ((self.FIRST, self.SECOND), (self.SECOND, self.FIRST))
        )
        assert there == pytest.approx(back)
        assert there["tidy"] == pytest.approx(1.0)

    def test_a_run_agrees_with_itself(self) -> None:
        assert agreement.text(self.FIRST, self.FIRST) == (
            "of 4 multiples of our time, half moved by less than 0 % and nine in ten by less than "
            "0 %; the quartile ranges of 4 meet"
        )

    def test_nothing_in_common(self) -> None:
        with pytest.raises(ValueError, match="no multiple"):
            agreement.text(self.FIRST, record("cpu", OURS))

    def test_the_readme_states_the_spread(self, tmp_path: Path) -> None:
        save(tmp_path, {**self.FIRST, "date": "2030-01-01"})
        assert "Against the record" not in readme.section(tmp_path)
        save(tmp_path, self.SECOND)
        text = readme.section(tmp_path)
        assert "Against the record before it (2030-01-01, commit 0123abcd): of 4 multiples" in text


FOUND = {
    "machine_info": {"class": "m", "device": "M", "torch": "2.13", "python_version": "3.11"},
    "commit_info": {"id": "0123abcd" * 5},
    "datetime": "2030-01-02T10:00:00",
    "benchmarks": [
        {"name": "bench_gem_pool[x]", "stats": {"q1": 1.0, "median": 2.0, "q3": 3.0,
                                                "rounds": 5, "data": [1.0]},
         "extra_info": {"op": "gem_pool", "peer": "cpu", "shape": "s", "mode": "training",
                        "precision": "float32", "error": 1.23456e-7,
                        "multiple": [1.23456, 2.0, 3.0]}},
        {"name": "bench_else", "stats": {}, "extra_info": {}},
        {"name": "bench_loader[mcja]", "stats": {"q1": 1.0, "median": 2.0, "q3": 3.0, "rounds": 5},
         "extra_info": {"peer": "pack", "ratio": 8.0, "rounds": {"a": [1.0]}, "note": "x",
                        "device": "cpu", "rates": {"pack": 900.0}}},
    ],
}  # fmt: skip


class TestRecords:
    def test_a_file_by_pytest_benchmark(self, tmp_path: Path) -> None:
        path = tmp_path / "found.json"
        path.write_text(json.dumps(FOUND))
        found = records.read(path)
        only, loader = found["rows"]
        assert loader["op"] == "loader[mcja]"
        assert loader["found"] == {"ratio": 8.0, "rates": {"pack": 900.0}}
        assert only["seconds"] == [1.0, 2.0, 3.0]
        assert only["error"] == 1.235e-7
        assert only["multiple"] == [1.235, 2.0, 3.0]
        assert found["commit"] == "0123abcd"
        kept = records.keep(path, tmp_path / "results")
        assert kept == tmp_path / "results" / "m" / "2030-01-02-0123abcd.json"
        assert records.read(kept) == found

    def test_a_file_by_make_gpu(self, tmp_path: Path) -> None:
        base = {"op": "gem_pool", "peer": "triton", "mode": "training", "shape": "s",
                "precision": "bfloat16"}  # fmt: skip
        name = "bench_pool.py::bench_gem_pool[bfloat16-triton-s-training]"
        counted = name.replace("bfloat16", "float32")
        found = {
            "kind": "gpu", "date": "2030-01-02", "commit": "0123abcd", "machine": {"class": "h"},
            "sections": {
                "ceilings": {"rows": {"ceilings": {"copy": 4.3e12}}},
                "counts": {"rows": {counted: {"launches": 1, "dispatched": 4, "waits": 0}}},
                "graphs": {"rows": {name: {"graph": [1e-5] * 3}}},
                "timings": {"rows": {name: {**base, "cold": [3e-5] * 3, "warm": [2e-5] * 3},
                                     "wrong": {**base, "failed": "Wrong"}}},
                "steps": {"rows": {"x": {"method": "x", "peer": "ours", "shape": "x_1",
                                         "precision": "bfloat16", "seconds": [1.0] * 3}}},
            },
        }  # fmt: skip
        path = tmp_path / "gpu.json"
        path.write_text(json.dumps(found))
        read = records.read(path)
        first, second = read["rows"]
        assert (first["seconds"], first["warm"]) == ([3e-5] * 3, [2e-5] * 3)
        assert (first["launches"], first["graph"]) == (1, [1e-5] * 3)
        assert second["op"] == "training_step"
        assert "copy 4300.0 GB/s" in tables.signature(read)
        assert "gem_pool" in tables.gpu_summary(found)

    def test_another_file(self, tmp_path: Path) -> None:
        path = tmp_path / "other.json"
        path.write_text('{"a": 1}')
        with pytest.raises(ValueError, match=r"expected a record of benchmarks, got keys \['a'\]"):
            records.read(path)

    def test_the_newest_of_a_kind(self, tmp_path: Path) -> None:
        save(tmp_path, {**record("cpu"), "date": "2029-01-01"})
        save(tmp_path, {**record("cpu"), "commit": "ffffffff", "time": "09:00:00"})
        newest = save(tmp_path, {**record("cpu"), "time": "10:00:00"})
        rehearsal = record("gpu")
        rehearsal["machine"]["class"] = "dry-run"
        save(tmp_path, rehearsal)
        path, _ = records.latest("cpu", tmp_path) or (None, None)
        assert path == newest
        assert records.latest("gpu", tmp_path) is None


class TestSection:
    def test_cpu_and_gpu_apart(self, tmp_path: Path) -> None:
        save(tmp_path, record("cpu", OURS, EAGER, SLOW, *STEPS))
        text = readme.section(tmp_path)
        cpu, gpu = text.split("### GPU")
        assert "2.00 (1.80-2.20)" in cpu
        assert "2030-01-02, commit 0123abcd, Some Machine" in cpu
        assert "`make cpu`" in cpu
        assert "+120 %" in cpu
        assert "| `gem_pool` | not measured | not measured |" in gpu
        assert gpu.rstrip().endswith(tables.END)

    def test_no_slower_row_is_hidden(self, tmp_path: Path) -> None:
        """An op shows its longest shape, and whatever is slower than another formulation."""
        short = {"shape": "short", "mode": "forward"}
        rows = [OURS, row("eager", 3e-3), row("cpu", 1e-3, **short), row("tidy", 9e-4, **short)]
        save(tmp_path, record("cpu", *rows, row("cpu", 1e-3, shape="quick")))
        cpu, _ = readme.section(tmp_path).split("### GPU")
        assert cpu.count("| `gem_pool` | lba | training |") == 1
        assert "faster than ours: 1 of 3." in cpu
        assert "| `gem_pool` | short | forward | cpu | 1.00 (0.90-1.10) | - | 0.9x |" in cpu
        assert "quick" not in cpu

    def test_a_gpu_record(self, tmp_path: Path) -> None:
        save(tmp_path, record("cpu", OURS))
        found = record("gpu", row("cuda", 1e-4, precision="bfloat16"))
        found["machine"]["class"] = "gpu-machine"
        save(tmp_path, found)
        gpu = readme.section(tmp_path).split("### GPU")[1]
        assert "0.10 (0.09-0.11)" in gpu
        assert "Whole training steps: not measured." in gpu

    def test_nothing_measured(self, tmp_path: Path) -> None:
        text = readme.section(tmp_path)
        assert "### CPU\n\nNot measured." in text

    def test_between_the_markers(self) -> None:
        text = f"a\n{tables.BEGIN}\nold\n{tables.END}\nb\n"
        assert readme.replaced(text, "new") == "a\nnew\nb\n"
        for broken in ("a", f"{tables.END}{tables.BEGIN}", text + text):
            with pytest.raises(ValueError, match="README"):
                readme.replaced(broken, "new")


class TestCharts:
    FOUND = record("cpu", OURS, EAGER, SLOW, *STEPS)

    @pytest.mark.parametrize("name", tables.CHARTS)
    def test_well_formed_and_the_same_again(self, name: str) -> None:
        draw = tables.CHARTS[name]
        text = draw(self.FOUND)
        assert draw(self.FOUND) == text
        assert ElementTree.fromstring(text).tag.endswith("svg")
        assert "2030-01-02" in text

    def test_bars_have_lengths_and_whiskers(self) -> None:
        axis = charts.Axis("t", 0.1, 10.0, log=True, mark=1.0)
        groups = [charts.Group("op <x>", [charts.Bar("a", 10.0, 5.0, 10.0), charts.Bar("b", 0.1),
                                          charts.Bar("c", None)])]  # fmt: skip
        text = charts.chart("title", groups, axis)
        root = ElementTree.fromstring(text)
        widths = [float(r.get("width") or 0) for r in root if r.get("height") == str(charts.BAR)]
        assert widths == [charts.PLOT / 2, charts.PLOT / 2]  # either side of 1
        assert "not measured" in text
        assert "op &lt;x&gt;" in text

    def test_slower_bars_end_left_of_one(self) -> None:
        axis = charts.axis_for("t", [charts.Group("g", [charts.Bar("a", 0.5)])], log=True, mark=1.0)
        assert axis.place(0.5) < axis.place(1.0)
        assert axis.low <= 0.5

    def test_a_series_has_one_colour_in_all_charts(self) -> None:
        published = 'fill="#e07b39"'
        for draw in (tables.speed_chart, tables.steps_chart, tables.memory_chart):
            legend = draw(self.FOUND).split(">published formulation<")[0].splitlines()
            assert published in legend[-2]

    def test_nothing_to_draw(self) -> None:
        for draw in tables.CHARTS.values():
            ElementTree.fromstring(draw(record("cpu")))


def test_the_readme_holds_what_the_records_generate() -> None:
    """Charts and tables beside the records too. After a new record: report.py --readme."""
    if not any(records.latest(kind) for kind in ("cpu", "gpu")):
        pytest.skip("no record is committed")
    for path, text in readme.files().items():
        assert path.exists(), f"{path} is missing: python benchmarks/report.py --readme"
        assert path.read_text() == text, f"{path.name}: python benchmarks/report.py --readme"


def test_the_command(tmp_path: Path) -> None:
    """As a file, as the README says, without PyTorch."""
    path = save(tmp_path, record("cpu", OURS, EAGER))
    code = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"sys.argv = ['report.py', {str(path)!r}]; "
        f"runpy.run_path({str(Path(report.__file__))!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| `gem_pool` | lba | training | cpu |" in done.stdout
