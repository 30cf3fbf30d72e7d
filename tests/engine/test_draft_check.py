"""Drafts are tried before the first request: good ones pass, broken ones are found, and no text changes."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import clockwork_mtp
import echo
from clockwork import COLUMN, TAPPED, TURN, VOCAB, codes, head_weights, turn, write_head, write_target
from engines import engine_of, run
from flowspec.core import SamplingParams
from flowspec.draft.acceptance import DEPTH, Acceptance, ReadText, measure
from flowspec.draft.eagle import EagleSource
from flowspec.engine import draft_check
from flowspec.engine.draft_check import check_draft
from flowspec.engine.engine import Engine
from flowspec.model.demo_pair import DEMO, demo_directory, demo_draft_directory
from flowspec.model.draft_head import DraftHead
from flowspec.model.target_head import TargetHead
from tiny_dflash import DFlashForm, write_dflash

Plant = Callable[[dict[str, Tensor]], Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """And all the time in the world: a busy machine must not leave a head unjudged."""
    monkeypatch.setattr(draft_check, "TEXT_S", 100.0)
    monkeypatch.setattr(draft_check, "GUESSES_S", 100.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flowspec" / "draft-checks"


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, "flowspec.draft")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "flowspec.draft"]


@pytest.fixture(scope="module")
def clockwork(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("clockwork") / "target")


def text_of(engine: Engine) -> list[int]:
    job = engine.submit([5, 7, 11], SamplingParams(max_tokens=12))
    run(engine, [job])
    assert job.generation is not None
    return job.output_ids


# --- EAGLE-3 ---


def test_a_good_eagle3_head_passes(clockwork: Path, tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    head = write_head(tmp_path / "head", head_weights())
    with engine_of(clockwork, stages=3, in_process=True, draft=head, draft_check="on") as engine:
        assert engine.model.source is not None and engine.model.source.name == "eagle3"
        assert not warnings()
        (found,) = (tmp_path / "cache" / "flowspec" / "draft-checks").iterdir()
        kept = draft_check._load(found)
        assert kept is not None and not kept.repair
        acceptance = kept.acceptance
        assert acceptance.num_made[0] > 40
        # It is built to be always right, where a token is the successor of the one before it.
        assert acceptance.num_right == [acceptance.num_made[0] - 1, *acceptance.num_made[1:]]


def without_head(weights: dict[str, Tensor]) -> None:
    del weights["lm_head.weight"]  # the target's serves


def random_embedding(weights: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    weights["embed_tokens.weight"] = torch.randn(VOCAB, 32, generator=generator)


def older_features(weights: dict[str, Tensor]) -> None:
    """As if it had been trained with the feature of the token before."""
    blocks = [(turn(2 - TURN * layer) + COLUMN) * 3 for layer in TAPPED]
    weights["fc.weight"] = torch.cat(blocks, dim=1)


def nothing(weights: dict[str, Tensor]) -> None: ...


@pytest.mark.parametrize(
    ("plant", "changes", "layers", "cause"),
    [
        (without_head, {}, None, "or its lm_head, its embedding"),
        (random_embedding, {}, None, "or its lm_head, its embedding"),
        (nothing, {"norm_before_residual": False}, None, "With norm_before_residual true it guesses well"),
        (older_features, {}, None, "It guesses well with the features of the token before in each one's place"),
        (nothing, {}, [layer - 1 for layer in TAPPED], "--draft-layers"),
        (nothing, {}, [layer + 1 for layer in TAPPED], "--draft-layers"),
    ],
    ids=["lm_head", "embedding", "a norm ignored", "features one late", "layers one too low", "layers one too high"],
)
def test_a_broken_eagle3_head_is_switched_off(
    clockwork: Path,
    tmp_path: Path,
    warnings: Callable[[], list[str]],
    plant: Plant,
    changes: dict[str, Any],
    layers: list[int] | None,
    cause: str,
) -> None:
    weights = head_weights()
    plant(weights)
    head = write_head(tmp_path / "head", weights, **changes)
    with engine_of(clockwork, stages=2, in_process=True, draft="none") as engine:
        expected = text_of(engine)
    with engine_of(clockwork, stages=2, in_process=True, draft=head, draft_check="on", draft_layers=layers) as engine:
        (told,) = warnings()
        assert f"the draft head in {head} is switched off, and n-grams draft instead" in told
        assert "first guesses are right" in told and "--draft-check off" in told and cause in told
        assert engine.model.source is not None and engine.model.source.name == "ngram"
        assert text_of(engine) == expected
    settings: dict[str, Any] = {"draft": head, "draft_layers": layers, "draft_check": "off"}
    with engine_of(clockwork, stages=2, in_process=True, **settings) as engine:
        assert engine.model.source is not None and engine.model.source.name == "eagle3"
        assert text_of(engine) == expected
    assert len(warnings()) == 1


# --- heads that guess blocks ---

BLOCK_HEADS = {"peagle": echo.peagle_weights, "dspark": echo.dspark_weights}


@pytest.fixture(scope="module")
def echoing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return echo.write_target(tmp_path_factory.mktemp("echo") / "target")


@pytest.mark.parametrize("kind", BLOCK_HEADS)
def test_a_good_head_of_blocks_passes(
    echoing: Path, tmp_path: Path, own_cache: Path, warnings: Callable[[], list[str]], kind: str
) -> None:
    head = echo.write_head(tmp_path / "head", kind, BLOCK_HEADS[kind]())
    with engine_of(echoing, stages=3, in_process=True, draft=head, draft_check="on") as engine:
        assert engine.model.source is not None and engine.model.source.name == kind and not warnings()
    (kept,) = own_cache.iterdir()
    found = draft_check._load(kept)
    assert found is not None and found.acceptance.num_made[0] > 30
    assert found.acceptance.num_right == found.acceptance.num_made, "it is built to be always right"


def other_tokens(weights: dict[str, Tensor]) -> None:
    weights["markov_head.markov_w1.weight"] = weights["markov_head.markov_w1.weight"].roll(5, dims=0)


def untrained_markov_head(weights: dict[str, Tensor]) -> None:
    shape = weights["markov_head.markov_w2.weight"].shape
    weights["markov_head.markov_w2.weight"] = torch.randn(shape, generator=torch.Generator().manual_seed(0))


def only_later_rows(weights: dict[str, Tensor]) -> None:
    """The first row of a block guesses another column than the token's."""
    mask = weights["embed_tokens.weight"][echo.MASK]
    weights["embed_tokens.weight"] = 9 * codes().roll(5, dims=0) @ COLUMN
    weights["embed_tokens.weight"][echo.MASK] = mask


