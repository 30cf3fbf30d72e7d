"""What is compiled for ARM's processors, which no test here runs on: LLVM writes their code on any machine."""

from __future__ import annotations

import platform
import re
from types import SimpleNamespace
from typing import Any

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from flowspec.model import arm_features, vector_code
from flowspec.model.float_tile_code import ROWS, FloatTileCode
from flowspec.model.packed import EIGHT_BITS, FLOAT_KINDS, NUM_KINDS
from flowspec.model.tile_code import _TileCode

TRIPLE = "aarch64-unknown-linux-gnu"
PLAIN, WITH_DOTS = ["+neon"], ["+neon", "+dotprod"]
PROCESSORS = [  # of a Jetson Nano, a Raspberry Pi 4, a Raspberry Pi 5, an Orin, and of boards that LLVM does not know
    ("cortex-a57", PLAIN),
    ("cortex-a72", PLAIN),
    ("cortex-a76", WITH_DOTS),
    ("cortex-a78ae", WITH_DOTS),
    ("generic", PLAIN),
    ("generic", WITH_DOTS),
]
DATA, PLACE = ir.IntType(8).as_pointer(), ir.IntType(64)


def builder_of(*kinds: Any) -> tuple[Any, Any]:
    """Of a function of these arguments, and the function."""
    module = ir.Module("kernel")
    module.triple = TRIPLE
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), "kernel")
    return ir.IRBuilder(function.append_basic_block()), function


def assembly(code: Any, name: str, features: list[str]) -> str:
    """Of what ``code`` has written, after LLVM's passes."""
    code.ret_void()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple(TRIPLE)
    except RuntimeError as error:
        pytest.skip(f"this LLVM knows no ARM ({error})")
    machine = target.create_target_machine(name, ",".join(features), 3)
    module = llvm.parse_assembly(str(code.module))
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(3))
    passes.getModulePassManager().run(module, passes)
    return machine.emit_assembly(module)


def tile(name: str, features: list[str], num_rows: int, kind: int) -> str:
    shape = ir.ArrayType(PLACE, 3)
    code, function = builder_of(*[DATA] * 9, shape, shape, ir.ArrayType(PLACE, 2), PLACE, PLACE)
    shapes: dict[int, Any] = {0: function.args[9], 3: function.args[10], 8: function.args[11]}
    arrays = [SimpleNamespace(data=function.args[index], shape=shapes.get(index)) for index in range(9)]
    kind_of_tile: Any = FloatTileCode if kind in FLOAT_KINDS else _TileCode
    kind_of_tile(code, features, num_rows, kind).write(arrays, *function.args[12:])
    return assembly(code, name, features)


def innermost(text: str) -> str:
    """The loop with the most products of those that jump to their own beginning."""
    loops = re.findall(r"^(\.LBB\d+_\d+):(?:(?!^\.LBB).)*?\tb\.\w+\t\1$", text, re.MULTILINE | re.DOTALL)
    parts = [text.split(f"\n{label}:", 1)[1].split(f"\t{label}\n", 1)[0] for label in loops]
    return max(parts, key=lambda part: len(re.findall(r"\t(?:fmla|sdot|smull2?)\t", part)))


@pytest.mark.parametrize(("name", "features"), PROCESSORS)
@pytest.mark.parametrize("kind", range(NUM_KINDS))
def test_tiles_are_vectors_and_call_nothing(name: str, features: list[str], kind: int) -> None:
    for num_rows in (1, 2, ROWS):
        text = tile(name, features, num_rows, kind)
        assert not re.search(r"\tbl\t|:got:|@plt", text), "nothing is to be linked"
        if kind in FLOAT_KINDS:
            assert "\tfmla\t" in text and not re.search(r"\tfmadd\t", text)
            continue
        has_dots = "+dotprod" in features
        assert ("\tsdot\t" in text) == has_dots
        assert ("\tsmull\t" in text and "\tsadalp\t" in text) != has_dots
        assert len(re.findall(r"\tmla\t", text)) <= 4 * num_rows, "of zero points alone"


@pytest.mark.parametrize(("name", "features"), PROCESSORS)
@pytest.mark.parametrize("kind", [EIGHT_BITS, *FLOAT_KINDS])
def test_the_sums_of_four_rows_stay_in_registers(name: str, features: list[str], kind: int) -> None:
    loop = innermost(tile(name, features, ROWS, kind))
    most = 0 if kind in FLOAT_KINDS or "+dotprod" in features else loop.count("\n") // 10
    assert len(re.findall(r"\t(?:str|stp)\tq", loop)) <= most, loop


@pytest.mark.parametrize("num_lines", [1, 2, 4])
def test_sums_of_attention_fit_into_registers(num_lines: int) -> None:
    code, function = builder_of(*[DATA, PLACE, PLACE] * 3, PLACE)
    at_once = vector_code.vectors_at_once(num_lines, 4, PLAIN)
    assert 4 % at_once == 0 and vector_code.vectors_at_once(num_lines, 4, ["+avx2"]) == 4
    data = [function.args[index] for index in (0, 3, 6)]
    vector_code._write_sums(code, data, function.args, num_lines, range(at_once))
    text = assembly(code, "cortex-a72", PLAIN)
    assert "\tfmla\t" in text and not re.search(r"\tbl\t|\[sp, #\d+\]\s*//.*Spill", text)
    assert not re.search(r"\t(?:str|stp)\tq", innermost(text))


def test_what_llvm_does_not_say_is_asked_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    is_arm = platform.machine() in ("aarch64", "arm64")
    assert bool(arm_features.arm_features()) == is_arm
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert arm_features.arm_features().split(",")[0] == "+neon"
