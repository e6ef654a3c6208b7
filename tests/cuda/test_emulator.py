"""The emulator that the tests of CUDA kernels rest on: right kernels work in every schedule, wrong ones are noticed."""

from __future__ import annotations

import ctypes
import functools
import signal
import subprocess
import sys

import pytest
import torch

from tests.cuda import build

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

SCHEDULES = [(0, 0), (1, 0), *((2, seed) for seed in range(4))]
ALL = 0xFFFFFFFF
# In the order of toy_kernels.cu, each with what the emulator says.
MISTAKES = {
    "kinds": r"thread 16, toy_kernels.cu:\d+: .*__all_sync.*0xffffffff.* thread 0 .*__any_sync.*0xffffffff.*"
    r"toy_kernels.cu:\d+",
    "masks": "thread 16, .*__syncwarp.*0xffff0000.* thread 0 .*__syncwarp.*0x1ffff",
    "warp and block": "thread 37, .*__syncwarp.* thread 32 .*__syncthreads",
    "barriers": "thread 32, .*__syncthreads_count.* thread 0 .*__syncthreads",
    "sites": r"thread 32, .*__syncthreads\b.* thread 0 .*__syncthreads",
    "exited": "thread 6, .*__syncwarp.*0xffffffff.* lane 0 .*exited",
    "exits": "thread 31: .*end .* thread 0 .*__syncwarp",
    "not caller": r"thread 1, .*__syncwarp.*0x1\b.*caller",
    "source": r"thread 3, .*__shfl_down_sync.* lane 4\b.*0xf\b",
    "width": "thread 0, .*width.* 12",
    "slack": ".*shared memory",
    "overrun": None,  # SIGSEGV
    "misaligned": "thread 1, .*misaligned",
    "shift": "thread 31, .*shift",
    "bounds": "thread 4, .*bounds",
    "division": "thread 0, .*division by zero",
    "conversion": "thread 1, .*float.*integer",
}


@functools.cache
def module():
    return build.build(build.HERE / "toy_kernels.cu", build.HERE / "toy_kernels.h")


@pytest.fixture(params=SCHEDULES, ids=lambda s: f"{('in-order', 'reversed', 'random')[s[0]]}-{s[1]}")
def toys(request):
    module().set_schedule(*request.param)
    yield module()
    module().set_schedule(0)


@pytest.fixture
def plain():
    module().set_schedule(0)
    return module()


def launch(toys, kernel, grid, block, shared, *arguments):
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    toys.launch(kernel, grid, block, shared, values)


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(("grid", "block"), [(1, 32), (3, 256), (7, 1024)])
def test_reduction_over_a_block(toys, grid, block):
    x = torch.randint(-1000, 1000, (2345,), dtype=torch.int32)
    for count in (0, 5, 2345):
        out = ints(1)
        launch(toys, "toy_sum", grid, block, 4 * block, x, count, out)
        assert out.item() == x[:count].sum()


@pytest.mark.parametrize("in_warp", [0, 1])
def test_a_missing_barrier_is_noticed(in_warp):
    x = torch.arange(128, dtype=torch.int32)
    right = x.view(4, 32).flip(1).flatten() if in_warp else x.flip(0)
    for barrier in (1, 0):
        outputs = []
        for schedule in SCHEDULES:
            module().set_schedule(*schedule)
            out = ints(128)
            launch(module(), "toy_reverse", 1, 128, 512, x, out, in_warp, barrier)
            outputs.append(out)
        assert all(torch.equal(out, right) == bool(barrier) for out in outputs)
        assert all(torch.equal(out, outputs[0]) == bool(barrier) for out in outputs[1:])
    module().set_schedule(0)


