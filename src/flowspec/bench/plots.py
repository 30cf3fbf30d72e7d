"""Results -> PNG files. The one module that loads matplotlib; no pyplot, so no window system and no global figures."""

from __future__ import annotations

import textwrap
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from flowspec.bench.report import BASELINES, baselines
from flowspec.bench.trace import TraceRun
from flowspec.errors import UsageError
from flowspec.request.records import RequestRecord, ScheduleResult, Span

SegmentFates = Mapping[int, tuple[int, int, int]]  # segment id -> nodes accepted, verified, sent

# Okabe and Ito's palette, told apart with every colour vision; wine and the spares are Paul Tol's.
_BLUE, _SKY, _GREEN, _ORANGE = "#0072B2", "#56B4E9", "#009E73", "#E69F00"
_VERMILION, _PURPLE, _GREY, _WINE = "#D55E00", "#CC79A7", "#8C8C8C", "#882255"
_SPARES = ("#332288", "#999933", "#117733", "#44AA99", "#661100", "#000000")

_SCHEDULES = {
    "ar": _GREY,
    "serial": _SKY,
    "chunked": _ORANGE,
    "pipedec": _PURPLE,
    "lockstep": _WINE,
    "flow": _BLUE,
    "tp-megatron": _GREEN,
    "tp-galaxy": _VERMILION,
}
_SHORT = {"chunked": "ch", "ar": "ar"}  # the baselines above the bars
_MARKERS = "s^Dv<oPXhp>d"  # in the order of the schedules, then of unknown names
_ACCEPTED, _WASTED, _PRUNED = "forward, rows accepted", "forward, verified but wasted", "forward, pruned"
_WORK = {
    "forward": _BLUE,
    "cancelled forward": "#E0E0E0",
    _ACCEPTED: _GREEN,
    _WASTED: _ORANGE,
    _PRUNED: "#BDBDBD",
    "draft pass": _PURPLE,
    "merging draft pass": _WINE,
    "growing": "#DDAACC",
    "lm_head": _SKY,
    "verify": _VERMILION,
    "send": "#332288",
}

_STYLE: dict[Any, Any] = {  # the stubs type the keys, in newer versions only
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "text.parse_math": False,
}
_DPI = 130
_SLOT_IN = 0.62  # width of a bar with its labels, inches
_BARS_MARGIN_IN = 0.8  # what lies beside them
_MIN_WIDTH_IN = 7.0
_MOST_ACCEPTED = 5  # the last class of the distribution is this many or more
_LEGEND_COLUMN_IN = 1.9


def colors(names: Iterable[str], known: Mapping[str, str] = _SCHEDULES) -> dict[str, str]:
    """A known name's own colour; a spare for others, by a hash of the name, or the next one where that is taken."""
    names = list(dict.fromkeys(names))
    chosen = {name: known[name] for name in names if name in known}
    for name in sorted(set(names) - set(known)):
        first = zlib.crc32(name.encode()) % len(_SPARES)
        turns = [_SPARES[(first + i) % len(_SPARES)] for i in range(len(_SPARES))]
        chosen[name] = next((color for color in turns if color not in chosen.values()), turns[0])
    return {name: chosen[name] for name in names}


