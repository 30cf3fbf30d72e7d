"""What ``flowspec emulate`` does once its options are read: each schedule in processes, and in the simulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flowspec.bench.study import check_same_tokens
from flowspec.emulation.checkpoint_pair import CheckpointPair
from flowspec.emulation.emulator import Emulator
from flowspec.emulation.experiment import Experiment
from flowspec.emulation.simulator import simulate
from flowspec.request.records import ScheduleResult


@dataclass(frozen=True)
class EmulatedResult:
    """One schedule as the processes ran it, next to what the simulator says of it."""

    result: ScheduleResult
    simulated_tokens_per_s: float
    max_lag_s: float  # by which a process was late in virtual time

    @property
    def ratio(self) -> float:
        return self.result.tokens_per_s / self.simulated_tokens_per_s

    def remark(self) -> dict[str, float]:
        figures = {
            "simulated_tokens_per_s": self.simulated_tokens_per_s,
            "emulated_to_simulated": self.ratio,
            "max_lag_ms": self.max_lag_s * 1000,
        }
        return {name: float(f"{value:.6g}") for name, value in figures.items()}


def run_emulated(
    experiment: Experiment,
    cluster_text: str,
    pair: CheckpointPair,
    schedules: Sequence[str],
    prompts: Sequence[tuple[int, str]],
    time_scale: float,
    progress: Callable[[float], None],
) -> list[EmulatedResult]:
    """``cluster_text``: of the experiment's cluster file, for the workers. ``prompts``: with their indices."""
    results: list[EmulatedResult] = []
    for place, name in enumerate(schedules):
        simulated = simulate(experiment, pair, name, prompts)
        with Emulator(experiment, cluster_text, name, pair, time_scale) as emulator:
            emulated = emulator.run(prompts, lambda done, place=place: progress((place + done) / len(schedules)))
        check_same_tokens({f"{name} simulated": simulated, f"{name} emulated": emulated.records})
        expected = ScheduleResult.of(name, simulated).tokens_per_s
        results.append(EmulatedResult(ScheduleResult.of(name, emulated.records), expected, emulated.max_lag_s))
    return results
