"""Records of benchmarks to tables and charts, and into the README.

python benchmarks/report.py                    the newest committed records
python benchmarks/report.py results.json       a file of pytest --benchmark-json or make gpu
python benchmarks/report.py B.json --against A.json   how far two runs are apart
python benchmarks/report.py --keep FILE.json   put it among the committed records
python benchmarks/report.py --readme           write the README's section and the charts
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    """Print tables, keep a record, or write the README's section."""
    if str(ROOT) not in sys.path:  # started as a file
        sys.path.insert(0, str(ROOT))
    from benchmarks import agreement, readme, records, tables

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("json", type=Path, nargs="?", help="a record; the committed ones else")
    parser.add_argument("--mode", choices=("forward", "training"), help="default: both")
    parser.add_argument("--against", type=Path, help="an earlier record: what moved since")
    parser.add_argument("--keep", action="store_true", help="put it among the committed records")
    parser.add_argument("--readme", action="store_true", help="write the README's section")
    arguments = parser.parse_args(argv)
    if arguments.json is None and (arguments.keep or arguments.against):
        parser.error("--keep and --against need a file")
    try:
        if arguments.against:
            both = map(records.read, (arguments.against, arguments.json))
            print(agreement.text(*both))
            return 0
        if arguments.keep:
            print(f"kept in {records.keep(arguments.json)}")
        found = [records.read(arguments.json)] if arguments.json else []
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if arguments.readme:
        for path in readme.write():
            print(f"wrote {path.relative_to(ROOT)}")
    if arguments.keep or arguments.readme:
        return 0
    if arguments.json is None:
        found = [newest[1] for kind in ("cpu", "gpu") if (newest := records.latest(kind))]
    for record in found:
        print(tables.everything(record, arguments.mode))
    if not found:
        print("no committed record")
    return 0


if __name__ == "__main__":
    sys.exit(main())