@matplotlib.rc_context(_STYLE)
def throughput_bars(path: Path | str, results: Mapping[str, Sequence[ScheduleResult]], title: str) -> None:
    """One group of bars for each cluster or temperature, one bar for each schedule that ran there."""
    assert results and all(results.values()), "nothing to draw"
    of_schedule = colors(result.schedule for group in results.values() for result in group)
    num_bars = sum(len(group) for group in results.values())
    figure, axes = _figure(max(_MIN_WIDTH_IN, _SLOT_IN * (num_bars + len(results)) + _BARS_MARGIN_IN), 4.6, title)
    centers: list[float] = []
    left = 0.0
    for group in results.values():
        references = baselines(group)
        for position, result in enumerate(group):
            axes.bar(left + position, result.tokens_per_s, width=0.86, color=of_schedule[result.schedule])
            _label_bar(axes, left + position, result.tokens_per_s, references)
        centers.append(left + (len(group) - 1) / 2)
        left += len(group) + 1
    # Few bars keep their width in the narrowest figure.
    half = max(left, (_MIN_WIDTH_IN - _BARS_MARGIN_IN) / _SLOT_IN) / 2
    axes.set_xlim(left / 2 - 1 - half, left / 2 - 1 + half)
    axes.grid(visible=False)  # it would strike the labels through
    axes.set_xticks(centers, list(results))
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("tokens/s")
    axes.set_ylim(0, 1.2 * max(result.tokens_per_s for group in results.values() for result in group))
    ran = [name for name in BASELINES if any(name in baselines(group) for group in results.values())]
    if ran:
        names = " and to ".join(f"{name} ({_SHORT[name]})" if _SHORT[name] != name else name for name in ran)
        axes.set_title(f"small: ratio to {names} of the same group", fontsize=8, color="#444444")
    _legend(figure, of_schedule)
    _save(figure, path)


def _label_bar(axes: Axes, x: float, tokens_per_s: float, references: Mapping[str, float]) -> None:
    """The value, and below it the ratios, one line each."""
    ratios = [f"{tokens_per_s / speed:.2f}× {_SHORT[name]}" for name, speed in references.items()]
    for line, text in enumerate(reversed(ratios)):
        axes.annotate(
            text, (x, tokens_per_s), xytext=(0, 2 + 8.5 * line), textcoords="offset points",
            ha="center", va="bottom", fontsize=6.5, color="#444444",
        )  # fmt: skip
    axes.annotate(
        f"{tokens_per_s:.{1 if tokens_per_s < 100 else 0}f}",
        (x, tokens_per_s), xytext=(0, 2 + 8.5 * len(ratios)), textcoords="offset points",
        ha="center", va="bottom", fontsize=8, fontweight="bold",
    )  # fmt: skip


@matplotlib.rc_context(_STYLE)
def timeline(
    path: Path | str,
    runs: Sequence[TraceRun],
    start_s: float,
    end_s: float,
    title: str,
    fates: Sequence[SegmentFates | None] | None = None,
) -> None:
    """What every place did in ``[start_s, end_s)``: one panel for each run, one lane for each place.

    With ``fates``, one entry for each run, a forward's colour tells what became of its segment. Forwards of segments
    that have no entry, as those of the prefill, keep the colour of plain forwards.
    """
    if not start_s < end_s:
        raise UsageError(f"a timeline from {start_s} s to {end_s} s is empty; its end must lie after its start")
    assert runs, "nothing to draw"
    fates = fates if fates is not None else [None] * len(runs)
    shown = [[span for span in run.spans if span.end_s > start_s and span.start_s < end_s] for run in runs]
    kinds = [[_kind(span, of_run) for span in spans] for spans, of_run in zip(shown, fates, strict=True)]
    drawn = {kind for of_run in kinds for kind in of_run}
    of_kind = colors([*(kind for kind in _WORK if kind in drawn), *sorted(drawn - set(_WORK))], _WORK)
    num_lanes = [len(run.place_names) for run in runs]
    figure = Figure(figsize=(11, 1.3 + sum(0.55 + 0.3 * lanes for lanes in num_lanes)), dpi=_DPI, layout="constrained")
    _title(figure, title)
    panels = figure.subplots(len(runs), 1, squeeze=False, sharex=True, height_ratios=num_lanes)[:, 0]
    for axes, run, spans, of_run in zip(panels, runs, shown, kinds, strict=True):
        _draw_lanes(axes, run, spans, [of_kind[kind] for kind in of_run], start_s, end_s)
    panels[-1].set_xlabel("time since the request, ms")
    _legend(figure, of_kind)
    _save(figure, path)


def _kind(span: Span, fates: SegmentFates | None) -> str:
    if span.work != "forward" or not fates or span.segment_id not in fates:
        return span.work
    num_accepted, num_verified, _ = fates[span.segment_id]
    return _ACCEPTED if num_accepted else _WASTED if num_verified else _PRUNED


