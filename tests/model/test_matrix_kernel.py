"""Products on the integer kernel: what the codes mean, and the same bits on whatever instructions, however shared."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from numba.core.registry import cpu_target
from numpy.typing import NDArray

from flowspec.errors import ModelError
from flowspec.model import compiled, row_kernel
from flowspec.model.compiled_matrix import CompiledMatrix, Floats, blocks_of, groups_of
from flowspec.model.matrix_kernel import LANES, lay_out, take
from flowspec.model.packed import GROUP, FloatWeight, PackedWeight, pack
from flowspec.model.rotation_kernel import rotations
from flowspec.model.team import Team

ALONE = Team(1).mailbox

# Prints what tells of the bits of products. ``sys.argv``: the features that dots are chosen by, instead of the
# processor's, if there are any.
PRODUCTS = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from flowspec.model import tile_code
if len(sys.argv) > 1:
    choose = tile_code._dot_of
    tile_code._dot_of = lambda features: choose(sys.argv[1:])
import test_matrix_kernel
print(test_matrix_kernel.digest())
"""


FLOATS = torch.float32, torch.bfloat16, torch.float16


# Of ``digest``, from whatever processor: a device of another kind is to continue a text as this one would.
DIGEST = "d4d0794abed7197d18ff5a129b549aacb1c373a573cb50ef7b3469498579b0d5"


def random_rows(count: int, width: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)


def weight_of(num_outputs: int, num_inputs: int, bits: Any) -> PackedWeight:
    return pack(torch.from_numpy(random_rows(num_outputs, num_inputs, 1)), bits)


def floats_of(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> FloatWeight:
    return FloatWeight(torch.from_numpy(random_rows(num_outputs, num_inputs, 1)).to(dtype))


def drawn(count: int, width: int, seed: int) -> Any:
    """Rows whose bits are the same everywhere."""
    return (np.random.RandomState(seed).randint(-4000, 4000, (count, width)) / np.float32(1024)).astype(np.float32)


def digest() -> str:
    rows, weight = drawn(11, 96, 0), torch.from_numpy(drawn(70, 96, 1))
    parts: list[list[Any]] = [
        [pack(weight, 8)],
        [pack(weight, 4)],
        [pack(weight, 4).with_offsets(), pack(weight[:1], 4)],
    ]
    parts += [[FloatWeight(weight.to(dtype))] for dtype in FLOATS]
    found = hashlib.sha256()
    for weights in parts:
        matrix = CompiledMatrix(weights)
        width = matrix.starts[-1] + blocks_of(weights[-1].shape[0]) * LANES
        for count in (1, 2, 7, 11):
            found.update(matrix(rows[:count], ALONE)[:, :width].tobytes())
    found.update(row_kernel.gated(rows, 40, 40, True).tobytes())
    found.update(row_kernel.normalised(rows, weight[0].numpy(), np.float32(1e-5)).tobytes())
    frequencies = np.array([0.75**n for n in range(16)], np.float32)
    for turned in rotations(np.arange(0, 90_000, 999), frequencies, np.float32(1)):
        found.update(turned.tobytes())
    return found.hexdigest()


class CompiledRows(NamedTuple):
    """Rows as the kernel reads them, in 8 bits."""

    codes: NDArray[np.int8]  # [n, groups, GROUP]
    scales: Floats  # [n, groups]
    sums: NDArray[np.int32]  # [n, groups]

    @classmethod
    def of(cls, rows: Floats, num_groups: int, size: int) -> CompiledRows:
        """[n, K], rounded. ``size``: inputs that share a scale of the weights."""
        shape = len(rows), num_groups
        rounded = cls(np.empty((*shape, GROUP), np.int8), np.empty(shape, np.float32), np.empty(shape, np.int32))
        take(rows, size, *rounded)
        return rounded


def meant(rounded: CompiledRows, num_inputs: int, size: int) -> Any:
    """The rows that codes stand for."""
    groups = (rounded.codes * rounded.scales[..., None]).reshape(len(rounded.codes), -1, groups_of(size) * GROUP)
    return groups[..., :size].reshape(-1, num_inputs)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(96, 576), (70, 96), (5, 64), (40, 40), (17, 100)])
