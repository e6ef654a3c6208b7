"""Every Triton kernel's specialisations, as real launches choose them.

The configurations come from the launchers' own heuristics; pointers and row strides are divisible by 16; a stride of 1
and k = 1 are constants. A kernel without a row here fails a test.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path

import triton
import triton.language as tl

import gradsel_kernels.triton as device_code
from gradsel_kernels._checks import Layout
from gradsel_kernels.triton import (  # fmt: skip
    adam,
    adam_device,
    bitmask,
    device_tables,
    product,
    rows,
    topk,
    topk_adam,
    topk_adam_device,
    weight_grad,
)

AMPERE, HOPPER, BLACKWELL = 80, 90, 100
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
#: 32-bit registers of a streaming multiprocessor, and the most that one thread can have.
REGISTERS, REGISTERS_A_THREAD = 65536, 255
ITEMSIZE = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
TYPES = {"fp64": tl.float64, "fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}


@dataclass
class Case:
    """One specialisation: what a launch passes, and what its machine code must look like."""

    kernel: object
    name: str
    types: dict[str, str]  # of the arguments that are not constants
    constants: dict[str, object]
    divisible: tuple[str, ...]  # arguments divisible by 16
    options: dict[str, object]
    vectors: bool = False  # must load 16 bytes at a time
    threads: int = 256  # that must fit in a multiprocessor, unless the block is larger
    targets: tuple[int, ...] = (HOPPER,)
    forbidden: tuple[str, ...] = field(default=())  # in the PTX
    required: str = ""  # in the machine code, one of these instructions

    def id(self, target: int) -> str:
        return f"{self.kernel.__name__}-{self.name}-sm_{target}"


def topk_case(n: int, k: int, dtype: str, *, transposed: bool = False, targets=(HOPPER,)) -> Case:
    itemsize = ITEMSIZE[dtype]
    small = k <= topk.SMALL_K
    streamed = transposed or n * max(4, itemsize) > topk.BYTES_IN_REGISTERS
    if streamed:
        kernel = topk._topk_stream_rounds if small else topk._topk_stream_bisect
        tile_rows, cols, warps = topk.stream_config(itemsize, transposed)
        options = topk.stream_options(small, transposed)
    else:
        kernel = topk._topk_rounds if small else topk._topk_bisect
        tile_rows, cols, warps = topk.register_config(n, itemsize)
        options = {}
    types = {"grad": f"*{dtype}", "out": "*i32", "bits": "*i32", "rows": "i32", "n": "i32"}
    constants = {"ROWS": tile_rows, "COLS": cols, "UNIT_STRIDE": not transposed, "WITH_BITS": True, "block": None}
    if small:
        constants["KP"] = 1 if k == 1 else topk.SMALL_K
    else:
        constants["KEY_BITS"] = 8 * itemsize - 1
        if not streamed:
            constants["CHUNK"] = topk.RANKED_AT_ONCE
    if k == 1:
        constants["k"] = 1
    else:
        types["k"] = "i32"
    unit, other = ("stride_row", "stride_col") if transposed else ("stride_col", "stride_row")
    constants[unit] = 1
    types[other] = "i32"
    return Case(
        kernel,
        f"{n}-top{k}-{dtype}" + "-transposed" * transposed,
        types,
        constants,
        ("grad", "out", "bits", other, "n"),
        {"num_warps": warps, **options},
        vectors=not transposed,
        targets=targets,
    )


def adam_case(
    layout: Layout,
    weight: str,
    state: str = "fp32",
    *,
    compact: bool,
    linear: bool = False,
    values: bool = False,
    amsgrad: bool = False,
    decay: tl.constexpr = adam_device.NO_DECAY,
    anchor: tl.constexpr = adam_device.NO_ANCHOR,
    rounding: tl.constexpr = adam_device.TO_NEAREST,
    moment: str | None = None,
    scaler: bool = False,
    rates: bool = False,
    targets=(HOPPER,),
) -> Case:
    scalars = dict.fromkeys(("lerp_weight", "beta2", "square_weight", "eps", "decay", "pull"), "fp64")
    types = {"table": "*i64", "tiles": "*i32", "corrections": "*fp64", **scalars}
    optional = {"keys": ("*i64", rounding is adam_device.STOCHASTIC), "scalars": ("*fp64", rates)}
    optional |= dict.fromkeys(("grad_scale", "found_inf"), ("*fp32", scaler))
    types |= {name: pointer for name, (pointer, passed) in optional.items() if passed}
    constants = {
        **{name: None for name, (_, passed) in optional.items() if not passed},
        "WEIGHT": TYPES[weight],
        "GRAD": TYPES[weight],
        "STATE": TYPES[state],
        "MOMENT": TYPES[moment or state],
        "COMPACT": compact,
        "HAS_VALUES": values,
        "ROUNDING": rounding.value,
        "ALIGNED": True,
        "AMSGRAD": amsgrad,
        "DECAY": decay.value,
        "MAXIMIZE": False,
        "ANCHOR": anchor.value,
        "INDEX": tl.int32,
        "LAYOUT": int(layout),
        "LINEAR": linear,
        "HAS_WEIGHT": True,
        "ENTRIES": adam.ENTRIES,
    }
    divisible = tuple(name for name in types if types[name][0] == "*")
    name = f"{layout.name}-{weight}-{moment or state}"
    name += "-compact" * compact + "-values" * values + "-amsgrad" * amsgrad + "-scaler" * scaler
    name += f"-rounding{rounding.value}" * (rounding.value > 0) + "-rates" * rates
    return Case(
        adam_device.step,
        name + f"-anchor{anchor.value}" * (anchor.value > 0),
        types,
        constants,
        divisible,
        adam.COMPILER_OPTIONS,
        # Four numbers of 16 bits are 8 bytes.
        vectors=not (moment == "bf16" and layout == Layout.ALL and weight != "fp32"),
        threads=512,
        targets=targets,
        forbidden=("ftz", "approx", "div.full"),
    )


def first_step_case(
    n: int,
    k: int,
    weight: str,
    *,
    transposed: bool = False,
    values: bool = False,
    amsgrad: bool = False,
    anchor: tl.constexpr = adam_device.NO_ANCHOR,
    rounding: tl.constexpr = adam_device.TO_NEAREST,
    moment: str | None = None,
    scaler: bool = False,
    targets=(HOPPER,),
) -> Case:
    state = "fp64" if weight == "fp64" else "fp32"
    search = topk_adam.config(n, k, ITEMSIZE[weight], transposed)
    scalars = dict.fromkeys(("lerp_weight", "beta2", "square_weight", "eps", "decay", "pull"), "fp64")
    types = {"table": "*i64", "tiles": "*i32", "masks": "*i64", "corrections": "*fp64", **scalars}
    optional = {"keys": ("*i64", rounding is adam_device.STOCHASTIC)}
    optional |= dict.fromkeys(("grad_scale", "found_inf"), ("*fp32", scaler))
    types |= {name: pointer for name, (pointer, passed) in optional.items() if passed}
    constants = {
        **{name: None for name, (_, passed) in optional.items() if not passed},
        "WEIGHT": TYPES[weight],
        "GRAD": TYPES[weight],
        "STATE": TYPES[state],
        "MOMENT": TYPES[moment or state],
        "STREAMED": search.streamed,
        "KP": search.kp,
        "KEY_BITS": search.key_bits,
        "CHUNK": topk.RANKED_AT_ONCE,
        "ROWS": search.rows,
        "COLS": search.cols,
        "UNIT_STRIDE": not transposed,
        "WITH_BITS": True,
        "ALIGNED": not transposed,
        "HAS_VALUES": values,
        "HAS_ORIGINAL": anchor.value > 0,
        "ROUNDING": rounding.value,
        "AMSGRAD": amsgrad,
        "DECAY": adam_device.DECOUPLED_DECAY.value,
        "MAXIMIZE": False,
        "ANCHOR": anchor.value,
        "ENTRIES": topk_adam.ENTRIES,
    }
    return Case(
        topk_adam_device.first_step,
        f"{n}-top{k}-{weight}-rounding{rounding.value}" + "-transposed" * transposed,
        types,
        constants,
        tuple(name for name in types if types[name][0] == "*"),
        {**adam.COMPILER_OPTIONS, "num_warps": search.warps, "maxnreg": search.registers},
        vectors=not transposed,
        targets=targets,
        forbidden=("ftz", "approx", "div.full"),
    )


def advance_case(*, stochastic: bool, scaler: bool, rates: bool = False) -> Case:
    types = {"table": "*i64", "corrections": "*fp64", "count": "i32"}
    types |= dict.fromkeys(("lr", "beta1", "beta2", "decay", "pull"), "fp64")
    constants: dict[str, object] = {"STEP": tl.float32, "TENSORS": adam.STEPS}
    constants |= {"DECOUPLED_DECAY": rates, "DECOUPLED_PULL": False}
    optional = {"keys": ("*i64", stochastic), "found_inf": ("*fp32", scaler)}
    for name, (pointer, passed) in (optional | dict.fromkeys(("rates", "scalars"), ("*fp64", rates))).items():
        if passed:
            types[name] = pointer
        else:
            constants[name] = None
    return Case(
        adam_device.advance,
        "float32-steps" + "-stochastic" * stochastic + "-scaler" * scaler + "-rates" * rates,
        types,
        constants,
        tuple(name for name in types if types[name][0] == "*"),
        {"num_warps": 1, "enable_fp_fusion": False},
        forbidden=("approx", "div.full"),
    )


def sums_case(
    kernel: object,
    dtype: str,
    k: int,
    n: int = 2048,
    *,
    grad_tokens: bool = False,
    input_tokens: bool = True,
    offsets: bool = False,
    bias: bool = False,
    targets=(HOPPER,),
) -> Case:
    """A sum over tokens. Tokens adjoin in the input as take_columns leaves it, and in the gradient of a convolution."""
    itemsize = ITEMSIZE[dtype]
    total = "fp64" if dtype == "fp64" else "fp32"
    types = {"grad_output": f"*{dtype}", "input": f"*{dtype}", "cols": "*i32", "out": f"*{total}"}
    types |= dict.fromkeys(("grad_batch", "input_batch", "tokens", "rows", "n", "k", "nnz"), "i32")
    types |= dict.fromkeys(("chunks", "steps", "steps_a_split", "parts"), "i32")
    constants = {"SUM": TYPES[total]}
    strides = []
    for name, adjoining, feature in (("grad", grad_tokens, "row"), ("input", input_tokens, "col")):
        unit, other = (f"{name}_token", f"{name}_{feature}")[:: 1 if adjoining else -1]
        constants[unit] = 1
        types[other] = "i32"
        strides.append(other)
    for name, passed, pointer in (("row_offsets", offsets, "*i64"), ("bias", bias, f"*{total}")):
        if passed:
            types[name] = pointer
        else:
            constants[name] = None
    divisible = [x for x in types if types[x][0] == "*"] + [*strides, "grad_batch", "input_batch", "tokens", "rows"]
    if kernel is weight_grad._gather:
        config = weight_grad.gather_config(k, itemsize)
        constants["K"] = config.width
    else:
        config = weight_grad.tile_config(768, n, itemsize)
        constants["COLS"] = config.width
        divisible.append("n")
    constants |= {"TOKENS": config.tokens, "ROWS": config.rows}
    matrix_units = kernel is weight_grad._tile and itemsize == 2
    name = f"{dtype}-k{k}-n{n}" + "-conv" * grad_tokens + "-rowmajor" * (not input_tokens) + "-csr" * offsets
    return Case(
        kernel,
        name + "-bias" * bias,
        types,
        constants,
        tuple(divisible),
        {"num_warps": config.warps, "num_stages": config.stages},
        vectors=True,
        threads=512 if kernel is weight_grad._gather else 256,
        targets=targets,
        required=r"HGMMA|UTCHMMA|HMMA\.16816\.F32" if matrix_units else "",
    )


def take_case(dtype: str, *, input_tokens: bool = False) -> Case:
    tile_tokens, cols = weight_grad.take_config(2048)
    types = {"input": f"*{dtype}", "columns": "*i32", "out": f"*{dtype}"}
    unit, other = ("stride_token", "stride_col")[:: 1 if input_tokens else -1]
    types |= dict.fromkeys(("stride_batch", other, "tokens", "n", "count", "parts", "chunks"), "i32")
    return Case(
        weight_grad._take_columns,
        dtype + "-tokens" * input_tokens,
        types,
        {unit: 1, "TOKENS": tile_tokens, "COLS": cols},
        ("input", "columns", "out", "stride_batch", other, "tokens"),
        {"num_warps": 4},
        vectors=input_tokens,
        threads=512,
    )


def product_case(dtype: str, tokens: int, *, ragged: bool = False, targets: tuple[int, ...] = (HOPPER,)) -> Case:
    types = {"output": f"*{dtype}", "input": f"*{dtype}", "cols": "*i32", "values": "*fp32"}
    types |= {"row_offsets": "*i64"} if ragged else {}
    strides = ("output_stride_token", "input_stride_token")
    types |= dict.fromkeys((*strides, "tokens", "rows", "n", "k", "nnz", "blocks"), "i32")
    tile = min(product.TOKENS, tokens)
    constants = {"output_stride_row": 1, "input_stride_col": 1, "TOKENS": tile, "ROWS": product.SUMS // tile}
    constants |= {} if ragged else {"row_offsets": None}
    return Case(
        product._selected_addmm,
        f"{dtype}-{tokens}-tokens" + "-ragged" * ragged,
        types,
        constants,
        ("output", "input", "cols", "values", *strides),
        {"num_warps": 4},
        threads=512,
        targets=targets,
    )


EVERYWHERE = (AMPERE, HOPPER, BLACKWELL)
SIZES = dict.fromkeys(
    ("stride_row", "stride_col", "cols_stride_row", "cols_stride_col", "rows", "n", "k", "chunks"), "i32"
)
VALUES_STRIDES = ("values_stride_row", "values_stride_col")
CASES = [
    topk_case(200, 1, "fp32"),
    topk_case(768, 1, "fp32", targets=EVERYWHERE),
    topk_case(768, 8, "bf16"),
    topk_case(3072, 1, "bf16"),
    topk_case(3072, 8, "fp32", targets=EVERYWHERE),
    topk_case(14336, 1, "fp32", targets=EVERYWHERE),
    topk_case(14336, 1, "bf16"),
    topk_case(14336, 8, "fp32"),
    topk_case(8192, 8, "fp64"),
    topk_case(768, 64, "fp32"),
    topk_case(3072, 64, "bf16"),
    topk_case(14336, 64, "fp32", targets=EVERYWHERE),
    topk_case(8192, 64, "fp64"),
    topk_case(50304, 1, "fp32"),
    topk_case(50304, 8, "bf16"),
    topk_case(50304, 8, "fp64"),
    topk_case(50304, 64, "bf16"),
    topk_case(3072, 1, "bf16", transposed=True),
    topk_case(3072, 8, "fp32", transposed=True, targets=EVERYWHERE),
    topk_case(3072, 64, "fp32", transposed=True),
    adam_case(Layout.ALL, "fp32", compact=True, linear=True, decay=adam_device.DECOUPLED_DECAY, targets=EVERYWHERE),
    adam_case(Layout.ALL, "bf16", compact=False, values=True, amsgrad=True, decay=adam_device.L2_DECAY),
    adam_case(Layout.COLS, "fp32", compact=True),
    adam_case(Layout.COLS, "bf16", compact=True, values=True, targets=EVERYWHERE),
    adam_case(Layout.FLAT, "fp64", "fp64", compact=False, linear=True, amsgrad=True),
    adam_case(Layout.ALL, "fp32", compact=True, linear=True, anchor=adam_device.L2_ANCHOR),
    adam_case(Layout.COLS, "bf16", compact=True, values=True, anchor=adam_device.L1_ANCHOR),
    adam_case(
        Layout.FLAT,
        "fp64",
        "fp64",
        compact=False,
        linear=True,
        amsgrad=True,
        decay=adam_device.L2_DECAY,
        anchor=adam_device.DECOUPLED_L1_ANCHOR,
        targets=EVERYWHERE,
    ),
    adam_case(
        Layout.COLS,
        "bf16",
        compact=True,
        values=True,
        amsgrad=True,
        anchor=adam_device.DECOUPLED_L2_ANCHOR,
        targets=EVERYWHERE,
    ),
    adam_case(Layout.ALL, "fp32", compact=True, linear=True, scaler=True, moment="bf16"),
    adam_case(Layout.COLS, "bf16", compact=True, rounding=adam_device.STOCHASTIC, scaler=True, targets=EVERYWHERE),
    adam_case(
        Layout.ALL, "fp16", compact=True, linear=True, amsgrad=True, rounding=adam_device.STOCHASTIC, moment="bf16"
    ),
    adam_case(
        Layout.FLAT,
        "fp16",
        compact=False,
        linear=True,
        rounding=adam_device.COMPENSATED,
        anchor=adam_device.L2_ANCHOR,
        scaler=True,
    ),
    adam_case(
        Layout.COLS,
        "fp16",
        compact=False,
        amsgrad=True,
        decay=adam_device.L2_DECAY,
        anchor=adam_device.DECOUPLED_L1_ANCHOR,
        rounding=adam_device.STOCHASTIC,
        moment="bf16",
        scaler=True,
        targets=EVERYWHERE,
    ),
    adam_case(Layout.COLS, "bf16", compact=True, amsgrad=True, rounding=adam_device.COMPENSATED, moment="bf16"),
    adam_case(Layout.COLS, "bf16", compact=True, values=True, decay=adam_device.DECOUPLED_DECAY, rates=True),
    first_step_case(768, 1, "fp32", targets=EVERYWHERE),
    first_step_case(3072, 8, "bf16", values=True, scaler=True, anchor=adam_device.L2_ANCHOR),
    first_step_case(768, 64, "fp16", rounding=adam_device.COMPENSATED, amsgrad=True),
    first_step_case(50304, 8, "bf16", targets=EVERYWHERE),
    first_step_case(50304, 1, "bf16", rounding=adam_device.STOCHASTIC, moment="bf16"),
    first_step_case(3072, 64, "fp64", transposed=True, anchor=adam_device.DECOUPLED_L1_ANCHOR),
    *(sums_case(weight_grad._gather, dtype, k) for dtype in ("fp32", "bf16", "fp16") for k in (1, 3)),
    sums_case(weight_grad._gather, "bf16", 1, bias=True, targets=EVERYWHERE),
    sums_case(weight_grad._gather, "fp32", 8, bias=True, offsets=True),
    sums_case(weight_grad._gather, "bf16", 2, bias=True, grad_tokens=True),
    sums_case(weight_grad._gather, "fp64", 1),
    sums_case(weight_grad._tile, "bf16", 8),
    sums_case(weight_grad._tile, "bf16", 8, bias=True, targets=EVERYWHERE),
    sums_case(weight_grad._tile, "bf16", 1, n=48, bias=True, grad_tokens=True),
    sums_case(weight_grad._tile, "fp16", 8, offsets=True, input_tokens=False),
    sums_case(weight_grad._tile, "fp32", 8, bias=True, offsets=True, targets=EVERYWHERE),
    sums_case(weight_grad._tile, "fp64", 8, targets=(HOPPER, BLACKWELL)),
    *(take_case(dtype) for dtype in ("fp32", "bf16", "fp16")),
    take_case("bf16", input_tokens=True),
    advance_case(stochastic=False, scaler=False),
    advance_case(stochastic=True, scaler=True),
    advance_case(stochastic=True, scaler=True, rates=True),
    Case(
        device_tables._write_addresses,
        "gradients",
        {"lines": "*i64", "count": "i32", **dict.fromkeys(device_tables._PARAMETERS, "i64")},
        {"FIELD": adam_device._GRAD.value, "FIELDS": device_tables.LINE},
        ("lines",),
        {"num_warps": 1},
    ),
    Case(
        bitmask._pack,
        "3072",
        {"mask": "*i1", "bits": "*i32", "stride_row": "i32", "n": "i32", "chunks": "i32"},
        {"stride_col": 1, "UNIT_STRIDE": True, "COLS": bitmask.COLS},
        ("mask", "bits", "stride_row", "n"),
        {"num_warps": 2},
        vectors=True,
    ),
    Case(
        bitmask._unpack,
        "3072",
        {"bits": "*i32", "mask": "*i1", "stride_row": "i32", "n": "i32", "chunks": "i32"},
        {"stride_col": 1, "COLS": bitmask.COLS},
        ("bits", "mask", "stride_row", "n"),
        {"num_warps": 2},
    ),
    product_case("bf16", 1, targets=EVERYWHERE),
    product_case("fp32", 16, ragged=True),
    Case(
        rows._gather_rows,
        "k4-bf16",
        {"weight": "*bf16", "cols": "*i32", "out": "*bf16", **SIZES},
        {"ROWS": rows.ENTRIES // 4, "K": 4, "BITS": 16, "NAN": 0x7FC0},
        ("weight", "cols", "out"),
        {"num_warps": 4},
    ),
    Case(
        rows._scatter_rows,
        "k4-fp32-to-bf16",
        {"weight": "*bf16", "cols": "*i32", "values": "*fp32", **SIZES, **dict.fromkeys(VALUES_STRIDES, "i32")},
        {"ROWS": rows.ENTRIES // 4, "K": 4},
        ("weight", "cols", "values"),
        {"num_warps": 4},
    ),
]


def jit_functions() -> dict[str, object]:
    found = {}
    for module in pkgutil.iter_modules(device_code.__path__, f"{device_code.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, triton.runtime.JITFunction) and value.__module__ == module.name:
                found[f"{module.name}.{name}"] = value
    return found