@pytest.mark.parametrize(
    ("kind", "plant", "changes", "layers", "cause"),
    [
        ("peagle", nothing, {"mask_token_id": 3}, None, "Its rows below the first are not what it was trained with"),
        ("peagle", random_embedding, {}, None, "or its lm_head, its embedding"),
        ("peagle", nothing, {}, [layer + 1 for layer in TAPPED], "--draft-layers"),
        ("dspark", other_tokens, {}, None, "--draft-layers"),
        ("dspark", untrained_markov_head, {}, None, "--draft-layers"),
        ("dspark", nothing, {}, [layer - 1 for layer in TAPPED], "--draft-layers"),
        ("dspark", only_later_rows, {}, None, "With sample_from_anchor false it guesses well: say so in its config"),
    ],
    ids=[
        "mask",
        "embedding",
        "layers",
        "Markov head of other tokens",
        "Markov head untrained",
        "layers of DSpark",
        "first row",
    ],
)
def test_a_broken_head_of_blocks_is_switched_off(
    echoing: Path,
    tmp_path: Path,
    warnings: Callable[[], list[str]],
    kind: str,
    plant: Plant,
    changes: dict[str, Any],
    layers: list[int] | None,
    cause: str,
) -> None:
    weights = BLOCK_HEADS[kind]()
    plant(weights)
    head = echo.write_head(tmp_path / "head", kind, weights, **changes)
    with engine_of(echoing, stages=2, in_process=True, draft=head, draft_check="on", draft_layers=layers) as engine:
        (told,) = warnings()
        assert f"the draft head in {head} is switched off" in told and cause in told
        assert engine.model.source is not None and engine.model.source.name == "ngram"


# --- MTP layers ---


@pytest.fixture
def with_layer(tmp_path: Path) -> Path:
    return clockwork_mtp.write_target(tmp_path / "target")


def test_a_good_mtp_layer_passes(with_layer: Path, own_cache: Path, warnings: Callable[[], list[str]]) -> None:
    with engine_of(with_layer, stages=3, in_process=True, draft_check="on") as engine:
        assert engine.model.source is not None and engine.model.source.name == "mtp" and not warnings()
    (kept,) = own_cache.iterdir()
    found = draft_check._load(kept)
    assert found is not None and found.acceptance.num_made[0] > 20
    # It is built to be always right, where a token is the successor of the one before it.
    num_made = found.acceptance.num_made
    assert found.acceptance.num_right == [num_made[0] - 1, *num_made[1:]]


def swapped(weights: dict[str, Tensor]) -> None:
    weights["input_proj.weight"] = clockwork_mtp.first_matrix(COLUMN, turn(1))