def _draw_lanes(
    axes: Axes, run: TraceRun, spans: Sequence[Span], face_colors: Sequence[str], start_s: float, end_s: float
) -> None:
    bars: defaultdict[tuple[int, str, bool], list[tuple[float, float]]] = defaultdict(list)
    for span, color in zip(spans, face_colors, strict=True):
        start, end = max(span.start_s, start_s), min(span.end_s, end_s)
        # A white edge parts neighbours; it would hide a bar of a pixel or two.
        has_edge = end - start > 0.005 * (end_s - start_s)
        bars[span.place, color, has_edge].append((1e3 * start, 1e3 * (end - start)))
    for (place, color, has_edge), extents in bars.items():
        # Not snapped to whole pixels: that would fill short pauses.
        axes.broken_barh(
            extents, (place - 0.39, 0.78), facecolor=color, edgecolor="white", linewidth=0.5 * has_edge, snap=False
        )
    axes.set_title(run.name, fontsize=9)
    axes.set_yticks(range(len(run.place_names)), list(run.place_names))
    axes.set_ylim(len(run.place_names) - 0.5, -0.5)  # the driver on top
    axes.set_xlim(1e3 * start_s, 1e3 * end_s)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


@matplotlib.rc_context(_STYLE)
def accepted_per_segment(path: Path | str, records: Mapping[str, Sequence[RequestRecord]], title: str) -> None:
    """How many nodes of a verified segment became output: its distribution for each schedule."""
    assert records, "nothing to draw"
    of_schedule = colors(records)
    figure, axes = _figure(max(_MIN_WIDTH_IN, 0.25 * len(records) * (_MOST_ACCEPTED + 1) + 2), 4.2, title)
    width = 0.84 / len(records)
    labels: dict[str, str] = {}
    for position, (schedule, of_requests) in enumerate(records.items()):
        accepted = [s.num_accepted for r in of_requests for s in r.segment_records if s.num_verified]
        counts = [sum(min(n, _MOST_ACCEPTED) == value for n in accepted) for value in range(_MOST_ACCEPTED + 1)]
        offset = (position - (len(records) - 1) / 2) * width
        axes.bar(
            [value + offset for value in range(_MOST_ACCEPTED + 1)],
            [100 * count / max(1, len(accepted)) for count in counts],
            width=0.92 * width,
            color=of_schedule[schedule],
        )
        mean = f"mean {sum(accepted) / len(accepted):.2f}, " if accepted else ""
        labels[f"{schedule} ({mean}n = {len(accepted)})"] = of_schedule[schedule]
    axes.set_xticks(range(_MOST_ACCEPTED + 1), [*map(str, range(_MOST_ACCEPTED)), f"{_MOST_ACCEPTED}+"])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("nodes of a segment that became output, roots included")
    axes.set_ylabel("share of verified segments, %")
    _legend(figure, labels, column_in=2.4)
    _save(figure, path)


@matplotlib.rc_context(_STYLE)
def sweep(
    path: Path | str,
    x_label: str,
    xs: Sequence[float],
    series: Mapping[str, Sequence[float]],
    title: str,
    log_x: bool = False,
) -> None:
    """Throughput over bandwidth, latency or number of stages; NaN leaves a gap."""
    assert xs and series, "nothing to draw"
    of_schedule = colors(series)
    figure, axes = _figure(_MIN_WIDTH_IN, 4.4, title)
    ranks = {name: i for i, name in enumerate([*_SCHEDULES, *sorted(set(series) - set(_SCHEDULES))])}
    for name, values in series.items():
        axes.plot(
            xs, values, color=of_schedule[name], label=name, linewidth=2.4 if name == "flow" else 1.6,
            marker=_MARKERS[ranks[name] % len(_MARKERS)], markersize=7, markeredgecolor="white", markeredgewidth=0.7,
        )  # fmt: skip
    if log_x:
        axes.set_xscale("log")
    if len(xs) <= 12:
        axes.set_xticks(list(xs), [f"{x:g}" for x in xs])
        axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel("tokens/s")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, path)