def test_products_are_what_codes_mean(bits: Any, num_outputs: int, num_inputs: int) -> None:
    if bits == 4 and num_inputs % GROUP:
        pytest.skip("4 bits have whole groups")
    weight = weight_of(num_outputs, num_inputs, bits)
    bias = random_rows(1, num_outputs, 2)[0]
    matrix = CompiledMatrix([weight, weight], [None, bias])
    rows = random_rows(13, num_inputs)
    rounded = CompiledRows.of(rows, matrix.lanes.codes.shape[1], matrix.size)
    understood = meant(rounded, num_inputs, matrix.size)
    steps = rounded.scales.repeat(GROUP, axis=1)[:, : understood.shape[1]] if num_inputs % GROUP == 0 else 0.04
    assert (np.abs(understood - rows) <= 0.51 * steps).all()
    wanted = understood.astype(np.float64) @ weight.unpacked().numpy().T.astype(np.float64)
    found = matrix(rows, ALONE)
    first, second = (found[:, start : start + num_outputs] for start in matrix.starts)
    assert np.abs(first - wanted).max() < 1e-6 * np.abs(wanted).max()
    assert np.abs(second - wanted - bias).max() < 1e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(96, 576), (70, 96), (5, 64), (40, 40), (17, 100)])
def test_floats_are_multiplied_as_they_are(dtype: torch.dtype, num_outputs: int, num_inputs: int) -> None:
    weight = floats_of(num_outputs, num_inputs, dtype)
    rows = random_rows(13, num_inputs)
    bias = random_rows(1, num_outputs, 2)[0]
    matrix = CompiledMatrix([weight, weight], [None, bias])
    found = matrix(rows, ALONE)
    for start, added in zip(matrix.starts, (0, bias), strict=True):
        wanted = rows.astype(np.float64) @ weight.values.double().numpy().T + added
        assert np.abs(found[:, start : start + num_outputs] - wanted).max() < 1e-6 * np.abs(wanted).max()
    for count in range(1, 13):
        assert np.array_equal(matrix(rows[:count], ALONE), found[:count])


@pytest.mark.parametrize("size", [16, 48, 128])
def test_a_scale_may_be_for_other_numbers_of_inputs(size: int) -> None:
    draw = np.random.default_rng(0)
    codes = draw.integers(-127, 128, (20, 3, size)).astype(np.int8)
    weight = PackedWeight(codes, draw.random((20, 3, 1)).astype(np.float16), None)
    rows = random_rows(5, 3 * size)
    wanted = rows @ weight.unpacked().numpy().T
    found = CompiledMatrix([weight])(rows, ALONE)[:, :20]
    assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)


def test_codes_may_have_offsets_instead_of_zero_points() -> None:
    plain = weight_of(20, 64, 4)
    draw = np.random.default_rng(5)
    offsets = draw.standard_normal(plain.scales.shape).astype(np.float16)
    own = PackedWeight(plain.codes, plain.scales, offsets=offsets)
    matrix = CompiledMatrix([own, plain])
    assert own.bits == 4 and matrix.nbytes > CompiledMatrix([plain, plain]).nbytes
    rows = random_rows(9, 64)
    understood = meant(CompiledRows.of(rows, 2, GROUP), 64, GROUP).astype(np.float64)
    found = matrix(rows, ALONE)
    for start, weight in zip(matrix.starts, (own, plain.with_offsets()), strict=True):
        wanted = understood @ weight.unpacked().numpy().T.astype(np.float64)
        assert np.abs(found[:, start : start + 20] - wanted).max() < 1e-6 * np.abs(wanted).max()
    for count in range(1, 9):
        assert np.array_equal(matrix(rows[:count], ALONE), found[:count])
    with pytest.raises(ModelError, match="some experts have 4-bit codes with zero points, others with offsets"):
        CompiledMatrix([plain]).lanes.fill(own)
    moved = plain.with_offsets().unpacked() - plain.unpacked()
    assert 0 < moved.abs().max() < 1e-3 * plain.unpacked().abs().max()
    halved = own.divided(2.0)
    assert torch.equal(halved.unpacked(), own.unpacked() / 2)
    assert torch.equal(own.rows(np.array([3, 1])).unpacked(), own.unpacked()[[3, 1]])


