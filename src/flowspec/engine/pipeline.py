"""Workers that hold one model among them, brought up and tied to this driver.

A pipeline knows nothing of requests. When one is lost, another one over the same workers, or fewer, can take its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowspec.cluster.connections import Connections, LoadProgress, RemoteConnections
from flowspec.cluster.inproc import InprocConnections
from flowspec.cluster.launcher import Launcher, RunningWorkers
from flowspec.cluster.local import LocalProcesses, local_threads, num_cores
from flowspec.cluster.membership import security_of
from flowspec.cluster.replies import Replies
from flowspec.cluster.weight_server import WeightServer
from flowspec.config import EngineConfig, LinkConfig
from flowspec.core import DType, Partition, Weights
from flowspec.errors import ModelError, ProtocolError, UsageError
from flowspec.model.fingerprint import fingerprint
from flowspec.model.head_tensors import HeadTensors
from flowspec.model.loader import Checkpoint
from flowspec.schedule.pace import MeasuredCosts
from flowspec.wire.key_file import state_folder
from flowspec.wire.messages import Ready

DEFAULT_STAGES = 4


@dataclass(frozen=True)
class PipelineSpec:
    """What is to be brought up, and where. Raises ``UsageError`` for a combination that cannot be."""

    checkpoint: Checkpoint
    partition: Partition
    workers: Sequence[str] | None = None  # addresses in pipeline order; ``None``: processes started on this machine
    in_process: bool = False  # no processes at all: every worker in this one
    dtype: DType = "float32"
    device: str = "cpu"  # of workers that are started here
    weights: Weights = "float"  # of linear layers; never ``auto``
    link: LinkConfig = field(default_factory=LinkConfig)
    names: Sequence[str] | None = None  # of the workers' devices, for people
    taps: HeadTensors | None = None  # of a draft whose features the stages add up
    hints: str | None = None  # the directory of hint heads, as workers find it, if they are to give hints
    num_best: int = 0  # of a draft model, whose only stage has the lm_head and names so many tokens for each row

    def __post_init__(self) -> None:
        if self.workers is not None and (self.in_process or not self.workers):
            raise UsageError("workers: name at least one address, and do not ask for in_process too")
        addresses = list(self.workers or ())
        if twice := [address for place, address in enumerate(addresses) if address in addresses[:place]]:
            raise UsageError(f"workers: {twice[0]} is named twice; a worker runs one stage, so give each address once")
        if self.in_process and self.link.int8_wire:
            raise UsageError("int8_wire: there is no wire in one process; leave in_process or int8_wire out")
        if self.workers is not None and len(self.workers) != len(self.partition):
            raise UsageError(
                f"{len(self.workers)} workers for {len(self.partition)} stages; give one address for each stage"
            )

    def name_of(self, stage: int) -> str:
        """A stage's worker, as people know it."""
        worker = f"worker {stage}"
        name = self.names[stage - 1] if self.names else worker
        return worker if name == worker else f"{worker} ({name})"

    def tap_block(self, layer: int) -> Tensor:
        """For the worker that has the layer, in its dtype."""
        assert self.taps is not None, "nobody asks for it"
        return self.taps.block(layer, getattr(torch, self.dtype))

    @property
    def num_parallel(self) -> int:
        """Stages that run at the same time: workers elsewhere have cores of their own, here they share the driver's."""
        if self.workers is not None:
            return len(self.partition)
        return min(len(self.partition), max(1, num_cores() - 1))

    @property
    def can_measure(self) -> bool:
        """Workers that share cores, or one accelerator, measure at the same time, and so nothing of use."""
        if self.in_process:
            return False
        has_cores = torch.device(self.device).type == "cpu" and num_cores() > len(self.partition)
        return self.workers is not None or has_cores


