"""What a worker sends is checked at the driver's edge: an error that names the stage, and never a wrong text."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from flowspec.cluster.replies import Replies
from flowspec.core import SamplingParams
from flowspec.errors import ProtocolError
from flowspec.wire.codec import Codec
from flowspec.wire.messages import (
    Broken,
    Echo,
    Failed,
    Fetching,
    Guesses,
    Hint,
    Loading,
    Ready,
    Result,
    Stamped,
    Timing,
    ToDriver,
)
from flowspec.wire.transport import DRIVER
from pump import Pump, prompt_of

REPLIES = Replies(2, 8, 96, torch.float32)
TIMINGS = [Timing(1, 2, 0.1, 0.2, 10, 2), Timing(2, 2, 0.1, 0.2, 10, 2)]
RESULT = Result(0, 0, 3, [4, 6], 0, torch.zeros(2, 8), TIMINGS)
HINT = Hint(0, 0, [4], [[1, 2]], [[-0.1, -math.inf]])
GUESSES = Guesses(0, 0, [4], torch.tensor([[7, 95]], dtype=torch.int32), torch.tensor([[-0.1, -3.0]]))
READY = Ready(1, 10, 10, [(1, 0.1), (4, 0.2)], 1e6, 10, 10)


def timings(**fields: Any) -> list[Timing]:
    return [TIMINGS[0], TIMINGS[1]._replace(**fields)]


BAD: dict[str, tuple[ToDriver, int]] = {
    "int64 states": (replace(RESULT, hidden=torch.zeros(2, 8, dtype=torch.long)), 2),
    "another width": (replace(RESULT, hidden=torch.zeros(2, 7)), 2),
    "a result of the wrong stage": (RESULT, 1),
    "ids that do not grow": (replace(RESULT, node_ids=[6, 4]), 2),
    "an id twice": (replace(RESULT, node_ids=[4, 4]), 2),
    "a huge id": (replace(RESULT, node_ids=[4, 2**63]), 2),
    "a negative id": (replace(RESULT, node_ids=[-4, 4]), 2),
    "negative prefix": (replace(RESULT, num_prefix=-1), 2),
    "too few timings": (replace(RESULT, timings=TIMINGS[:1]), 2),
    "timings of stage 7": (replace(RESULT, timings=timings(stage=7)), 2),
    "a forward that ends before it starts": (replace(RESULT, timings=timings(end_s=0.05)), 2),
    "a time that is no number": (replace(RESULT, timings=timings(start_s=math.nan)), 2),
    "bytes beyond counting": (replace(RESULT, timings=timings(link_bytes=2**63)), 2),
    "a hint of the last stage": (HINT, 2),
    "a hint at no token": (replace(HINT, token_ids=[[1, 96]]), 1),
    "a hint that is no number": (replace(HINT, logprobs=[[-1.0, math.nan]]), 1),
    "guesses of a model that is no draft": (GUESSES, 2),
    "ready as another stage": (READY, 2),
    "ready in no time": (replace(READY, forward_s=[(1, 0.0)]), 1),
    "rows that shrink": (replace(READY, forward_s=[(4, 0.1), (1, 0.1)]), 1),
    "a link of no rate": (replace(READY, link_bytes_per_s=0.0), 1),
    "negative memory": (replace(READY, slot_bytes=-1), 1),
    "more than all is loaded": (Loading(math.nan), 1),
    "more than all is fetched": (Fetching(9, 8), 1),
    "bytes that are negative": (Fetching(-1, 8), 1),
    "ready before it began": (replace(READY, load_s=-1.0), 1),
    "fetched beyond counting": (replace(READY, fetched_bytes=2**63), 1),
    "another stage's fault": (Failed(0, 0, 1, "no", ""), 2),
    "another stage's numbers": (Broken(0, 0, 1, "0:2", []), 2),
    "a clock that stands at infinity": (Echo(0, math.inf), 1),
    "a stamp": (Stamped(0.0, 0.0, RESULT), 2),
    "features that nobody wants": (replace(RESULT, features=torch.zeros(2, 5)), 2),
}


@pytest.mark.parametrize(("message", "stage"), BAD.values(), ids=list(BAD))
def test_what_no_worker_says_is_refused(message: ToDriver, stage: int) -> None:
    with pytest.raises(ProtocolError):
        REPLIES.check(message, stage)


def test_what_workers_say_is_taken() -> None:
    for message, stage in ((RESULT, 2), (HINT, 1), (READY, 1), (Loading(0.5), 1), (Failed(0, 0, 2, "no", ""), 2)):
        REPLIES.check(message, stage)


def spoil(result: Result, kind: str) -> Result:
    match kind:
        case "an unsent row":
            return replace(result, node_ids=[node_id + 1 for node_id in result.node_ids])
        case _:
            return replace(result, num_prefix=result.num_prefix + 1)


@pytest.mark.parametrize("kind", ["an unsent row", "another prefix"])
def test_a_result_that_does_not_fit_what_was_sent_ends_its_request(
    checkpoint_dir: Callable[[str], Path], kind: str
) -> None:
    """Another row's hidden states were taken for those of the root, and the text was wrong."""
    pump = Pump(checkpoint_dir("llama"), 2, "ngram", keeps_caches=True)
    generation, take = pump.submit(prompt_of(12), SamplingParams(20)), pump.network.take

    def spoiled(link: Any) -> Any:
        message = take(link)
        is_late = link.target == DRIVER and len(generation.output_ids) > 3
        return spoil(message, kind) if is_late and isinstance(message, Result) else message

    pump.network.take = spoiled  # type: ignore[method-assign]
    with pytest.raises(ProtocolError, match="worker 2 breaks the protocol: a result has"):
        pump.run()


