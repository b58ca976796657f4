"""The launch files: several nodes rehearsed on this machine, FSDP2 by accelerate launch, Slurm's script against stubs."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import runs
import torch
import yaml
from conftest import ROOT

FILES = ROOT / "configs" / "accelerate"
ACCELERATE = str(Path(sys.executable).with_name("accelerate"))
SETTINGS = {"max_steps": 3, "negatives_cross_device": True, "adam_epsilon": 1e-3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 30)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_together(commands: Sequence[Sequence[str]], folder: Path) -> str:
    """Run commands at the same time, until all have ended well; what the first said on stderr."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    logs = [folder / f"said.{i}" for i in range(len(commands))]
    jobs = []
    for command, log in zip(commands, logs, strict=True):
        with open(log, "wb") as file:
            jobs.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [job.wait(timeout=150) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    said = [log.read_text(encoding="utf-8") for log in logs]
    assert codes == [0] * len(jobs), "\n".join(said)
    return said[0]


@pytest.mark.parametrize("launcher", ["accelerate", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_nodes_rehearsed_on_one_machine(launcher: str, tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """Two launchers of one process each, one rendezvous: bitwise what one launcher with two processes trains."""
    words = ["train.py", *runs.flags(tiny_bert, data, tmp_path / "nodes", **SETTINGS)]
    port, commands = free_port(), []
    for node in ("0", "1"):
        if launcher == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
            command += ["--node_rank", node, "--master_addr", "127.0.0.1", "--master_port", port]
        else:
            command = [ACCELERATE, "launch", "--config_file", str(FILES / "two_nodes_8gpu.yaml")]
            command += ["--num_processes", "2", "--machine_rank", node]
            command += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
        commands.append([*command, *words])
    said = run_together(commands, tmp_path)
    assert "processes:              2\n" in said and f"model: {tmp_path / 'nodes'}\n" in said

    alone = runs.start_two(runs.flags(tiny_bert, data, tmp_path / "alone", **SETTINGS), tmp_path / "log")
    assert runs.finish(alone) == [0, 0]
    assert runs.equal_weights(tmp_path / "nodes", tmp_path / "alone")
    assert runs.read_steps(tmp_path / "nodes") == runs.read_steps(tmp_path / "alone")


@pytest.mark.slow  # the start of three Pythons for what test_fsdp.py shows without them: the file's words arrive
def test_accelerate_launch_with_the_fsdp2_file(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    command = [ACCELERATE, "launch", "--config_file", str(FILES / "fsdp2.yaml"), "--num_processes", "2"]
    command += ["--main_process_port", free_port(), "train.py"]
    run_together([[*command, *runs.flags(tiny_bert, data, tmp_path / "run", **SETTINGS)]], tmp_path)
    facts = runs.manifest(tmp_path / "run")["facts"]
    assert (facts["processes"], facts["sharding"]) == (2, "FSDP2")
    assert all(torch.isfinite(weight).all() for weight in runs.weights(tmp_path / "run").values())


@pytest.mark.parametrize("file", sorted(FILES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_launch_file_says_how_it_is_used(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert f"--config_file configs/accelerate/{file.name}" in text and "train.py" in text
    settings = yaml.safe_load(text)
    assert settings["num_processes"] >= settings["num_machines"]
    assert "mixed_precision" not in settings


# --- Slurm ------------------------------------------------------------------------------------------------------------

# What Slurm does, as far as the script sees it: scancel reaches the task, and not what the task has started. The launcher
# is a shell, which does not pass a signal on. Its worker stands for train.py: a handler that saves and exits with 75,
# which the launcher turns into 1.
STUBS = {
    "srun": 'while [ "$1" != bash ]; do shift; done; echo $$ > step.pid; exec "$@"',
    "scancel": 'echo "$@" >> calls; kill -s USR1 "$(cat step.pid)"',
    "scontrol": 'if [ "$1" = show ]; then echo node-a; else echo "$@" >> calls; fi',
    "accelerate": """echo "$@" > launched
{python} -S -c '
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: (time.sleep(0.3), open("saved", "w").close(), os._exit(75)))
open("ready", "w").close()
time.sleep(20 if "{told}" else 0)
sys.exit({code})' || exit 1""",
}


@pytest.mark.parametrize(
    "told, code, requeued", [(True, 0, True), (False, 0, False), (False, 3, False)], ids=["told", "done", "failed"]
)
def test_slurm_sends_the_job_again_only_if_its_time_was_up(
    told: bool, code: int, requeued: bool, tmp_path: Path
) -> None:
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name, text in STUBS.items():
        for key, value in {"python": sys.executable, "told": "yes" if told else "", "code": str(code)}.items():
            text = text.replace(f"{{{key}}}", value)
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "node-a", "SLURM_JOB_ID": "4711"}
    slurm |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "GPUS_PER_NODE": "2"}
    command = ["bash", str(FILES / "slurm.sh"), "--output_dir", "out"]
    job = subprocess.Popen(command, env=os.environ | slurm, stderr=subprocess.PIPE, text=True)
    if told:
        while not (tmp_path / "ready").exists():
            assert job.poll() is None
        job.send_signal(10)  # SIGUSR1, as --signal=B:USR1@120 does
    said = job.communicate(timeout=60)[1]
    calls = (tmp_path / "calls").read_text(encoding="utf-8") if (tmp_path / "calls").exists() else ""
    assert ("requeue 4711\n" in calls, (tmp_path / "saved").exists()) == (requeued, requeued), said
    assert job.returncode == (1 if told or code else 0)
    launched = (tmp_path / "launched").read_text(encoding="utf-8")
    assert "--num_processes 2" in launched and "train.py --resume_from_checkpoint latest --output_dir out" in launched
    options = re.findall(r"^#SBATCH (\S+)$", (FILES / "slurm.sh").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"--requeue", "--signal=B:USR1@120", "--open-mode=append"} <= set(options)