class Pipeline:
    """The workers of one session. Use ``open_pipeline`` to make one; of use after ``await_ready``."""

    def __init__(self, spec: PipelineSpec, connections: Connections, launcher: Launcher | None = None) -> None:
        """``launcher``: who has the workers' processes; ``None`` in process."""
        self.spec = spec
        self.connections = connections
        self.launcher = launcher
        self.addresses = [] if launcher is None else list(launcher.addresses)  # of the workers; none in process
        self.ready: list[Ready] = []  # what each worker said of its stage; empty in process
        self.costs: MeasuredCosts | None = None  # of segments, where they could be measured

    @property
    def partition(self) -> Partition:
        return self.spec.partition

    def await_ready(self, progress: LoadProgress) -> None:
        """Wait until every worker has loaded its stage. Raises ``WorkerError``, or ``UsageError`` for bad settings."""
        self.use(self.connections.await_ready(progress))

    def use(self, ready: list[Ready]) -> None:
        """All workers are ready, and have said so. Raises ``WorkerError`` and ``ModelError`` for what they say."""
        self.ready = ready
        if self.spec.workers is not None:
            self._check_weights(self.spec.checkpoint)
        if self.spec.can_measure:
            if silent := [ready.stage for ready in self.ready if not ready.forward_s]:
                raise ProtocolError(f"worker {silent[0]} has not measured its forward; is it of this version?")
            item_bytes = 1 if self.spec.link.int8_wire else getattr(torch, self.spec.dtype).itemsize
            features = 0 if self.spec.taps is None else self.spec.taps.taps.width
            self.costs = MeasuredCosts(self.ready, (self.spec.checkpoint.hidden_size + features) * item_bytes)

    def _check_weights(self, checkpoint: Checkpoint) -> None:
        """Raises ``ModelError`` for a worker whose files are of another model: its text would be fluent and wrong."""
        for ready, layers, address in zip(self.ready, self.partition.stages, self.addresses, strict=True):
            ours = fingerprint(checkpoint, layers) if ready.fingerprint else ""
            if ours and ours != ready.fingerprint:
                raise ModelError(
                    f"worker {ready.stage} ({address}) holds other weights as {checkpoint.full_name} than this device "
                    f"(layers {layers}); copy the same model to both"
                )

    def num_slots(self, config: EngineConfig) -> int | None:
        """Rows that every worker's caches have room for; workers here share the memory. ``None``: unknown."""
        if config.kv_slots:
            return config.kv_slots
        share = config.kv_memory_share / (len(self.partition) if self.spec.workers is None else 1)
        known = [ready for ready in self.ready if ready.free_bytes and ready.slot_bytes]
        return min((int(share * ready.free_bytes / ready.slot_bytes) for ready in known), default=None)

    def close(self) -> None:
        """End the workers that were started for it; others go back to waiting."""
        self.connections.close()


def choose_partition(
    checkpoint: Checkpoint, stages: int | None, partition: str | Partition | None, num_workers: int | None
) -> Partition:
    """What is asked for, or an even one over the workers. Raises ``UsageError`` for contradictions."""
    if partition is not None:
        chosen = Partition.parse(partition) if isinstance(partition, str) else partition
        chosen.check_fits(checkpoint.num_layers)
    else:
        default = num_workers or min(DEFAULT_STAGES, checkpoint.num_layers)
        chosen = Partition.even(checkpoint.num_layers, default if stages is None else stages)
    if stages is not None and len(chosen) != stages:
        raise UsageError(f"{stages} stages, but the partition {chosen} has {len(chosen)}; give one of the two")
    return chosen


def open_pipeline(spec: PipelineSpec) -> Pipeline:
    """Start loading at the workers; what the driver itself needs can be loaded before ``Pipeline.await_ready``.

    Raises ``UsageError`` and ``WorkerError``; nothing is left running then.
    """
    if spec.in_process:
        taps = None if spec.taps is None else spec.taps.taps
        where = spec.checkpoint, spec.partition, spec.dtype, spec.device
        workers = InprocConnections(*where, spec.hints, spec.weights, taps, spec.tap_block)
        return Pipeline(spec, workers)
    if spec.workers is not None:
        security = security_of(spec.workers, state_folder(), spec.link.insecure)
        launcher = RunningWorkers(spec.workers, security)
    else:
        threads = local_threads(len(spec.partition))
        launcher = LocalProcesses(len(spec.partition), threads, spec.device)
        torch.set_num_threads(threads)  # the driver shares the cores with its workers
    return Pipeline(spec, connect(spec, launcher), launcher)


def connect(spec: PipelineSpec, launcher: Launcher) -> RemoteConnections:
    """A new session with the workers, which begin to load unless they still have what they are asked for.

    Raises ``UsageError``; the launcher is closed then.
    """
    sizes = spec.checkpoint.hidden_size, spec.checkpoint.vocab_size, getattr(torch, spec.dtype)
    taps = None if spec.taps is None else spec.taps.taps
    replies = Replies(len(spec.partition), *sizes, None if taps is None else taps.width, spec.num_best)
    connections = RemoteConnections(launcher, spec.link, replies, "draft worker" if spec.num_best else "worker")
    try:
        connections.configure(
            spec.checkpoint.full_name,
            spec.partition,
            spec.dtype,
            hints=spec.hints,
            weights=spec.weights,
            taps=taps,
            blocks=spec.tap_block,
            server=WeightServer(spec.checkpoint, spec.partition, spec.hints, with_head=spec.num_best > 0),
            num_best=spec.num_best,
        )
    except BaseException:
        connections.close()
        raise
    return connections
