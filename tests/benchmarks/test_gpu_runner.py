"""The program that benchmarks a GPU, tried on the CPU with toy sizes: what it writes, skips, refuses and survives."""

from __future__ import annotations

import csv
import gc
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gradsel
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import adam, topk
from benchmarks.gpu import workers as working
from benchmarks.harness import bench as comparing
from benchmarks.harness import checks, clock, environment, results, timing
from gradsel.experiments.cost.timing import DeviceLost


@pytest.fixture(scope="module", autouse=True)
def process():
    """What a run changes in its process, and sources that nobody edits in between."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "source_hash", lambda places=(): "sources")
        patch.setattr(checks, "source_hash", lambda places=(): "tests")
        yield
    torch.set_num_threads(threads)
    gc.unfreeze()


def run(path: Path, *arguments: str) -> int:
    return program.main(["--device", "cpu", "--small", "--results", str(path), *arguments], in_process=True)


def lines(path: Path, **wanted: str) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[name] == value for name, value in wanted.items())]


def bench(path: Path, part: str = "topk", seconds: float = 1000.0) -> comparing.Bench:
    cpu = torch.device("cpu")
    found = results.Results(path, environment.environment(cpu, []))
    return comparing.Bench(part, found, cpu, True, time.time() + seconds)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "x.csv"
    assert run(path, "topk", "adam", "first_step", "weight_grad", "plots") == 0
    return path


def test_a_dry_run_writes_every_column_of_every_part(measured):
    assert tuple(lines(measured)[0]) == results.FIELDS
    for part in ("topk", "adam", "first_step", "weight_grad"):
        rows = lines(measured, part=part)
        timed = [row for row in rows if row["p50_ms"]]
        assert timed
        assert not any(results.failed(row) for row in rows)
        for row in timed:
            assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
            assert row["method"] == "wall"
            assert int(row["repeats"]) >= 3
            assert float(row["gb_per_s"]) > 0
            assert float(row["speedup"]) > 0
            assert row["device"]
            assert row["source"] == "sources"
            assert row["command"].startswith("python -m benchmarks.gpu --device cpu")
    refused = [row for row in lines(measured, part="adam") if row["extra"].startswith(results.REFUSED)]
    assert all("graph" in row["provider"] for row in refused)


def test_pictures_and_tables_lie_next_to_the_results(measured):
    for name in ("topk", "adam", "weight_grad"):
        assert measured.with_name(f"gpu-{name}.png").stat().st_size > 10_000
    text = measured.with_suffix(".txt").read_text()
    assert "target 0.8" in text
    assert "target 1.1 of top-K alone" in text
    assert "DENSE_RATE" in text or "the rule" in text
    assert max(map(len, text.splitlines())) < 200


def test_the_operator_alone_does_the_work_of_a_step(tmp_path):
    subject = adam.Subject(bench(tmp_path / "x.csv"), "ViT-B/16", torch.float32, 1)
    for _ in range(3):  # the last ones without the operator
        subject.attached.step()
    call = subject.operator()
    parameters = gradsel.trainable_parameters(subject.attached_model)
    before = [parameter.detach().clone() for parameter in parameters]
    call()
    assert not any(map(torch.equal, parameters, before))


def test_a_second_run_skips_what_is_there(measured, capsys):
    before = measured.read_text()
    assert run(measured, "topk") == 0
    assert "8 cases were in the results already" in capsys.readouterr().out
    assert measured.read_text() == before


def test_other_sources_are_measured_anew(measured, monkeypatch):
    monkeypatch.setattr(environment, "source_hash", lambda places=(): "newer")
    made = bench(measured)
    assert not made.is_done("topk_rows", "37x100", "float32", 1, [topk.BASELINE])


def test_a_failing_provider_is_a_line_and_no_more(tmp_path, monkeypatch, capsys):
    def broken(grad, k, bits):
        if bits:
            raise RuntimeError("does not work\nfor some reason")
        return (grad.abs().topk(k, 1).indices.sort(1).values.to(torch.int32),)

    monkeypatch.setattr(topk, "operator", broken)
    monkeypatch.setattr(topk, "SMALL", [(5, 40)])
    topk.wrong.cache_clear()
    path = tmp_path / "x.csv"
    assert run(path, "topk") == 0
    topk.wrong.cache_clear()
    rows = lines(path, part="topk")
    for row in rows:
        assert results.failed(row) == row["provider"].endswith(topk.BITS) or "reference" in row["extra"]
    assert "error: RuntimeError: does not work" in {row["extra"] for row in rows}
    assert "RuntimeError: does not work" in capsys.readouterr().out


def test_wrong_values_are_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(topk, "operator", lambda grad, k, bits: (torch.zeros(len(grad), k, dtype=torch.int32),))
    monkeypatch.setattr(topk, "SMALL", [(5, 40)])
    topk.wrong.cache_clear()
    path = tmp_path / "x.csv"
    assert run(path, "topk") == 0
    topk.wrong.cache_clear()
    assert all("than the reference's" in row["extra"] for row in lines(path) if row["provider"] in bench(path).backends)


def test_a_backend_that_is_off_is_measured_once_it_is_on(tmp_path):
    path = tmp_path / "x.csv"
    made = bench(path)
    (name,) = made.backends
    call = timing.Call([lambda: torch.ones(9).sum()])
    made._off[name] = "it is Sunday"
    made.compare("sum", "9", "float32", "", {"torch": lambda: call, name: lambda: made.backend(name) and call})
    assert lines(path, provider=name)[0]["extra"] == "error: off: it is Sunday"
    assert made.is_done("sum", "9", "float32", "", ["torch", name])
    made._off[name] = None
    assert not made.is_done("sum", "9", "float32", "", ["torch", name])


def test_red_tests_refuse_speed(tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.csv"
    answers = {"tests/gpu": (0, "3 passed in 1s"), "tests/kernels": (1, "FAILED a\n== 1 failed, 3 passed in 2s ==")}
    ran = []

    def answer(self, command, seconds, environment=None):
        ran.append(command[-1])
        return *answers[command[-1]], 1.0

    monkeypatch.setattr(checks.Checks, "run", answer)
    monkeypatch.setattr(topk, "SMALL", [(5, 40)])
    assert run(path, "tests", "topk") == 1
    assert "refused, the tests are red" in capsys.readouterr().out
    assert not lines(path, part="topk")

    answers["tests/kernels"] = (0, "4 passed in 2s")
    assert run(path, "tests", "topk") == 0
    assert ran == ["tests/gpu", "tests/kernels", "tests/kernels"]  # what was green is not run again
    assert lines(path, part="topk")
    assert run(path, "tests") == 0
    assert len(ran) == 3


def test_red_tests_can_be_overruled(tmp_path, monkeypatch):
    monkeypatch.setattr(checks.Checks, "verdict", lambda self: "red")
    monkeypatch.setattr(topk, "SMALL", [(5, 40)])
    assert run(tmp_path / "x.csv", "topk") == 1
    assert run(tmp_path / "x.csv", "topk", "--anyway") == 0


def test_the_deadline_stops_a_part_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.csv"
    answers = iter([100.0] * 3)
    with monkeypatch.context() as patch:
        patch.setattr(comparing.Bench, "left", lambda self: next(answers, 0.0))
        assert run(path, "topk", "plots", "--minutes", "5") == 1
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    command = command[command.index(sys.executable) :]  # PYTHONPATH may come first
    assert command[1:3] == ["-m", "benchmarks.gpu"]
    assert command[-1] == "topk"
    assert len({row["k"] for row in lines(path, part="topk")}) == 2  # two cases went before
    assert program.parsed(command[3:]).results == path
    assert run(path, *command[3:]) == 0
    assert {row["size"] for row in lines(path, part="topk")} == {"37x100", "64x65"}


def test_parts_are_not_started_without_time(tmp_path, capsys):
    assert run(tmp_path / "x.csv", "topk", "llama", "--minutes", "0") == 1
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[-2:] == ["topk", "llama"]


def test_a_process_that_dies_is_started_again_without_what_killed_it(tmp_path):
    path = tmp_path / "x.csv"
    made = bench(path)
    case = {"part": "topk", "operation": "o", "size": "s", "dtype": "d", "k": "1", "providers": ["cuda"]}
    script = tmp_path / "worker.py"
    script.write_text(
        f"import os, pathlib, signal\n"
        f"if pathlib.Path({str(path)!r}).exists(): raise SystemExit(0)\n"
        f"pathlib.Path({str(comparing.marker(path))!r}).write_text({json.dumps(case)!r})\n"
        f"os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    said: list[str] = []
    code = working.run_worker("topk", [sys.executable, str(script)], made.results, time.time() + 60, said.append)
    assert code == working.DONE
    assert "SIGSEGV" in said[0]
    (row,) = lines(path)
    assert (row["provider"], row["extra"]) == ("cuda", "error: the process ended by SIGSEGV")

    # The next process leaves that provider out, and measures the others of the case.
    made.part = "topk"
    call = timing.Call([lambda: torch.ones(9).sum()])
    made.compare("o", "s", "d", 1, {"torch": lambda: call, "cuda": lambda: pytest.fail("ran again")})
    assert {row["provider"]: bool(row["p50_ms"]) for row in lines(path)} == {"cuda": False, "torch": True}


def test_a_process_that_hangs_is_ended(tmp_path, monkeypatch):
    path = tmp_path / "x.csv"
    made = bench(path)
    case = {"part": "topk", "operation": "o", "size": "s", "dtype": "d", "k": "1", "providers": ["cuda"]}
    script = tmp_path / "worker.py"
    script.write_text(
        f"import pathlib, time\n"
        f"if pathlib.Path({str(path)!r}).exists(): raise SystemExit(0)\n"
        f"pathlib.Path({str(comparing.marker(path))!r}).write_text({json.dumps(case)!r})\n"
        f"time.sleep(100)\n"
    )
    monkeypatch.setattr(working, "HUNG", 0.5)
    command = [sys.executable, str(script)]
    assert working.run_worker("topk", command, made.results, time.time() + 60, lambda text: None) == working.DONE
    assert lines(path)[0]["extra"] == "error: the process ended by taking too long"

    path.unlink()  # out of time is nobody's fault
    monkeypatch.setattr(working, "HUNG", 60.0)
    monkeypatch.setattr(working, "GRACE", 0.0)
    assert working.run_worker("topk", command, made.results, time.time(), lambda text: None) == working.LEFT
    assert not path.exists()


def test_a_lost_device_is_blamed_on_who_lost_it(tmp_path, monkeypatch):
    def lost(self):
        raise DeviceLost("illegal address")

    def broken():
        raise RuntimeError("illegal address")

    made = bench(tmp_path / "x.csv")
    monkeypatch.setattr(clock.Clock, "check", lost)
    call = timing.Call([lambda: torch.ones(9).sum()])
    with pytest.raises(DeviceLost):
        made.compare("o", "s", "d", 1, {"torch": lambda: call, "cuda": lambda: timing.Call([broken])})
    assert [row["provider"] for row in lines(tmp_path / "x.csv")] == ["cuda"]
    monkeypatch.setattr(topk, "measure", lambda bench: lost(None))
    assert working.work(made) == working.LOST


def test_lines_of_other_parts_are_merged(tmp_path):
    path = tmp_path / "x.csv"
    made = working.Lines(bench(path, "llama"))
    row = {"part": "llama", "operation": "training step", "size": "toy", "dtype": "bfloat16", "k": 8}
    row |= {"provider": "PEFT", "method": "LoRA"}
    assert not made.done(row)
    made.emit(row | {"p50_ms": 1.23456789, "peak_bytes": 10**9, "extra": "tokens_per_s=7"})
    assert made.done(row)
    made.emit(row | {"k": 9, "extra": "error: out of time"})
    assert not made.all_measured
    (line,) = lines(path)
    assert (line["provider"], line["p50_ms"], line["extra"]) == ("LoRA (PEFT)", "1.235", "tokens_per_s=7")


def test_other_files_are_not_overwritten(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        bench(path)


def test_a_dry_run_needs_a_file_of_its_own(capsys):
    with pytest.raises(SystemExit):
        program.parsed(["--device", "cpu", "--small"])
    assert "--results" in capsys.readouterr().err


def test_the_program_runs_parts_in_processes(tmp_path):
    path = tmp_path / "x.csv"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--small", "--results", str(path), "topk"]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "python"])}
    ended = subprocess.run(command, cwd=environment.ROOT, env=paths, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert lines(path, part="topk", provider=topk.BASELINE)
    assert not comparing.marker(path).exists()
