"""What a model's files say of conversations: templates of all kinds, and what ends a turn."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowspec import LLM, SamplingParams, chat_template
from flowspec.chat_template import ChatTemplate
from flowspec.errors import ModelError, UsageError
from flowspec.model.loader import Checkpoint
from tiny_models import make_text_checkpoint, make_text_tokenizer

PLAIN = "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
HELLO = [{"role": "user", "content": "hello"}]


def template_of(text: Any) -> ChatTemplate:
    tokenizer = make_text_tokenizer("byte-fallback")
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer, "tiny")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "no element 7|undefined"),
        ("{{ messages | sum }}", "unsupported operand"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'a'.encode('utf-8').decode('ascii').index('b') }}", "substring not found"),
        ("{% if %}", "Expected an expression"),
        ({"rag": PLAIN}, "default"),
    ],
)
def test_any_failure_in_a_template_is_the_caller_s_error_and_known_at_the_start(text: Any, told: str) -> None:
    template = template_of(text)
    with pytest.raises(UsageError, match=f"messages: the model's chat template refuses them: .*({told})"):
        template.encode(HELLO)
    assert template.problem is not None and "refuses them" in template.problem


def test_a_template_that_loops_for_ever_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "TIMEOUT_S", 0.3)
    nested = "{% for a in range(9999) %}" * 4 + "x" + "{% endfor %}" * 4
    with pytest.raises(UsageError, match="it ran for more than"):
        template_of(nested).encode(HELLO)


def test_named_templates_are_read_and_the_default_one_is_taken() -> None:
    template = template_of({"rag": "no", "default": PLAIN, "tool_use": "no"})
    assert template.problem is None
    assert template.encode(HELLO) == template_of(PLAIN).encode(HELLO)


def test_a_list_of_named_templates_in_a_checkpoint_is_read(tmp_path: Path) -> None:
    directory = make_text_checkpoint(tmp_path / "named", chat_template=PLAIN)
    for path in directory.glob("chat_template*"):
        path.unlink()
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": PLAIN}]
    edit_json(directory / "tokenizer_config.json", chat_template=named)
    with LLM(directory, stages=1, in_process=True) as llm:
        assert llm.encode_chat(HELLO) == tuple(template_of(PLAIN).encode(HELLO))


def test_a_role_that_a_template_passes_by_is_an_error() -> None:
    text = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(UsageError, match="knows no role 'wizard'"):
        template_of(text).encode([*HELLO, {"role": "wizard", "content": "abra"}])
    assert template_of(PLAIN).encode([*HELLO, {"role": "wizard", "content": "abra"}])


def test_arguments_of_tool_calls_reach_the_template_as_objects() -> None:
    text = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments.x }}{% endfor %}{% endfor %}"
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": "hello"}'}}
    messages = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [call]}]
    template = template_of(text)
    assert template.encode(messages) == template._tokenizer("hello", add_special_tokens=False).input_ids
    assert call["function"] == {"name": "f", "arguments": '{"x": "hello"}'}, "the caller's message was changed"


@pytest.mark.parametrize(
    "calls", [5, "f", {"function": 1}, [5], [{"function": None}], [{"function": {"arguments": 1}}]]
)
def test_calls_that_are_none_are_the_template_s_to_judge(calls: Any) -> None:
    assert template_of(PLAIN).encode([*HELLO, {"role": "assistant", "content": "x", "tool_calls": calls}])


def test_options_reach_the_template_and_nothing_else() -> None:
    template = template_of("{{ 'hello' if enable_thinking else 'world' }}")
    world = template.encode(HELLO)
    assert template.encode(HELLO, {"enable_thinking": True}) != world
    with pytest.raises(UsageError, match="chat_template_kwargs: tokenize is not the template's"):
        template.encode(HELLO, {"tokenize": True})


# --- the end of a turn ---


@pytest.mark.parametrize(
    ("tail", "ends"), [("</s>\n", {"</s>"}), (" </s>", {"</s>"}), ("\nhello", set()), ("", set()), ("<tool>", set())]
)
def test_the_special_token_behind_an_answer_ends_it(tail: str, ends: set[str]) -> None:
    template = template_of("{% for m in messages %}{{ m.content }}" + tail + "{% endfor %}")
    assert {template._tokenizer.backend_tokenizer.id_to_token(token_id) for token_id in template.end_ids} == ends


def test_a_chat_ends_where_any_of_the_files_says_so_and_a_text_where_it_did(tmp_path: Path) -> None:
    """Configs, tokenizer and template each name another token, as in many fine-tunes."""
    directory = make_text_checkpoint(tmp_path / "tiny", chat_template=PLAIN.replace("</s>", "<pad>"))
    edit_json(directory / "generation_config.json", eos_token_id=[7, 8.0])
    edit_json(directory / "config.json", eos_token_id=9)
    with LLM(directory, stages=1, in_process=True, draft="none", schedule="ar") as llm:
        backend: Any = llm.tokenizer.backend_tokenizer
        named = {backend.token_to_id("</s>"), backend.token_to_id("<pad>")}
        assert llm.engine.model.turn_end_ids == {7, 8, 9} | named
        assert llm.checkpoint.eos_token_ids == {7, 8}
        for end in (9, *named):  # let each of them be the first to come
            bias = ((end, 100.0),)
            chat = llm.chat(HELLO, SamplingParams(20, logit_bias=bias))
            assert chat.finish_reason == "stop" and chat.token_ids == [end]
            text = llm.generate(llm.encode_chat(HELLO), SamplingParams(20, logit_bias=bias))
            assert text.finish_reason == "length"


def test_a_token_id_that_is_none_is_said_at_the_start(tmp_path: Path) -> None:
    directory = make_text_checkpoint(tmp_path / "tiny")
    edit_json(directory / "generation_config.json", eos_token_id="</s>")
    with pytest.raises(ModelError, match=r"generation_config.json: eos_token_id is '</s>'"):
        LLM(directory, stages=1, in_process=True)


# --- generation_config.json ---


def test_what_the_model_says_of_sampling_is_the_default(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoint_dir("llama"), tmp_path / "tiny")
    edit_json(directory / "generation_config.json", temperature=0.7, top_k=50.0, top_p=1, do_sample=True)
    with LLM(directory, stages=1, in_process=True) as llm:
        assert llm.default_params == SamplingParams(temperature=0.7, top_k=50, top_p=1.0)
        assert type(llm.default_params.top_k) is int
        assert llm.generate([1, 2, 3]).num_tokens == 64, "a top_k of 50.0 is a number of tokens"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.5}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"top_k": -1, "temperature": None}, {"top_k": 0}),
    ],
)
def test_sampling_defaults(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    directory = shutil.copytree(checkpoint_dir("llama"), tmp_path / "tiny")
    edit_json(directory / "generation_config.json", **given)
    assert Checkpoint.open(directory).sampling_defaults == expected


@pytest.mark.parametrize("bad", [{"top_k": 50.5}, {"temperature": "hot"}, {"top_p": 1.5}, {"min_p": [1]}])
def test_bad_sampling_defaults_are_said_at_the_start(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path, bad: dict[str, Any]
) -> None:
    directory = shutil.copytree(checkpoint_dir("llama"), tmp_path / "tiny")
    edit_json(directory / "generation_config.json", **bad)
    with pytest.raises(ModelError, match=f"generation_config.json: {next(iter(bad))} is"):
        LLM(directory, stages=1, in_process=True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{{ 'x' * 10000000000 }}", "MemoryError"),
        ("{{ '%20000000000d' % 5 }}", "MemoryError|too big"),
        ("{{ 'x' * 20000000 }}", "a text of 20000000 characters; the most is 8388608"),
    ],
)
def test_what_a_template_makes_is_bounded(text: str, told: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UsageError, match=f"messages: the model's chat template refuses them: .*({told})"):
        template_of(text).encode(HELLO)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