@pytest.mark.parametrize("mask", [ALL, 1, 0x80000000, 0xFFFF, 0x50F0A3C1])
def test_collectives(toys, mask):
    x = torch.randint(-(2**31), 2**31, (32,), dtype=torch.int64)
    x[x % 3 == 0] = x[0]
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    ours = [int(x[lane]) for lane in lanes]
    unsigned = [v % 2**32 for v in ours]
    common = [
        sum((v & 1) << lane for v, lane in zip(ours, lanes, strict=True)),
        int(x[0] in ours),
        int(x[0] not in ours),
        max(ours),
        min(ours),
        sum(ours),
        max(unsigned),
        min(unsigned),
        sum(unsigned),
    ]
    for offset, width in [(0, 32), (1, 32), (31, 32), (5, 8), (3, 4), (9, 16), (1, 1)] if mask == ALL else [(0, 32)]:
        out, wide = ints(32, 11), torch.zeros(32, 4, dtype=torch.int64)
        launch(toys, "toy_collectives", 1, 32, 0, x.int(), mask, offset, width, out, wide)
        for lane in lanes:
            assert [v % 2**32 for v in out[lane, :9].tolist()] == [v % 2**32 for v in common]
        if mask != ALL:
            continue
        for lane in lanes:
            first = lane // width * width
            source = first + offset % width
            up = lane - offset if lane - offset >= first else lane
            down = lane + offset if lane + offset < first + width else lane
            crossed = lane ^ offset if lane ^ offset < first + width else lane
            assert out[lane, 9:].tolist() == [x[source], x[up]]
            assert [v % 2**64 for v in wide[lane].tolist()] == [
                int(x[of]) % 2**32 << 32 | of for of in (down, crossed, source, up)
            ]


def test_votes_of_a_block(toys):
    for x in (torch.randint(0, 100, (96,), dtype=torch.int32), ints(96)):
        out = ints(96)
        launch(toys, "toy_votes", 1, 96, 0, x, out)
        odd = int((x % 2).sum())
        assert out.tolist() == [2 * odd + (odd > 0)] * 96


