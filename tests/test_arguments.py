"""The Python interface as a reader of ``help`` meets it: real signatures, and wrong arguments in one line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowspec import LLM, SamplingParams
from flowspec.config import EngineConfig, LinkConfig, PipelineConfig, TreeConfig
from flowspec.engine.spec import EngineSpec
from flowspec.errors import UsageError
from server_process import add_chat_template

TALK = [{"role": "system", "content": "t7"}, {"role": "user", "content": "t3 t4"}]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    from tiny_models import make_checkpoint

    directory = add_chat_template(make_checkpoint(tmp_path_factory.mktemp("chat"), "llama"))
    with LLM(directory, stages=2, in_process=True, draft="ngram") as llm:
        yield llm


def test_help_shows_every_option_with_type_default_and_meaning() -> None:
    shown, spec = inspect.signature(LLM).parameters, inspect.signature(EngineSpec).parameters
    assert list(spec) == list(shown), "an engine has no setting that is not shown"
    assert [parameter.default for parameter in spec.values()] == [parameter.default for parameter in shown.values()]
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in shown.values())
    assert LLM.__doc__ is not None and SamplingParams.__doc__ is not None
    for cls in (LLM, SamplingParams):
        for name in inspect.signature(cls).parameters:
            assert f"\n        {name}: " in (cls.__doc__ or ""), f"{cls.__name__} does not document {name}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LLM(stagse=2), r"^LLM has no stagse; did you mean stages\?$"),  # type: ignore[call-arg]
        (lambda: LLM("demo", 2), "^LLM: too many positional arguments"),  # type: ignore[misc]
        (lambda: LLM(stages="two"), "^stages is 'two'; it must be a whole number or None$"),  # type: ignore[arg-type]
        (lambda: LLM(dtype="fp32"), "^dtype is 'fp32'; it must be 'float32' or 'bfloat16'"),  # type: ignore[arg-type]
        (lambda: LLM(workers="a:1"), "^workers is 'a:1'; it must be a list"),
        (lambda: LLM(draft=3), "^draft is 3; it must be a text or a Path or a DraftSource$"),  # type: ignore[arg-type]
        (lambda: LLM(progress="bar"), "^progress is 'bar'; it must be a function"),  # type: ignore[arg-type]
        (lambda: LLM(in_process=1), "^in_process is 1; it must be True or False"),  # type: ignore[arg-type]
        (lambda: LLM(schedule_config=PipelineConfig()), "it must be a ScheduleConfig$"),  # type: ignore[arg-type]
        (lambda: SamplingParams("5"), "^max_tokens is '5'; it must be a whole number$"),  # type: ignore[arg-type]
        (lambda: SamplingParams(5.5), "^max_tokens is 5.5; it must be a whole number$"),  # type: ignore[arg-type]
        (lambda: SamplingParams(True), "^max_tokens is True"),
        (lambda: SamplingParams(float("inf")), "^max_tokens is inf"),  # type: ignore[arg-type]
        (lambda: SamplingParams(temperature=None), "^temperature is None; it must be a"),  # type: ignore[arg-type]
        (lambda: SamplingParams(temperature="hot"), "^temperature is 'hot'"),  # type: ignore[arg-type]
        (lambda: SamplingParams(stop="END"), "^stop is 'END'; it must be a list, of which each is a text$"),  # type: ignore[arg-type]
        (lambda: SamplingParams(stop_token_ids=[1, "x"]), "^stop_token_ids is"),  # type: ignore[arg-type]
        (lambda: SamplingParams(logit_bias=((1, 2, 3),)), "^logit_bias is"),  # type: ignore[arg-type]
        (lambda: SamplingParams(max_new_tokens=5), r"did you mean max_tokens\?"),  # type: ignore[call-arg]
        (lambda: TreeConfig(depth="6"), "^depth is '6'"),  # type: ignore[arg-type]
        (lambda: EngineConfig(max_runing=3), r"did you mean max_running\?"),  # type: ignore[call-arg]
        (lambda: LinkConfig(start_timeout_s="1 min"), "^start_timeout_s is '1 min'; it must be a number$"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_name_or_type_is_an_error_that_names_it(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_numbers_come_as_json_numpy_and_people_write_them() -> None:
    values: dict[str, Any] = {"max_tokens": 50.0, "top_k": np.int64(5), "temperature": 1, "top_p": np.float32(0.5)}
    values |= {"stop": ["a"], "stop_token_ids": [2, 3], "logit_bias": [[1, -2]]}
    params = SamplingParams(**values)
    assert (params.max_tokens, type(params.max_tokens), type(params.top_k)) == (50, int, int)
    assert type(params.top_p) is float and params.temperature == 1
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a",), frozenset({2, 3}), ((1, -2),))
    assert hash(params) == hash(SamplingParams(**values))


def test_wrong_arguments_of_a_call_are_errors_too(llm: LLM) -> None:
    generate: Any = llm.generate
    for call, message in {
        lambda: generate("t1", {"max_tokens": 3}): "^params is",
        lambda: generate(5): "^prompt is 5",
        lambda: generate("t1", temperature=1): "^generate has no temperature",
        lambda: llm.generate_many("t1"): "^prompts is 't1'; it must be a list",
    }.items():
        with pytest.raises(UsageError, match=message):
            call()


def test_a_chat_is_its_template_and_streams(llm: LLM) -> None:
    params = SamplingParams(9)
    plain = llm.generate("t1 t7 t1 t3 t4 t2", params)
    answer = llm.chat(TALK, params)
    # An answer is a text of its own, and begins without the space of a continuation.
    assert (f" {answer.text}", answer.token_ids, answer.prompt_tokens) == (plain.text, plain.token_ids, 6)
    *_, last = chunks = list(llm.stream_chat(TALK, params))
    assert "".join(chunk.text for chunk in chunks) == answer.text
    assert last.completion is not None and last.completion.token_ids == answer.token_ids


def test_messages_that_are_none_are_errors(llm: LLM, checkpoint_dir: Callable[[str], Path]) -> None:
    chat: Any = llm.chat
    for messages, message in [
        ("Hi", "^messages is 'Hi'; it must be a list"),
        ([], "give at least one"),
        (["Hi"], "^messages is"),
        ([{"content": "Hi"}], '"role": "user"'),
        ([{"role": "pirate", "content": "Hi"}], "unknown role pirate"),
    ]:
        with pytest.raises(UsageError, match=message):
            chat(messages)
    with (
        LLM(checkpoint_dir("llama"), stages=1, in_process=True) as plain,
        pytest.raises(UsageError, match="no chat template, so it cannot chat"),
    ):
        plain.chat(TALK)
