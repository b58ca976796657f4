"""What every benchmark does: fresh processes, two ways in turn, ratios, memory, CMRC's files, tables.

A figure is a ratio of two ways that took turns in one run: the median with the smallest and the largest. What is timed
or weighed is a process of its own. The peers' environment imports this module, too: it needs no package.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
if os.environ.get("PYTHONPATH") != "":  # as in a peer's process, where our evaluate.py would hide another's
    sys.path.insert(0, str(ROOT))
QUERY_LENGTH, PASSAGE_LENGTH = 64, 128  # tokens that CMRC's questions and sentences are cut to
LENGTHS = {"query_max_len": QUERY_LENGTH, "passage_max_len": PASSAGE_LENGTH}
NO_INSTRUCTION = {"query_instruction_for_retrieval": "", "passage_instruction_for_retrieval": ""}
Row = dict[str, Any]
A = TypeVar("A")
B = TypeVar("B")

# ------------------------------------------------------------------------------------------------------- command line

OPTIONS: dict[str, dict[str, Any]] = {
    "data": {"type": Path, "required": True, "help": "CMRC 2018: train.jsonl, test.jsonl, corpus.jsonl"},
    "encoder": {"default": "outputs/encoder", "help": "model folder"},
    "threads": {"type": int, "default": os.cpu_count()},
    "peers-python": {"help": "python of the environment of benchmarks/requirements.txt"},
    "miner": {"default": "outputs/FlagEmbedding-1.2.11", "help": "unpacked source distribution"},
    "bf16": {"action": "store_true"},
    "seed": {"type": int, "default": 42},
    "results": {"type": Path, "default": RESULTS, "help": "where tables and figures go"},
}


def parser(description: str | None, *names: str) -> argparse.ArgumentParser:
    """The script's first lines as help, and the shared options of these names."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names:
        result.add_argument(f"--{name}", **OPTIONS[name])
    return result


def flags(**values: Any) -> list[str]:
    """`--name value` of each; a list stands behind one flag, and None leaves the flag out."""
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


# ---------------------------------------------------------------------------------------------------- fresh processes


@dataclass(frozen=True)
class Run:
    """What a process took, and what it said."""

    seconds: float
    private_mb: float  # the most it held in anonymous pages: no page of a file is among them
    stdout: str


def held_mb(counter: str, pid: int | str = "self") -> float:
    """A counter of /proc/PID/status, MiB: VmRSS what it holds, VmHWM the most it ever held, RssAnon no file's pages."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{counter}:")) / 2**10


@contextmanager
def private_peak(pid: int | str = "self") -> Iterator[list[float]]:
    """[0] becomes the most that a process held in anonymous pages, MiB, in between."""
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        with suppress(OSError, StopIteration):  # the process has ended
            while not ended.wait(0.02):
                peak[0] = max(peak[0], held_mb("RssAnon", pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def run(words: Sequence[object], threads: int | None = None, log: Path | None = None) -> Run:
    """A command in a process of its own, from the root; ends the program if the command fails.

    Args:
        words: the command; its first word is a python. Another than this one is a peer's and does not see this tree.
        threads: OMP_NUM_THREADS.
        log: where stderr is appended; by default it goes where ours goes.
    """
    command = [str(word) for word in words]
    environment = {"TOKENIZERS_PARALLELISM": "true"} | os.environ | {"HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT) if command[0] == sys.executable else ""
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    started = time.perf_counter()
    with open(log or os.devnull, "a", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=errors if log else None
        )
        with private_peak(process.pid) as peak:
            stdout, _ = process.communicate()
    if process.returncode:
        sys.exit(f"error: {shlex.join(command)} ended with {process.returncode}\n{stdout[-4000:]}")
    return Run(time.perf_counter() - started, peak[0], stdout)


def stage(name: str, threads: int | None = None, log: Path | None = None, **values: Any) -> Run:
    """prepare, mine, train, merge or evaluate with these flags."""
    return run([sys.executable, f"{name}.py", *flags(**values)], threads, log)


def fresh(function: Callable[..., Row], threads: int | None = None, python: str = sys.executable, **given: Any) -> Row:
    """What a benchmark's function returns for these arguments (JSON) in a process of its own.

    Where the function gives no `seconds` and `private_mb` of a part of its work, they are the whole process's.
    """
    module = Path(function.__code__.co_filename).stem
    done = run([python, __file__, module, function.__name__, json.dumps(given, default=str)], threads)
    result: Row = {"seconds": done.seconds, "private_mb": done.private_mb} | json.loads(done.stdout.splitlines()[-1])
    print(function.__name__, given, result, file=sys.stderr, flush=True)
    return result


def torchrun(num_processes: int, *words: object, python: str = sys.executable) -> list[object]:
    """The command that starts `words` on so many processes."""
    return [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", num_processes, *words]


# ------------------------------------------------------------------------------------------------- two ways in turn


def in_turn(first: Callable[[int], A], second: Callable[[int], B], pairs: int) -> list[tuple[A, B]]:
    """What both give for the pairs 0, 1, ...; which of them begins changes from pair to pair."""
    results = []
    for pair in range(pairs):
        if pair % 2 == 0:
            one, other = first(pair), second(pair)
        else:
            other = second(pair)
            one = first(pair)
        results.append((one, other))
    return results


def timed(function: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def spread(values: Iterable[float], form: str = ".2f") -> str:
    """Median (smallest-largest)."""
    numbers = list(values)
    return f"{statistics.median(numbers):{form}} ({min(numbers):{form}}-{max(numbers):{form}})"


# ------------------------------------------------------------------------------------------------------------- tables


def machine() -> str:
    """The GPU, or the number and name of the processors."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return f"{os.cpu_count()} x " + next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    return f"{os.cpu_count()} x {platform.machine()}"


