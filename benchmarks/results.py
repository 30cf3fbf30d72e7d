"""Runs every simulation of docs/RESULTS.md and writes it there, with JSON and plots in docs/results.

    python benchmarks/results.py [--only SECTION] [--num-prompts 40] [--jobs 2]

Each section is one table; docs/METHODOLOGY.md defines the figures. The same numbers come out on every run. What
several sections need is simulated once, and where a section takes fewer prompts they are the first ones of the others.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from simulated.lab import DEFAULT_NUM_PROMPTS, ROOT, Lab, Options, processes
from simulated.page import SECTIONS, write_json, write_sections
from simulated.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--num-prompts", type=int, default=DEFAULT_NUM_PROMPTS, help="prompts; sections that vary much take fewer"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; the results stay the same")
    parser.add_argument("--quick", action="store_true", help="2 prompts of 24 tokens, to see that it works")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of RESULTS.md and results/")
    parser.add_argument("--keep", type=Path, help="folder for what was simulated, to go on from after a break")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="run this section; may be repeated")
    arguments = parser.parse_args()
    if arguments.quick and arguments.out == ROOT / "docs":
        parser.error("--quick gives figures that mean nothing; name another folder with --out")
    if min(arguments.num_prompts, arguments.jobs, arguments.max_new_tokens - 1) < 1:
        parser.error("--num-prompts and --jobs must be at least 1, --max-new-tokens 2")
    num_prompts, max_new_tokens = (2, 24) if arguments.quick else (arguments.num_prompts, arguments.max_new_tokens)
    options = Options(num_prompts, max_new_tokens, arguments.out, arguments.quick)
    (options.out / "results").mkdir(parents=True, exist_ok=True)
    with processes(arguments.jobs) as pool:
        lab = Lab(options, pool, Store(arguments.keep) if arguments.keep else None)
        for name in arguments.only or SECTIONS:
            start = time.perf_counter()
            print(f"{name}: {SECTIONS[name][0]}", file=sys.stderr)
            lab.used = []
            write_sections(options.out / "RESULTS.md", {name: SECTIONS[name][1](lab)})
            write_json(lab, name)
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
