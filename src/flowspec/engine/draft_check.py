"""Whether an engine's draft, a head or a model, is of use: tried before the first request, and switched off if not.

The target writes a short text, which is an ordinary request; then the draft guesses along it (``draft.acceptance``).
What was found is kept in the user's cache, by a digest of model, draft and settings.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

from flowspec.core import LayerRange, SamplingParams
from flowspec.draft.acceptance import DEPTH, FEWEST, Acceptance, ReadText, Recorder, measure
from flowspec.draft.base import DraftSource
from flowspec.draft.ngram import NgramSource
from flowspec.draft.remote_passes import RemoteModelSource
from flowspec.draft.repairs import find_repair
from flowspec.engine.engine import Engine
from flowspec.errors import FlowspecError
from flowspec.model.fingerprint import files_fingerprint, fingerprint
from flowspec.model.loader import Checkpoint
from flowspec.model.mtp_head import MtpLayers
from flowspec.model.user_cache import cache_directory, keep

logger = logging.getLogger("flowspec.draft")

CheckedDraft: TypeAlias = Path | MtpLayers | Checkpoint
Progress = Callable[[str, float], None]

QUESTION = "Tell me a long story about a farmer and his three sons."  # what a chat model is asked
BEGINNING = "class Queue:\n    def __init__(self, maxsize=0):\n"  # what any other one continues
NUM_TOKENS = 48
TEXT_S, GUESSES_S = 8.0, 1.0  # what may take so long at most; on one machine a text takes less than a second
_VERSION = 1  # of what is measured


@dataclass(frozen=True)
class _Found:
    acceptance: Acceptance
    repair: str  # what would mend a broken head, if that is known


def check_draft(
    engine: Engine, draft: CheckedDraft, draft_layers: Sequence[int] | None, draft_dtype: str, progress: Progress
) -> None:
    """Measure the draft of the engine, or look up what it was; one that is broken is switched off.

    ``draft``: the directory of a head, MTP layers, or a language model.

    Raises ``WorkerError`` when a worker fails meanwhile.
    """
    source, spec = engine.model.source, engine.pipeline.spec
    assert source is not None, "something is to be checked"
    settings = _VERSION, draft_layers, draft_dtype, spec.weights, spec.dtype
    path = cache_directory("draft-checks") / f"{_digest(engine, draft, settings)}.json"
    found = _load(path)
    if found is None:
        progress("checking the draft", 0.0)
        start_s = time.perf_counter()
        found = _measure(engine, source)
        logger.debug("checking the draft took %.2f s", time.perf_counter() - start_s)
        if found is None or not _is_telling(source, found.acceptance):
            logger.debug("the draft could not be checked; it is used as it is")
            return
        _store(path, found)
    acceptance = found.acceptance
    logger.debug("the draft is right in %s of %s guesses", acceptance.num_right, acceptance.num_made)
    step = _wrong_step(source, acceptance)
    if step is not None:
        logger.warning(
            "the draft %s is switched off, and n-grams draft instead: along a text of the model %s. %s; use it "
            "all the same with --draft-check off",
            _title(draft),
            acceptance.told(step),
            found.repair or _cause(source.name, step),
        )
        engine.use_source(NgramSource(memory=engine.model.memory))


def _is_telling(source: DraftSource, acceptance: Acceptance) -> bool:
    """A worker that is lost, slow for once, or without memory for a request says nothing of the draft that it runs."""
    if not isinstance(source, RemoteModelSource):
        return True
    return not source.is_lost and not source.has_failed and acceptance.num_made[0] >= FEWEST


def _wrong_step(source: DraftSource, acceptance: Acceptance) -> int | None:
    return acceptance.wrong_step(source.name, getattr(source, "hit_rates", ()))


def _cause(kind: str, step: int) -> str:
    """What most probably is wrong, as far as such figures tell it."""
    if kind == "model":
        return (
            "Its weights are damaged, its tokens stand for other text than the model's, or it was trained on text of "
            "quite another kind"
        )
    if step and kind not in ("eagle", "eagle3"):
        return "Its rows below the first are not what it was trained with: look at mask_token_id in its config"
    if step:
        return "What it feeds back to itself is not what it was trained with: look at norm_output in its config"
    if kind not in ("eagle", "mtp"):
        return (
            "It reads other layers than it was trained with (--draft-layers says which), or its lm_head, its "
            "embedding, a norm or another part of it is missing or another model's"
        )
    return "It was trained for another model, or its weights are damaged: fetch or train it again"


def _title(draft: CheckedDraft) -> str:
    match draft:
        case Path():
            return f"head in {draft}"
        case MtpLayers():
            return f"by the MTP layer of {draft.source.title}"
        case _:
            return f"model {draft.title}"


def _digest(engine: Engine, draft: CheckedDraft, settings: tuple[object, ...]) -> str:
    """Of all that the guesses hang on."""
    checkpoint = engine.model.checkpoint
    model = fingerprint(checkpoint, LayerRange(0, checkpoint.num_layers)) or checkpoint.full_name
    own = files_fingerprint(draft.iterdir() if isinstance(draft, Path) else draft.files())
    told = [model, own, *map(str, settings)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:32]


def _measure(engine: Engine, source: DraftSource) -> _Found | None:
    """``None`` where the target could write no text; where it was too slow, there are too few guesses to judge by."""
    try:
        text = _write(engine, source)
    except FlowspecError as error:
        if engine.is_closed:
            raise
        logger.debug("%s", error)
        return None
    acceptance, repair = measure(source, text, _deadline()), ""
    if _wrong_step(source, acceptance) is not None:
        repair = find_repair(source, text, lambda mended: _is_mended(source, acceptance, mended), _deadline())
    return _Found(acceptance, repair)


def _is_mended(source: DraftSource, before: Acceptance, after: Acceptance) -> bool:
    return _wrong_step(source, after) is None and sum(after.num_right) > 2 * sum(before.num_right)


def _deadline() -> Callable[[], bool]:
    """Whether the time for guesses is over that begins now."""
    end_s = time.perf_counter() + GUESSES_S
    return lambda: time.perf_counter() > end_s


def _write(engine: Engine, source: DraftSource) -> ReadText:
    """The target's text. Raises ``UsageError`` where there is no room for it, and what ended the request."""
    template, is_chat = engine.model.chat_template, False
    prompt_ids = tuple(engine.model.tokenizer(BEGINNING, verbose=False).input_ids)
    if template.is_there and template.problem is None:
        prompt_ids, is_chat = tuple(template.encode([{"role": "user", "content": QUESTION}])), True
    params = SamplingParams(max_tokens=min(NUM_TOKENS, max(1, engine.room(len(prompt_ids)))), temperature=0.0)
    recorder = Recorder(source)
    engine.use_source(recorder)
    try:
        job = engine.submit(prompt_ids, params, "flow", is_chat)
        deadline = time.perf_counter() + TEXT_S
        while not job.is_finished and time.perf_counter() < deadline:
            engine.step()
        engine.cancel(job)
    finally:
        engine.use_source(source)
        recorder.close()
    if job.error is not None:
        raise job.error
    return recorder.text(prompt_ids, job.output_ids)


def _load(path: Path) -> _Found | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = _Found(Acceptance(values["num_made"], values["num_right"]), str(values["repair"]))
        counts = [*found.acceptance.num_made, *found.acceptance.num_right]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if len(counts) == 2 * DEPTH and all(isinstance(count, int) for count in counts) else None


def _store(path: Path, found: _Found) -> None:
    """Where it cannot be kept, the next start measures again."""
    try:
        keep(path, json.dumps({**asdict(found.acceptance), "repair": found.repair}).encode())
    except OSError as error:
        logger.debug("what was found of the draft cannot be kept: %s", error)
