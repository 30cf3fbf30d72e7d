"""What an emulated cluster's driver knows of its costs: what a start-up measurement would tell, and forwards since.

A real driver reads what every worker has measured (``worker.measure``) and corrects it by the timings of results
(``schedule.pace.MeasuredCosts``). So does this one; the measurement is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from flowspec.checked import check_not_negative, check_positive
from flowspec.emulation.description import ClusterDescription
from flowspec.schedule.pace import MeasuredCosts
from flowspec.wire.actor import Actor, Send
from flowspec.wire.messages import Message, Ready, Result
from flowspec.worker.measure import MEASURED_ROWS, PREFIX_LEN, never_shrinking


@dataclass(frozen=True)
class StartUp:
    """How far a start-up measurement is from the truth."""

    error: float = 0.05  # standard deviation of the logarithm of every figure: of a forward by rows, of a link's rate
    bias: float = 1.0  # all forwards seem to take this many times as long as they do

    def __post_init__(self) -> None:
        check_not_negative(self, "error")
        check_positive(self, "bias")


AS_USUAL = StartUp()


def measure(cluster: ClusterDescription, start_up: StartUp, seed: int, has_taps: bool = False) -> MeasuredCosts:
    """The costs of segments, as the driver believes them; another ``seed`` is another start of the cluster.

    ``has_taps``: rows bring a draft's features along, which are as wide.
    """
    random = Random(f"{seed} {cluster.name}")

    def measured(value: float) -> float:
        return value * random.lognormvariate(0.0, start_up.error)

    ready: list[Ready] = []
    for stage in range(cluster.num_stages):
        times = [measured(start_up.bias * cluster.stage_s(stage, rows, PREFIX_LEN)) for rows in MEASURED_ROWS]
        link = cluster.links[stage + 1]
        rate = measured(1 / link.transfer_s(1)) if stage + 1 < cluster.num_stages else None
        ready.append(Ready(stage + 1, 0, 0, [*zip(MEASURED_ROWS, never_shrinking(times), strict=True)], rate))
    model = cluster.model
    return MeasuredCosts(ready, (1 + has_taps) * model.hidden_size * model.bytes_per_activation)


class Informed:
    """A driver as its engine runs it: the timings of each result correct the costs before it is worked on."""

    def __init__(self, driver: Actor, costs: MeasuredCosts) -> None:
        self.costs = costs  # another measurement's, once the cluster was started anew
        self._driver = driver

    @property
    def wake_s(self) -> float:
        return self._driver.wake_s

    def on_message(self, message: Message) -> list[Send]:
        if isinstance(message, Result):
            self.costs.note(message.timings)
        return self._driver.on_message(message)

    def on_idle(self) -> list[Send] | None:
        return self._driver.on_idle()
