"""How sections say things: commands, pictures, and how much more one is than another."""

from __future__ import annotations

from collections.abc import Sequence

from flowspec.bench.report import ratio_interval
from flowspec.bench.runner import SYNTHETIC
from flowspec.request.records import RequestRecord, ScheduleResult
from simulated.lab import DEFAULT_NUM_PROMPTS, Case, Options, Runs

RIVALS = ("ar", "serial", "chunked", "pipedec", "lockstep")


def command(case: Case, options: Options) -> str:
    """What gives the figures of one case."""
    parts = [f"flowspec simulate clusters/{case.cluster.name}.toml --schedule {','.join(case.schedules)}"]
    parts += [f"--model {case.model}"] if case.model != SYNTHETIC else []
    parts += ["--as-published"] * case.as_published
    parts += [f"--draft-quality {case.quality}"] if case.quality != "eagle1" else []
    parts += [f"--temperature {case.temperature:g}"] if case.temperature else []
    parts += [case.flags] if case.flags else []
    parts += [f"--num-prompts {case.num_prompts or options.num_prompts} --max-new-tokens {options.max_new_tokens}"]
    return " ".join(parts)


def section_command(name: str, options: Options) -> str:
    """What writes a section anew with these figures."""
    num_prompts = f" --num-prompts {options.num_prompts}" if options.num_prompts != DEFAULT_NUM_PROMPTS else ""
    return f"python benchmarks/results.py --only {name}{num_prompts}"


def code(*commands: str) -> str:
    return "\n".join(["```sh", *commands, "```"])


def image(name: str, text: str) -> str:
    return f"![{text}](results/{name}.png)"


def per_cent(value: float, than: float) -> str:
    return f"{100 * (value / than - 1):+.1f} %"


def interval(runs: Runs, above: str, below: str) -> str:
    return ratio_text(runs[above], runs[below])


def ratio_text(above: Sequence[RequestRecord], below: Sequence[RequestRecord]) -> str:
    ratio, low, high = ratio_interval(above, below)
    return f"{ratio:.2f} ({low:.2f}-{high:.2f})"


def speed(records: Sequence[RequestRecord]) -> float:
    return ScheduleResult.of("", records).tokens_per_s


def best_rival(runs: Runs) -> str:
    return max(RIVALS, key=lambda name: speed(runs[name]))
