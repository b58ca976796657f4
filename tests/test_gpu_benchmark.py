"""benchmarks/gpu.py without a GPU: its cases run, uncaptured, and one that fails is written down before the next one."""

import json
import sys
from pathlib import Path
from typing import Any

import gpu
import pytest
from harness import Row

CASES = ["train | group 2 | eager", "train | group 2 | graphs, copy", "repeat | deterministic", "encode | graphs 8192"]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    gpu.main()


@pytest.mark.parametrize("only", [*CASES, pytest.param("", marks=pytest.mark.slow)])
def test_the_cases_run(only: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--cpu", "--only", only)
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if "Error" in line or "Unsupported" in line]
    assert not failed and any(line.startswith(only or "gradient") for line in lines)
    if only.startswith("repeat"):
        assert f"{only}: bitwise equal, two runs: yes; resumed: yes" in lines


def test_after_a_failure_a_fresh_process_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As on a GPU: the file of results has every case, and verdicts come of what was measured."""
    called: list[str] = []

    def train(name: str, seconds: float) -> tuple[str, Any]:
        def case() -> Row:
            called.append(name)
            if not seconds:
                raise RuntimeError("CUDA error: illegal memory access\nmore")
            return {"seconds": seconds, "first_seconds": 1.0, "tflops": 10 / seconds}

        return f"train | group 2 | {name}", case

    cases = [train("before", 0.1), train("eager", 0.0), train("graphs, copy", 0.025)]
    monkeypatch.setattr(gpu, "Bench", lambda cpu: type("Bench", (), {"cuda": True, "clean": lambda self: None})())
    monkeypatch.setattr(gpu, "peak_of", lambda bench: 1000.0)
    monkeypatch.setattr(gpu, "all_cases", lambda bench: iter(cases))

    def execute(program: str, words: list[str]) -> None:
        raise SystemExit(" ".join(words[2:]))

    monkeypatch.setattr(gpu.os, "execv", execute)
    with pytest.raises(SystemExit, match=f"--results {tmp_path} --resume"):
        run(monkeypatch, "--results", str(tmp_path))
    run(monkeypatch, "--results", str(tmp_path), "--resume")
    assert called == ["before", "eager", "graphs, copy"]
    kept = json.loads((tmp_path / "gpu_ways.json").read_text(encoding="utf-8"))["cases"]
    assert kept["train | group 2 | eager"]["failed"] == "RuntimeError: CUDA error: illegal memory access"
    told = capsys.readouterr().out
    assert "group 2: graphs, copy takes 0.25 of the time before (at most 0.3): yes" in told
    assert "group 2: 0.40 of peak (at least 0.35): yes" in told and "GradCache: not measured" in told