@pytest.mark.parametrize("count", [0, 1, 31, 32, 40, 96])
def test_threads_that_leave_early(toys, count):
    out = ints(96)
    launch(toys, "toy_early_exit", 1, 96, 0, count, out)
    expected = [1000 * min(32, count - t // 32 * 32) + count if t < count else 0 for t in range(96)]
    assert out.tolist() == expected


def test_vectors_at_the_edge_of_memory(toys):
    address = toys.guarded(512)
    try:
        x = torch.frombuffer((ctypes.c_char * 512).from_address(address), dtype=torch.int32)
        x.copy_(torch.arange(128))
        out = ints(128)
        launch(toys, "toy_vectors", 1, 32, 0, address, out)
        assert torch.equal(out.view(32, 4), x.view(32, 4)[:, [3, 2, 1, 0]])
    finally:
        toys.release(address)


def test_atomics(toys):
    out, wide = ints(10), torch.zeros(1, dtype=torch.int64)
    out[2] = 0xFFFF
    launch(toys, "toy_atomics", 3, 64, 4, out, wide)
    n = 192
    last = out[7].item()
    assert 1 <= last <= n
    assert out.tolist() == [n * (n - 1) // 2, 255, 0xFF00, n - 1, 1 - n, 1, 1, last, last, n]
    assert wide.item() == n << 32


def test_schedules_reach_every_block_once():
    seen = {}
    for schedule in [*SCHEDULES, SCHEDULES[-1]]:
        module().set_schedule(*schedule)
        order, threads, counts = ints(12), ints(64), ints(2)
        launch(module(), "toy_blocks", 12, 64, 0, order, threads, counts)
        assert sorted(order.tolist()) == list(range(12))
        assert sorted(threads.tolist()) == list(range(64))
        result = order.tolist(), threads.tolist()
        assert seen.setdefault(schedule, result) == result  # a seed says it all
    module().set_schedule(0)
    assert seen[0, 0] == (list(range(12)), list(range(64)))
    assert seen[1, 0] == (list(range(12))[::-1], list(range(64))[::-1])
    assert len({str(result) for result in seen.values()}) == len(SCHEDULES)


def test_many_rendezvous(toys):
    launch(toys, "toy_rendezvous", 2, 1024, 0, 50, 0)
    launch(toys, "toy_rendezvous", 2, 1024, 0, 50, 1)


def test_structs_by_value(plain):
    out = torch.zeros(1, dtype=torch.int64)
    for a, b in ((5, -7), (-(2**40), 3)):
        launch(plain, "toy_struct", 1, 32, 0, out, a, b % 2**32)
        assert out.item() == min(a, b)


@pytest.mark.parametrize("mistake", [name for name, error in MISTAKES.items() if error])
def test_what_is_undefined_is_an_error(plain, mistake):
    out = ints(64)
    number = list(MISTAKES).index(mistake)
    with pytest.raises(RuntimeError, match="^kernel toy_undefined, block 0(, |: )" + MISTAKES[mistake]):
        launch(plain, "toy_undefined", 2, 64, 17, number, out)
    launch(plain, "toy_undefined", 2, 64, 17, len(MISTAKES), out)  # and the next launch is not the worse for it


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m not in ("slack", "overrun")])
@pytest.mark.parametrize("schedule", SCHEDULES[1:], ids=str)
def test_what_is_undefined_is_an_error_in_every_schedule(mistake, schedule):
    module().set_schedule(*schedule)
    with pytest.raises(RuntimeError, match="kernel toy_undefined"):
        launch(module(), "toy_undefined", 1, 64, 17, list(MISTAKES).index(mistake), ints(64))
    module().set_schedule(0)


@pytest.mark.parametrize("where", ["overrun", "before", "behind"])
def test_access_out_of_bounds_is_a_fault(where, plain):
    calls = {
        "overrun": f"m.launch('toy_undefined', 1, 32, 32, [{list(MISTAKES).index('overrun')}, m.guarded(128)])",
        "before": "m.launch('toy_struct', 1, 32, 0, [m.guarded(4096) - 8, 0, 0])",
        "behind": "m.launch('toy_struct', 1, 32, 0, [m.guarded(4096) + 4096, 0, 0])",
    }
    code = f"from tests.cuda import test_emulator as t; m = t.module(); print('loaded', flush=True); {calls[where]}"
    run = subprocess.run([sys.executable, "-c", code], cwd=build.ROOT, capture_output=True, text=True, check=False)
    assert run.stdout == "loaded\n", run.stderr
    assert run.returncode == -signal.SIGSEGV, run.stderr


@pytest.mark.parametrize(
    ("kernel", "grid", "block", "shared", "error"),
    [
        ("toy_nothing", 1, 32, 0, "toy_nothing"),
        ("toy_struct", 0, 32, 0, "toy_struct.* 0 blocks"),
        ("toy_struct", 2**31, 32, 0, " 2147483648 blocks"),
        ("toy_struct", 1, 0, 0, " 0 threads"),
        ("toy_struct", 1, 33, 0, " 33 threads"),
        ("toy_struct", 1, 1056, 0, " 1056 threads"),
        ("toy_struct", 1, 32, 227 * 1024 + 1, "232449 bytes.*227 KiB"),
    ],
)
def test_launches_that_a_gpu_refuses(plain, kernel, grid, block, shared, error):
    with pytest.raises(RuntimeError, match=error):
        launch(plain, kernel, grid, block, shared, torch.zeros(1, dtype=torch.int64), 0, 0)


def test_memory_is_released_once(plain):
    address = plain.guarded(1000)
    plain.release(address)
    with pytest.raises(RuntimeError, match="guarded"):
        plain.release(address)


def test_a_module_is_built_once(plain):
    paths = [build.build(build.HERE / "toy_kernels.cu", build.HERE / "toy_kernels.h").__file__ for _ in range(2)]
    assert paths[0] == paths[1] == plain.__file__
