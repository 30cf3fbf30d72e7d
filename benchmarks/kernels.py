"""The matrices of a stage on the kernels that a processor has, by rows: what a stage should run on. Prints a table.

    python benchmarks/kernels.py [--shape smollm2|7b] [--rows 1,4,16,64] [--threads 1] [--repeat 9] [--peer PYTHON]
        [--json]

A stage's seven matrices a layer, one after the other over all layers, so that none is in a cache of the processor when
its turn comes; nothing else of a layer. Random weights. ``--peer``: a Python that has ``openvino``, ``onnxruntime`` and
``onnx``, which are left out without one. **Invariant**: whether the first rows of the largest product have the bits
that they have alone. **Times the bound**: of one row, against reading the weights at the memory's speed, as summing an
array shows it. Least of the repetitions.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

GROUP = 32  # inputs that share a scale
SHAPES = {  # layers, and the matrices [outputs, inputs] of one
    "smollm2": (30, ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))),
    "tiny": (1, ((64, 64), (64, 64), (64, 64))),
    "7b": (4, ((4096, 4096),) * 4 + ((11008, 4096), (11008, 4096), (4096, 11008))),
}
FLOAT, INT8, INT4 = 4.0, 1 + 2 / GROUP, 0.5 + 2 / GROUP  # bytes of a weight, its scale's share among them

Product: TypeAlias = Callable[[NDArray[np.float32]], Any]  # rows [n, K] -> [n, N]


class Kernel(NamedTuple):
    """One way to multiply rows with a weight [N, K]."""

    name: str
    bytes_a_weight: float
    make: Callable[[NDArray[np.float32], int], Product]  # the weight, threads


def on_torch(dtype: str) -> Callable[[NDArray[np.float32], int], Product]:
    def make(weight: NDArray[np.float32], threads: int) -> Product:
        import torch

        torch.set_num_threads(threads)
        kept = torch.from_numpy(weight).to(getattr(torch, dtype))

        @torch.inference_mode()
        def run(rows: NDArray[np.float32]) -> Any:
            return torch.nn.functional.linear(torch.from_numpy(rows).to(kept.dtype), kept).float()

        return run

    return make


def on_torch_int8(weight: NDArray[np.float32], threads: int) -> Product:
    """Rows in bfloat16, a scale for each output."""
    import torch

    operators: Any = torch
    torch.set_num_threads(threads)
    scales = np.abs(weight).max(axis=1) / 127
    codes = torch.from_numpy((weight / scales[:, None]).round().astype(np.int8))
    kept = torch.from_numpy(scales).bfloat16()

    @torch.inference_mode()
    def run(rows: NDArray[np.float32]) -> Any:
        return operators._weight_int8pack_mm(torch.from_numpy(rows).bfloat16(), codes, kept).float()

    return run


def on_torch_int4(weight: NDArray[np.float32], threads: int) -> Product:
    """Rows in bfloat16, groups of 32."""
    import torch

    operators: Any = torch
    torch.set_num_threads(threads)
    groups = weight.reshape(len(weight), -1, GROUP)
    scales = np.abs(groups).max(axis=2, keepdims=True) / 7
    codes = torch.from_numpy((groups / scales).round().astype(np.int32).reshape(weight.shape) + 8)
    packed = operators._convert_weight_to_int4pack_for_cpu(codes, 2)
    one = torch.from_numpy(scales[..., 0].T.copy())
    both = torch.stack([one, torch.zeros_like(one)], dim=2).bfloat16().contiguous()

    @torch.inference_mode()
    def run(rows: NDArray[np.float32]) -> Any:
        return operators._weight_int4pack_mm_for_cpu(torch.from_numpy(rows).bfloat16(), packed, GROUP, both).float()

    return run


def on_ours(precision: Any) -> Callable[[NDArray[np.float32], int], Product]:
    """What stages run on: bits, or a type of floats."""

    def make(weight: NDArray[np.float32], threads: int) -> Product:
        import torch

        from flowspec.model.compiled_matrix import CompiledMatrix
        from flowspec.model.packed import FloatWeight, pack
        from flowspec.model.team import team_of

        given = torch.from_numpy(weight)
        is_float = isinstance(precision, str)
        matrix = CompiledMatrix(
            [FloatWeight(given.to(getattr(torch, precision))) if is_float else pack(given, precision)]
        )
        team = team_of(threads)
        return lambda rows: matrix(rows, team.mailbox)

    return make


def on_openvino(weight: NDArray[np.float32], threads: int) -> Product:
    """A graph of one product of 8 bits, with dynamic quantisation of rows."""
    openvino: Any = importlib.import_module("openvino")
    op: Any = importlib.import_module("openvino.opset13")
    num_outputs, num_inputs = weight.shape
    groups = weight.reshape(num_outputs, -1, GROUP)
    scales = (np.abs(groups).max(axis=2, keepdims=True) / 127).astype(np.float16)
    codes = (groups / scales.astype(np.float32)).round().astype(np.int8)
    node = op.multiply(op.convert(op.constant(codes), np.float16), op.constant(scales))
    node = op.reshape(node, op.constant(np.array(weight.shape)), False)
    rows = op.parameter([-1, num_inputs], np.float32)
    model = openvino.Model([op.matmul(rows, op.convert(node, np.float32), False, True)], [rows])
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    bound: dict[int, tuple[Any, Any]] = {}  # by the number of rows: what it reads and writes in place

    def run(rows: NDArray[np.float32]) -> Any:
        if len(rows) not in bound:
            bound[len(rows)] = np.empty_like(rows), np.empty((len(rows), num_outputs), np.float32)
        given, products = bound[len(rows)]
        given[:] = rows
        request.set_input_tensor(0, openvino.Tensor(given, shared_memory=True))
        request.set_output_tensor(0, openvino.Tensor(products, shared_memory=True))
        request.infer()
        return products

    return run


def on_onnxruntime(bits: int) -> Callable[[NDArray[np.float32], int], Product]:
    """MatMulNBits, with activations in int8 (accuracy level 4)."""

    def make(weight: NDArray[np.float32], threads: int) -> Product:
        import onnx  # pyright: ignore[reportMissingImports]
        import onnxruntime  # pyright: ignore[reportMissingImports]

        num_outputs, num_inputs = weight.shape
        groups = weight.reshape(num_outputs, -1, GROUP)
        scales = np.abs(groups).max(axis=2) / (2 ** (bits - 1) - 1)
        codes = ((groups / scales[..., None]).round() + 2 ** (bits - 1)).astype(np.uint8)
        if bits == 4:
            codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
        make_tensor = onnx.numpy_helper.from_array
        traits = {"K": num_inputs, "N": num_outputs, "bits": bits, "block_size": GROUP, "accuracy_level": 4}
        node = onnx.helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **traits)
        values = [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, width])
            for name, width in (("x", num_inputs), ("y", num_outputs))
        ]
        weights = [make_tensor(codes, "w"), make_tensor(scales.reshape(-1).astype(np.float32), "s")]
        graph = onnx.helper.make_graph([node], "product", values[:1], values[1:], weights)
        sets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=sets, ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return lambda rows: session.run(None, {"x": rows})[0]

    return make


KERNELS = (
    Kernel("torch float32", FLOAT, on_torch("float32")),
    Kernel("torch bfloat16", 2.0, on_torch("bfloat16")),
    Kernel("torch int8 weights", 1.0, on_torch_int8),
    Kernel("torch int4 weights", INT4, on_torch_int4),
    Kernel("flowspec float32", FLOAT, on_ours("float32")),
    Kernel("flowspec bfloat16", FLOAT / 2, on_ours("bfloat16")),
    Kernel("flowspec int8", INT8, on_ours(8)),
    Kernel("flowspec int4", INT4, on_ours(4)),
)
PEER_KERNELS = (
    Kernel("OpenVINO int8", INT8, on_openvino),
    Kernel("onnxruntime int8", INT8, on_onnxruntime(8)),
    Kernel("onnxruntime int4", INT4, on_onnxruntime(4)),
)


def bytes_per_s() -> float:
    """At which one core reads memory."""
    array = np.ones(40_000_000, dtype=np.int64)
    return array.nbytes / min(seconds_of(array.sum) for _ in range(7))


def seconds_of(work: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def measure(kernel: Kernel, arguments: argparse.Namespace) -> dict[str, Any]:
    num_layers, matrices = SHAPES[arguments.shape]
    draw = np.random.default_rng(0)
    products = [
        (kernel.make(draw.standard_normal(shape, dtype=np.float32) * 0.02, arguments.threads), shape[1])
        for _ in range(num_layers)
        for shape in matrices
    ]
    row_sets = {width: draw.standard_normal((max(arguments.rows), width), dtype=np.float32) for _, width in products}

    def forward(num_rows: int) -> None:
        for run, width in products:
            run(row_sets[width][:num_rows])

    milliseconds = {}
    for num_rows in arguments.rows:
        forward(num_rows)
        milliseconds[num_rows] = 1000 * min(seconds_of(lambda n=num_rows: forward(n)) for _ in range(arguments.repeat))
    num_weights = num_layers * sum(rows * columns for rows, columns in matrices)
    run, width = products[len(matrices) - 2]
    whole = np.asarray(run(row_sets[width]))
    alone = {count: np.asarray(run(row_sets[width][:count])) for count in arguments.rows}
    is_invariant = all(np.array_equal(rows, whole[:count]) for count, rows in alone.items())
    read_s = num_weights * kernel.bytes_a_weight / arguments.bytes_per_s
    bound = milliseconds[1] / 1000 / read_s if 1 in milliseconds else None
    return {"kernel": kernel.name, "ms": milliseconds, "invariant": is_invariant, "times_the_bound": bound}


def measure_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    if arguments.is_peer:
        return [measure(kernel, arguments) for kernel in PEER_KERNELS]
    found = [measure(kernel, arguments) for kernel in KERNELS]
    if arguments.peer:
        told = [*sys.argv[1:], "--is-peer", "--bytes-per-s", str(arguments.bytes_per_s)]
        done = subprocess.run([arguments.peer, __file__, *told], stdout=subprocess.PIPE, check=True, timeout=3600)
        found += json.loads(done.stdout)
    return found


def table(found: Sequence[dict[str, Any]], rows: Sequence[int]) -> str:
    from flowspec.bench.report import markdown_table

    header = ["kernel", *(f"{count} rows, ms" for count in rows), "invariant", "times the bound"]
    lines = [
        [
            each["kernel"],
            *(f"{time_ms:.1f}" for time_ms in each["ms"].values()),
            "yes" if each["invariant"] else "no",
            "" if each["times_the_bound"] is None else f"{each['times_the_bound']:.1f}",
        ]
        for each in found
    ]
    return markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2")
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 16, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--peer", metavar="PYTHON", help="that has openvino, onnxruntime and onnx")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--is-peer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bytes-per-s", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.bytes_per_s = arguments.bytes_per_s or bytes_per_s()
    found = measure_all(arguments)
    is_json = arguments.json or arguments.is_peer
    print(json.dumps(found, indent=2) if is_json else table(found, arguments.rows))


if __name__ == "__main__":
    main()
