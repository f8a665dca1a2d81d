"""`python -m benchmarks`: measure all rows, or those that are named, and write down what a whole run found."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from llmstream_nb.setup import environment

HERE = Path(__file__).parent
MODULES = ("stream", "llm", "askers", "web", "jupyter", "start")


def main(arguments: list[str]) -> int:
    """Run one command line; return 0 where every row could be measured, and each text was exact."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("row", nargs="*", help="measure only these; without any, all")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out: the figures mean nothing")
    parser.add_argument("--list", action="store_true", help="name the rows")
    args = parser.parse_args(arguments)
    python = environment.ensure(dev=True, model=False)
    if python != Path(sys.executable) and not environment.in_venv():
        return subprocess.call([str(python), "-m", "benchmarks", *arguments], cwd=HERE.parent)
    load()
    from benchmarks.harness import ROWS, measure, report, surroundings

    if args.list:
        print("\n".join(f"{row.name:10} {row.title}" for row in ROWS.values()))
        return 0
    unknown = set(args.row) - set(ROWS)
    if unknown:
        parser.error(f"no row is named {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    environment.allow_open_files(8_192)
    about, results = surroundings(), []
    for row in [ROWS[name] for name in args.row] or ROWS.values():
        environment.say(f"{row.name}: {row.title} …")
        results.append(measure(row, args.quick))
        environment.say(f"    {results[-1].failed or results[-1].skipped or f'{results[-1].seconds:g} s'}")
    text = report(about, results)
    print(text)
    if not args.row and not args.quick:
        data = {"measured": time.strftime("%Y-%m-%d"), "about": about, "rows": [asdict(result) for result in results]}
        (HERE / "results.json").write_text(json.dumps(data, indent=1) + "\n", "utf-8")
        (HERE / "RESULTS.md").write_text(text, "utf-8")
    return int(any(result.failed for result in results))


def load() -> None:
    """Make the rows known."""
    from importlib import import_module

    for module in MODULES:
        import_module(f"benchmarks.{module}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