def test_features_have_the_width_and_dtype_of_the_sessions_draft() -> None:
    replies = Replies(2, 8, 96, torch.float32, taps_width=5)
    replies.check(replace(RESULT, features=torch.zeros(2, 5)), 2)
    replies.check(RESULT, 2)  # of a request without the draft
    for features in (torch.zeros(2, 4), torch.zeros(2, 5, dtype=torch.bfloat16)):
        with pytest.raises(ProtocolError, match="its features are"):
            replies.check(replace(RESULT, features=features), 2)


def test_a_draft_model_names_tokens_and_nothing_else() -> None:
    replies = Replies(1, 8, 96, torch.float32, num_best=2)
    replies.check(GUESSES, 1)
    replies.check(replace(GUESSES, node_ids=[], token_ids=GUESSES.token_ids[:0], logprobs=GUESSES.logprobs[:0]), 1)
    spoiled = (
        {"token_ids": GUESSES.token_ids + 1},
        {"token_ids": GUESSES.token_ids - 8},
        {"token_ids": GUESSES.token_ids.long()},
        {"logprobs": GUESSES.logprobs.bfloat16()},
        {"token_ids": GUESSES.token_ids.repeat(1, 2), "logprobs": GUESSES.logprobs.repeat(1, 2)},
        {"token_ids": GUESSES.token_ids[:, :0], "logprobs": GUESSES.logprobs[:, :0]},
        {"node_ids": [-1]},
    )
    for fields in spoiled:
        with pytest.raises(ProtocolError):
            replies.check(replace(GUESSES, **fields), 1)
    codec = Codec()
    header, tokens, logprobs = (bytearray(frame) for frame in codec.encode(GUESSES))
    assert codec.decode_to_driver([header, tokens, logprobs]).node_ids == [4]  # type: ignore[union-attr]
    two_nodes = codec.encode(Guesses(0, 0, [4], GUESSES.token_ids, GUESSES.logprobs))[0].replace(
        b"\x91\x04", b"\x92\x04\x06"
    )
    with pytest.raises(ProtocolError, match="differ in number"):
        codec.decode_to_driver([bytearray(two_nodes), tokens, logprobs])