def facts(**more: Any) -> Row:
    """What a figure carries: command, machine, torch, date, and `more`, as seed and threads."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {"command": command, "machine": machine(), "torch": installed("torch"), "date": str(date.today())} | more


def note(facts: Row) -> str:
    """The facts as the line below a table."""
    more = [f"{name} {value}" for name, value in facts.items() if name not in ("command", "machine", "date")]
    return "; ".join([f"`{facts['command']}`", facts["machine"], *more, facts["date"]])


def installed(package: str) -> str | None:
    """A package's version."""
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def table(heads: Sequence[object], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """Markdown, the first `left` columns aligned to the left and the others to the right."""
    marks = ["---" if column < left else "---:" for column in range(len(heads))]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [heads, marks, *rows])


def save(name: str, record: Row | None, text: str = "", folder: Path = RESULTS) -> None:
    """<name>.json and, where there is a text, <name>.md, which is printed."""
    folder.mkdir(parents=True, exist_ok=True)
    if record is not None:
        kept = json.dumps(record, indent=2, ensure_ascii=False, default=str)
        (folder / f"{name}.json").write_text(kept + "\n", encoding="utf-8")
    if text:
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
        print(text)


# -------------------------------------------------------------------------------------------------------- CMRC's files


def read_lines(file: str | Path) -> list[Row]:
    """The rows of a jsonl file."""
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_lines(file: str | Path, rows: Iterable[Row]) -> str:
    """A jsonl file; its name."""
    with open(file, "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return str(file)


def read_texts(data: Path) -> list[str]:
    """The sentences of CMRC's corpus."""
    return [row["text"] for row in read_lines(data / "corpus.jsonl")]


def write_training_rows(data: Path, file: Path, num_negatives: int, seed: int = 0) -> str:
    """CMRC's training rows, each with random sentences of the corpus as negatives; the file's name."""
    rng, texts = random.Random(seed), read_texts(data)
    rows = read_lines(data / "train.jsonl")
    return write_lines(file, (row | {"neg": rng.sample(texts, num_negatives)} for row in rows))


def load_miner(source: str | Path) -> Any:
    """hn_mine.py of FlagEmbedding 1.2.11, which left its package later: the module alone, from the unpacked source."""
    file = Path(source) / "FlagEmbedding/baai_general_embedding/finetune/hn_mine.py"
    spec = importlib.util.spec_from_file_location("their_hn_mine", file)
    if spec is None or spec.loader is None or not file.exists():
        sys.exit(f"error: {source}: give the unpacked source distribution of FlagEmbedding 1.2.11")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_bert(folder: str | Path, **settings: Any) -> str:
    """The tests' tiny BERT as a model folder."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_model import make_tiny_bert

    return str(make_tiny_bert(folder, **settings))


if __name__ == "__main__":  # a process that `fresh` has started
    named, called, arguments = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(named), called)(**json.loads(arguments))))
