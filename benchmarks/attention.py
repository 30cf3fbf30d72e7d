"""What attention costs a stage at long contexts, against reading its keys and values once. Prints a table.

    python benchmarks/attention.py [--heads 32] [--kv-heads 8] [--head-dim 128] [--layers 8] [--slots 512,4096]
        [--rows 1,16] [--threads 1] [--repeat 9] [--json]

Random keys and values of one request, in float32 and in float16, one layer after the other: what the kernel does
between a layer's products, and nothing else. Rows follow each other, as those of a prompt do. **Times the bound**:
against the bytes of keys and values at the memory's speed, as summing an array shows it. Medians of the repetitions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowspec.bench.report import markdown_table
from flowspec.model.families import FULL
from flowspec.model.shared_kernel import write_and_attend
from flowspec.model.slot_cache import Paths, RequestRows, SlotCache
from flowspec.model.slot_kernel import factor_of
from flowspec.model.team import team_of

_SUMMED_BYTES = 2**29
_CHUNK = 64  # rows that are written at once before those that are measured


def bytes_per_s(repeat: int) -> float:
    """Of one thread."""
    array = np.ones(_SUMMED_BYTES // 8)
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        array.sum()
        times.append(time.perf_counter() - begin)
    return _SUMMED_BYTES / statistics.median(times)


def measure(arguments: argparse.Namespace, num_slots: int, num_rows: int, is_half: bool) -> dict[str, Any]:
    cache = SlotCache(arguments.layers, arguments.kv_heads, arguments.head_dim, is_half)
    draw, team, before = np.random.default_rng(0), team_of(arguments.threads), num_slots - num_rows

    def run(first: int, count: int, mask: NDArray[np.bool_], repeat: int) -> list[float]:
        """So many rows from a position on, which see what the mask says [rows, slots]: seconds of each repetition."""
        slots = cache.slots.append_prefix(range(first, first + count))
        request = RequestRows(0, slots, {FULL: Paths.of(mask, cache.slots.positions)}, cache)
        table = request.described([FULL] * arguments.layers)
        query, key, value = (
            draw.standard_normal((count, heads, arguments.head_dim), np.float32)
            for heads in (arguments.heads, arguments.kv_heads, arguments.kv_heads)
        )
        attended, factor = np.empty((count, query[0].size), np.float32), factor_of(arguments.head_dim**-0.5)
        seconds = []
        for _ in range(repeat):
            begin = time.perf_counter()
            for of_layer in table[:, None]:
                write_and_attend(team.mailbox, of_layer, query, key, value, factor, attended)
            seconds.append(time.perf_counter() - begin)
        return seconds

    for first in range(0, before, _CHUNK):
        count = min(_CHUNK, before - first)
        run(first, count, np.eye(count, first + count, first, dtype=bool), 1)  # each row sees itself alone
    seconds = run(before, num_rows, np.tri(num_rows, num_slots, before, dtype=bool), arguments.repeat)
    median_s = statistics.median(seconds)
    num_bytes = 2 * arguments.layers * num_slots * arguments.kv_heads * arguments.head_dim * (2 if is_half else 4)
    return {
        "kept_in": "float16" if is_half else "float32",
        "slots": num_slots,
        "rows": num_rows,
        "ms": 1000 * median_s,
        "times_the_bound": median_s / (num_bytes / arguments.bytes_per_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("heads", 32), ("kv-heads", 8), ("head-dim", 128), ("layers", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, numbers in (("slots", [512, 4096]), ("rows", [1, 16])):
        parser.add_argument(f"--{name}", type=lambda text: [int(part) for part in text.split(",")], default=numbers)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.heads % arguments.kv_heads or min(arguments.slots) <= max(arguments.rows):
        parser.error("heads are a multiple of those of keys, and slots more than rows")
    arguments.bytes_per_s = bytes_per_s(arguments.repeat)
    found = [
        measure(arguments, num_slots, num_rows, is_half)
        for num_slots in arguments.slots
        for num_rows in arguments.rows
        for is_half in (False, True)
    ]
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    lines = [
        [each["kept_in"], each["slots"], each["rows"], f"{each['ms']:.1f}", f"{each['times_the_bound']:.1f}"]
        for each in found
    ]
    print(markdown_table(["kept in", "slots", "rows", "ms", "times the bound"], lines))


if __name__ == "__main__":
    main()