def older_states(weights: dict[str, Tensor]) -> None:
    """As if it had been trained with the hidden state of the token before."""
    weights["input_proj.weight"] = clockwork_mtp.first_matrix(turn(2), COLUMN)


def hidden_norm_ignored(weights: dict[str, Tensor]) -> None:
    weights["hidden_layernorm.weight"] = torch.ones_like(weights["hidden_layernorm.weight"])


def token_norm_ignored(weights: dict[str, Tensor]) -> None:
    weights["token_layernorm.weight"] = torch.ones_like(weights["token_layernorm.weight"])


@pytest.mark.parametrize(
    ("plant", "cause"),
    [
        (swapped, "It was trained for another model, or its weights are damaged"),
        (older_states, "It guesses well with the features of the token before in each one's place"),
        (hidden_norm_ignored, "its weights are damaged"),
        (token_norm_ignored, "its weights are damaged"),
    ],
)
def test_a_broken_mtp_layer_is_switched_off(
    with_layer: Path, warnings: Callable[[], list[str]], plant: Plant, cause: str
) -> None:
    weights = clockwork_mtp.mtp_weights()
    plant(weights)
    clockwork_mtp.write_layer(with_layer, weights)
    with engine_of(with_layer, stages=2, in_process=True, draft="none") as engine:
        expected = text_of(engine)
    with engine_of(with_layer, stages=2, in_process=True, draft_check="on") as engine:
        (told,) = warnings()
        assert "the draft by the MTP layer of target is switched off, and n-grams draft instead" in told
        assert "first guesses are right" in told and "--draft-check off" in told and cause in told
        assert engine.model.source is not None and engine.model.source.name == "ngram"
        assert text_of(engine) == expected


# --- EAGLE-1 ---


@pytest.fixture(scope="module")
def demo_text() -> tuple[EagleSource, ReadText]:
    with engine_of(DEMO, stages=2, in_process=True, draft_check="off") as engine:
        source = engine.model.source
        assert isinstance(source, EagleSource)
        return source, draft_check._write(engine, source)


def test_the_demo_pair_passes(demo_text: tuple[EagleSource, ReadText]) -> None:
    source, text = demo_text
    acceptance = measure(source, text)
    for hit_rates in (source.hit_rates, ()):
        assert acceptance.wrong_step(source.name, hit_rates) is None
    assert acceptance.num_made[0] > 40


def other_embedding(source: EagleSource, text: ReadText) -> tuple[DraftHead, Any, ReadText]:
    head = _copy(source.head)
    head.embedding = torch.randn(head.embedding.shape, generator=torch.Generator().manual_seed(0)) * 0.02
    return head, source.lm_head, text


def other_lm_head(source: EagleSource, text: ReadText) -> tuple[DraftHead, Any, ReadText]:
    weight = torch.randn(source.head.embedding.shape, generator=torch.Generator().manual_seed(0)) * 0.02
    return source.head, TargetHead(weight), text


def features_of_the_token_before(source: EagleSource, text: ReadText) -> tuple[DraftHead, Any, ReadText]:
    assert text.features is not None
    rolled = torch.roll(text.features, 1, dims=0)
    return source.head, source.lm_head, ReadText(text.token_ids, text.prompt_len, rolled)