@pytest.mark.parametrize("bits", [8, 4, torch.float32, torch.bfloat16])
def test_rows_and_threads_do_not_change_bits(bits: Any) -> None:
    weight = floats_of(100, 64, bits) if isinstance(bits, torch.dtype) else weight_of(100, 64, bits)
    matrix = CompiledMatrix([weight])
    rows = random_rows(23, 64)
    whole = matrix(rows, ALONE)
    for count in range(1, 23):
        assert np.array_equal(matrix(rows[:count], ALONE), whole[:count])
    for threads in (2, 3):
        with closing(Team(threads, unit_ns=1)) as team:
            for _ in range(20):
                assert np.array_equal(matrix(rows, team.mailbox), whole)


def test_other_processors_make_the_same_bits() -> None:
    """Of instructions that this processor has, too; the rest is as LLVM makes it."""
    target: Any = cpu_target.target_context
    features = target.codegen().magic_tuple()[2].split(",")
    without_512 = ",".join(name.replace("+", "-") if "avx512" in name else name for name in features)
    others: list[tuple[dict[str, str], list[str]]] = [({}, ["+sse2"])]
    if "+avx2" in features:
        others.append(({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": without_512}, []))
    if {"+avx512vnni", "+avx512vl"} <= set(features):
        others.append(({}, ["+avxvnni"]))
    if "+neon" in features:
        others.append(({}, ["+neon"]))
    wanted = digest()
    assert wanted == DIGEST
    for variables, chosen in others:
        environment = os.environ | variables | {"NUMBA_CACHE_DIR": os.devnull}
        command = [sys.executable, "-c", PRODUCTS, *chosen]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
        assert done.stdout.strip() == wanted, (variables.get("NUMBA_CPU_NAME"), chosen)


def test_what_is_no_number_stays_none() -> None:
    matrix = CompiledMatrix([weight_of(16, 64, 8)])
    for odd in (np.nan, np.inf, -np.inf):
        rows = random_rows(2, 64)
        rows[1, 5] = odd
        found = matrix(rows, ALONE)
        assert np.isfinite(found[0]).all() and not np.isfinite(found[1]).any()
    assert np.array_equal(matrix(np.zeros((1, 64), np.float32), ALONE)[:, :16], np.zeros((1, 16), np.float32))


@pytest.mark.parametrize("is_gelu", [False, True])
def test_gates_are_what_torch_has(is_gelu: bool) -> None:
    products = random_rows(3, 64) * np.float32(30)
    gate, up = (torch.from_numpy(products[:, begin : begin + 20]).double() for begin in (0, 32))
    gates = torch.nn.functional.gelu(gate, approximate="tanh") if is_gelu else torch.nn.functional.silu(gate)
    wanted = (gates * up).numpy()
    assert np.abs(row_kernel.gated(products, 20, 32, is_gelu) - wanted).max() < 1e-6 * np.abs(wanted).max()


def test_norms_are_what_torch_has() -> None:
    rows, weight = random_rows(4, 70), random_rows(1, 70, 3)[0]
    wanted = torch.nn.functional.rms_norm(torch.from_numpy(rows), [70], torch.from_numpy(weight), 1e-5).numpy()
    assert np.abs(row_kernel.normalised(rows, weight, np.float32(1e-5)) - wanted).max() < 1e-6


def test_one_process_at_a_time_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "_PATIENCE_S", 0.1)
    lock = FileLock(tmp_path / "flowspec" / "kernels" / "lock", timeout=0)
    with compiled.one_at_a_time(), pytest.raises(Timeout):
        lock.acquire()
    with lock, compiled.one_at_a_time():  # who stands still stops nobody
        pass
    with compiled.one_at_a_time(), pytest.raises(Timeout):
        lock.acquire()
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    with compiled.one_at_a_time():
        pass


def test_a_kernel_on_disk_is_old_once_another_one_has_changed() -> None:
    stamp = compiled._stamp()
    assert lay_out._cache._cache_file._version.endswith(stamp)
    kernels = {path.name for pattern in compiled._SOURCES for path in Path(compiled.__file__).parent.glob(pattern)}
    assert kernels >= {
        "matrix_kernel.py",
        "row_kernel.py",
        "tile_code.py",
        "vector_code.py",
        "packed.py",
        "compiled_layer.py",
    }
