"""Results as tables and JSON, the machine they were taken on, and how sure a ratio is."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import flowspec
from flowspec.cluster.local import num_cores
from flowspec.request.records import RequestRecord, ScheduleResult

BASELINES = ("chunked", "ar")  # ratios are given to these, where they ran


def baselines(results: Sequence[ScheduleResult]) -> dict[str, float]:
    """Tokens per second of the baselines that ran."""
    speeds = {result.schedule: result.tokens_per_s for result in results}
    return {name: speeds[name] for name in BASELINES if speeds.get(name)}


def results_cells(results: Sequence[ScheduleResult]) -> list[list[str]]:
    """Headings, and a row for each schedule; ratios only to the baselines that ran."""
    references = baselines(results)
    figures = ["mean accepted", "rows/segment", "restarts", "busiest stage %", "driver %", "MB on links"]
    rows = [
        [
            result.schedule,
            f"{result.tokens_per_s:.2f}",
            *(f"{result.tokens_per_s / speed:.2f}" for speed in references.values()),
            f"{result.mean_accepted:.2f}",
            f"{result.rows_per_segment:.1f}",
            str(result.restarts),
            f"{100 * max(result.stage_busy, default=0.0):.0f}",
            f"{100 * result.driver_busy:.0f}",
            f"{result.link_bytes / 1e6:.2f}",
        ]
        for result in results
    ]
    return [["schedule", "tokens/s", *(f"x {name}" for name in references), *figures], *rows]


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The first column to the left, the others to the right; padded, so that the source reads as a table too."""
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (headers, *rows)]
    assert all(len(line) == len(headers) for line in lines), "a row has more or fewer cells than there are headers"
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    padded = [
        [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def results_json(
    cluster: str | None, model: str, seed: int, settings: Mapping[str, Any], results: Sequence[ScheduleResult]
) -> dict[str, Any]:
    """What one bench command found; floats to six significant digits, so that a repeated run gives the same bytes."""
    return {
        "cluster": cluster,
        "model": model,
        "seed": seed,
        "settings": dict(settings),
        "results": [
            {
                "schedule": result.schedule,
                "tokens_per_s": _rounded(result.tokens_per_s),
                "mean_accepted": _rounded(result.mean_accepted),
                "rows_per_segment": _rounded(result.rows_per_segment),
                "restarts": result.restarts,
                "stage_busy": [_rounded(share) for share in result.stage_busy],
                "driver_busy": _rounded(result.driver_busy),
                "link_bytes": result.link_bytes,
                "num_tokens": result.num_tokens,
                "virtual_s": _rounded(result.virtual_s),
            }
            for result in results
        ],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def ratio_interval(
    numerator: Sequence[RequestRecord],
    denominator: Sequence[RequestRecord],
    seed: int = 0,
    num_resamples: int = 2000,
) -> tuple[float, float, float]:
    """Ratio of two schedules' total throughputs on the same requests, and its 95 % interval.

    A paired bootstrap: requests are drawn with replacement, each with both its records; the interval is that of the 2.5
    and 97.5 percentiles of the resampled ratios, widened to the ratio where a few skewed requests leave it outside.
    """
    above, below = (sorted(records, key=lambda r: r.index) for records in (numerator, denominator))
    indices = [record.index for record in above]
    assert indices, "no request was run"
    assert indices == [record.index for record in below], "the schedules ran different requests"
    assert len(set(indices)) == len(indices), "a request was run twice"
    # (4, num_requests): tokens and seconds above, tokens and seconds below
    columns = np.array(
        [
            [record.num_decoded for record in above],
            [record.decode_s for record in above],
            [record.num_decoded for record in below],
            [record.decode_s for record in below],
        ],
        dtype=np.float64,
    )
    assert (columns > 0).all(), "a request decoded nothing"
    drawn = np.random.default_rng(seed).integers(len(indices), size=(num_resamples, len(indices)))
    ratio = float(_ratio(columns.sum(axis=1)))
    low, high = np.percentile(_ratio(columns[:, drawn].sum(axis=2)), [2.5, 97.5])
    return ratio, min(float(low), ratio), max(float(high), ratio)


def _ratio(totals: np.ndarray) -> np.ndarray:
    return (totals[0] / totals[1]) / (totals[2] / totals[3])


def environment() -> dict[str, Any]:
    """What the figures were taken with and on; ``None`` for what cannot be found out."""
    return {
        "commit": _commit(Path(flowspec.__file__)),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "flowspec")},
        "machine": platform.machine(),
        "processor": _processor(),
        "num_cores": num_cores(),
        "memory_bytes": _memory_bytes(),
    }


def _commit(file: Path) -> str | None:
    """Of the checkout that tracks ``file``; one that merely holds an installed copy does not count."""
    try:
        for arguments in (["ls-files", "--error-unmatch", file.name], ["rev-parse", "HEAD"]):
            output = subprocess.run(
                ["git", *arguments], cwd=file.parent, capture_output=True, text=True, check=True, timeout=10
            ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(values, None)


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
