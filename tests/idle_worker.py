"""What stands for a worker that is ready at once, or refuses its stage, says that it lives, and does no work."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import zmq

from flowspec.wire.codec import Codec
from flowspec.wire.messages import Alive, Configure, Failure, Ready


@contextmanager
def idle_worker(
    forward_s: Sequence[tuple[int, float]] = (), address: str = "127.0.0.1:*", refusal: str = ""
) -> Iterator[str]:
    """Its address. ``forward_s``: as in ``Ready``. ``refusal``: why its user has to mend something first."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router, codec, is_over = context.socket(zmq.ROUTER), Codec(), threading.Event()
    router.bind(f"tcp://{address}")

    def serve() -> None:
        drivers: set[bytes] = set()
        while not is_over.is_set():
            if router.poll(20):
                identity, *frames = router.recv_multipart()
                if isinstance(configure := codec.decode_to_worker(frames), Configure):
                    drivers.add(identity)
                    ready = Ready(configure.stage, 0, 0, list(forward_s))
                    answer = Failure(refusal, "", user_error=True) if refusal else ready
                    router.send_multipart([identity, *codec.encode(answer)])
            for driver in drivers:
                router.send_multipart([driver, *codec.encode(Alive())])
        router.close(linger=0)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield router.get_string(zmq.LAST_ENDPOINT).removeprefix("tcp://")
    finally:
        is_over.set()
        thread.join()
        context.term()