@matplotlib.rc_context(_STYLE)
def stacked(path: Path | str, bars: Mapping[str, Mapping[str, float]], y_label: str, title: str) -> None:
    """Parts of a whole for each bar, in the order of their names; every bar's sum is drawn as 100 %.

    A part below zero is left out of its bar.
    """
    assert bars, "nothing to draw"
    names = list(next(iter(bars.values())))
    palette = dict(zip(names, (_GREEN, _ORANGE, _SKY, _VERMILION, _PURPLE, _WINE, _BLUE), strict=False))
    figure, axes = _figure(max(_MIN_WIDTH_IN, 0.5 * len(bars) + 2), 4.6, title)
    for position, parts in enumerate(bars.values()):
        total, bottom = sum(max(0.0, value) for value in parts.values()), 0.0
        for name, value in parts.items():
            height = 100 * max(0.0, value) / total
            axes.bar(position, height, bottom=bottom, width=0.8, color=palette[name])
            bottom += height
        axes.annotate(f"{total:.0f} ms", (position, 100), ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(bars)), list(bars), rotation=60, ha="right", fontsize=7)
    axes.set_ylabel(y_label)
    axes.set_ylim(0, 108)
    _legend(figure, palette)
    _save(figure, path)


@dataclass(frozen=True)
class Growth:
    """Times over sizes: all work, and each part of it."""

    sizes: Sequence[float]
    total_ms: Sequence[float]
    parts_ms: Mapping[str, Sequence[float]]
    title: str


@matplotlib.rc_context(_STYLE)
def growth(path: Path | str, panels: Mapping[str, Growth], title: str) -> None:
    """One log-log panel for each kind of size, by its label; a dashed line shows linear growth from the first total."""
    assert panels, "nothing to draw"
    parts = list(dict.fromkeys(part for panel in panels.values() for part in panel.parts_ms))
    of_part = dict(zip(parts, (_GREEN, _ORANGE, _SKY, _VERMILION, _PURPLE, _WINE, _BLUE), strict=False))
    figure = Figure(figsize=(5 * len(panels), 4.6), dpi=_DPI, layout="constrained")
    _title(figure, title)
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (label, panel) in zip(all_axes, panels.items(), strict=True):
        guide = [panel.total_ms[0] * size / panel.sizes[0] for size in panel.sizes]
        axes.plot(panel.sizes, guide, color=_GREY, linestyle="--", linewidth=1.2)
        axes.plot(panel.sizes, panel.total_ms, color="black", linewidth=2.4, marker="o", markersize=5)
        for part, times in panel.parts_ms.items():
            axes.plot(panel.sizes, times, color=of_part[part], linewidth=1.4, marker="o", markersize=3)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(list(panel.sizes), [f"{size:g}" for size in panel.sizes])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y")
        axes.set_xlabel(label)
        axes.set_title(panel.title, fontsize=9)
    all_axes[0].set_ylabel("ms")
    _legend(figure, {"total": "black", **of_part, "linear growth": _GREY})
    _save(figure, path)


def _figure(width_in: float, height_in: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_in, height_in), dpi=_DPI, layout="constrained")
    _title(figure, title)
    axes = figure.subplots()
    axes.grid(axis="y")
    return figure, axes


def _title(figure: Figure, title: str) -> None:
    """Wrapped to the figure's width: a title may carry a whole set of conditions."""
    lines = textwrap.wrap(title, max(20, int(12 * figure.get_figwidth())))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11, fontweight="bold")


def _legend(figure: Figure, of_label: Mapping[str, str], column_in: float = _LEGEND_COLUMN_IN) -> None:
    patches = [Patch(color=color, label=label) for label, color in of_label.items()]
    columns = max(1, min(len(patches), int(figure.get_figwidth() / column_in)))
    figure.legend(handles=patches, loc="outside lower center", ncols=columns)


def _save(figure: Figure, path: Path | str) -> None:
    try:
        figure.savefig(path, format="png", facecolor="white")
    except OSError as error:
        raise UsageError(f"cannot write the plot to {path}: {error.strerror or error}") from None