def no_first_matrix(source: EagleSource, text: ReadText) -> tuple[DraftHead, Any, ReadText]:
    head: Any = _copy(source.head)
    head.fc.weight.data = torch.randn(head.fc.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.02
    return head, source.lm_head, text


def _copy(head: DraftHead) -> DraftHead:
    return copy.deepcopy(head)


@pytest.mark.parametrize("plant", [other_embedding, other_lm_head, features_of_the_token_before, no_first_matrix])
def test_a_broken_eagle1_head_is_found(demo_text: tuple[EagleSource, ReadText], plant: Callable[..., Any]) -> None:
    source, text = demo_text
    head, lm_head, text = plant(source, text)
    assert measure(EagleSource(head, lm_head), text).wrong_step(source.name, source.hit_rates) == 0


def test_what_was_found_is_kept_and_a_changed_head_is_tried_anew(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    head = tmp_path / "head"
    shutil.copytree(demo_draft_directory(), head)
    tried: list[EagleSource] = []
    real = draft_check._measure
    monkeypatch.setattr(draft_check, "_measure", lambda engine, source: (tried.append(source), real(engine, source))[1])
    for _ in range(2):
        with engine_of(DEMO, stages=1, in_process=True, draft=head, draft_check="on"):
            pass
    assert len(tried) == 1 and not warnings()
    weights = load_file(head / "model.safetensors")
    name = next(name for name in weights if name.endswith("fc.weight"))
    weights[name] = torch.zeros_like(weights[name])
    save_file(weights, head / "model.safetensors")
    for _ in range(2):
        with engine_of(DEMO, stages=1, in_process=True, draft=head, draft_check="on") as engine:
            assert engine.model.source is not None and engine.model.source.name == "ngram"
    assert len(tried) == 2 and len(warnings()) == 2, "the second start says it again"
    for kept in own_cache.iterdir():
        kept.write_text("{]")
    with engine_of(DEMO, stages=1, in_process=True, draft=head, draft_check="on"):
        assert len(tried) == 3


# --- language models ---


def damage(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of the demo model, whose weights are changed."""
    shutil.copytree(demo_directory(), directory)
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def mix_tokens_up(weights: dict[str, Tensor]) -> None:
    """As of a model that was trained with another tokenizer."""
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    weights[name] = weights[name][torch.randperm(len(weights[name]), generator=torch.Generator().manual_seed(0))]


def lose_a_norm(weights: dict[str, Tensor]) -> None:
    weights["model.norm.weight"] = torch.randn_like(weights["model.norm.weight"])


@pytest.mark.parametrize("plant", [mix_tokens_up, lose_a_norm])
def test_a_broken_language_model_is_switched_off(
    tmp_path: Path, warnings: Callable[[], list[str]], plant: Plant
) -> None:
    draft = damage(tmp_path / "small", plant)
    for _ in range(2):  # the second time it is looked up
        with engine_of(DEMO, stages=2, in_process=True, draft=draft, draft_check="on") as engine:
            assert engine.model.source is not None and engine.model.source.name == "ngram"
    (told, again) = warnings()
    assert told == again and "the draft model small is switched off, and n-grams draft instead" in told
    assert "first guesses are right" in told and "Its weights are damaged" in told and "--draft-check off" in told


def test_a_good_language_model_stays(tmp_path: Path, own_cache: Path, warnings: Callable[[], list[str]]) -> None:
    """The model itself: every guess is right, and a prompt that it reads in several passes costs none of them."""
    draft = damage(tmp_path / "small", nothing)
    with engine_of(DEMO, stages=2, in_process=True, draft=draft, draft_check="on") as engine:
        assert engine.model.source is not None and engine.model.source.name == "model" and not warnings()
        (kept,) = own_cache.iterdir()
        found = draft_check._load(kept)
        assert found is not None and found.acceptance.num_made[0] > 40
        assert found.acceptance.num_right == found.acceptance.num_made
        prompt = [*range(20, 60)] * 3
        job = engine.submit(prompt, SamplingParams(max_tokens=24, temperature=0.0))
        run(engine, [job])
        long = measure(engine.model.source, ReadText([*prompt, *job.output_ids], len(prompt), None))
        assert long.num_made[0] > 20 and long.num_right == long.num_made


# --- the verdict ---


@pytest.mark.parametrize(
    ("num_right", "hit_rates", "wrong_step"),
    [
        ((47, 46, 45), (), None),
        ((24, 12, 5), (), None),
        ((15, 4, 1), (), None),
        ((2, 1, 0), (), 0),
        ((40, 0, 0), (), 1),
        ((40, 35, 0), (), 2),
        ((10, 5, 2), (0.7, 0.7, 0.7), 0),
        ((30, 6, 2), (0.7, 0.7, 0.7), 1),
        ((2, 1, 0), (0.05, 0.05, 0.05), None),
    ],
)
def test_only_what_is_far_below_its_kind_is_broken(
    num_right: tuple[int, ...], hit_rates: tuple[float, ...], wrong_step: int | None
) -> None:
    num_made = [47, *num_right[: DEPTH - 1]]
    assert Acceptance(num_made, list(num_right)).wrong_step("eagle3", hit_rates) == wrong_step


def test_a_head_whose_blocks_are_short_can_be_tried(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    write_dflash(tmp_path / "head", DFlashForm(block_size=3))
    with engine_of(checkpoint_dir("qwen3"), stages=1, in_process=True, draft=tmp_path / "head", draft_check="on"):
        (told,) = warnings()
        assert "first guesses are right" in told


def test_too_few_guesses_say_nothing() -> None:
    assert Acceptance([8, 0, 0], [0, 0, 0]).wrong_step("eagle") is None


def test_a_check_that_has_no_room_leaves_the_head_as_it_is(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    with engine_of(DEMO, stages=1, in_process=True, draft_check="off") as engine:
        engine._driver.budget.num_slots = 1
        check_draft(engine, demo_draft_directory(), None, "auto", lambda what, share: None)
        assert engine.model.source is not None and engine.model.source.name == "eagle" and not warnings()
