"""The parity matrix: every combination of processes, chunks, path, loss, accumulation, negatives and precision.

Every cell is one real optimizer step (`forward_backward`) of a two-layer BERT with dropout 0 on the same global batch.
Its loss and every parameter's gradient are compared, on every rank, with the float64 truth of tests/reference.py, which
knows nothing of ranks, chunks or blocks. Some cells beyond the product follow (EXTRAS).

    python tests/matrix.py                             all cells, the worst of each number of processes
    python tests/matrix.py --worlds 2 1 --dtypes float64 --stop_at_first       what tests/training/test_mutations.py runs

This process imports everything once and forks: one process for the truth, then W processes for each W, which share one
gloo group (W = 1 has none) and run all its cells. A wrong number is noted and the next cell follows; an exception ends
this W, because the other ranks would wait in vain, and is reported for the cell.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from batches import (
    EXAMPLES,
    MODES,
    Gradients,
    TextRow,
    gradient_error,
    gradients_of,
    load,
    make_rows,
    rank_batch,
    tokens_of,
)
from batches import true_gradients as slow_gradients
from tiny_model import add_dense, make_tiny_bert
from transformers.utils import logging as transformers_logging

import bge_core
from bge_core.encoder.fixed import FixedRow, FixedRows
from bge_core.encoder.model import Encoder
from bge_core.encoder.tokens import Tokens
from bge_core.loss import LossConfig
from bge_core.runtime.distributed import unwrap, wrap
from bge_core.training.batch import Batch
from bge_core.training.build import load_loss
from bge_core.training.step import StepSettings, forward_backward, loss_input

ROOT = Path(__file__).resolve().parent.parent
WORLDS = (1, 2, 4)
CHUNKS = (None, 1, 3, 8)
PATHS = ("dense", "blockwise")
FIXED = "rows of fixed shape"  # as on a GPU: encoder/fixed.py; the loss is computed densely
LOSSES = ("info_nce", "no_in_batch", "kl_div", "m3_kd_loss", "mrl", "siglip", "gte", "gist")
FEW = ("margin_mse", "spread_out")  # losses with few cells, as they are made of what the others use
ACCUMULATION = (1, 2)
# Group sizes (a positive and its negatives) of a micro-batch of 4 rows and, where two are accumulated, one of 3: with
# 4 processes rank 3 then has no row. Rows go to ranks in order, so the last of two ranks has no negatives at all.
NEGATIVES = {
    "equal": ((2, 2, 2, 2), (2, 2, 2)),
    "uneven": ((3, 1, 2, 2), (1, 3, 1)),
    "rank_without": ((2, 2, 1, 1), (2, 1, 1)),
}
SHORT = [text for text in range(6000) if len(tokens_of(text)) in (4, 5)]  # short, and still padded together
DTYPES = {"float64": torch.float64, "float32": torch.float32}
BOUNDS = {"float64": 1e-9, "float32": 1e-5}
# Rows at a time: fewer than a rank has, with a partial last block where it has enough of them.
BLOCK_SIZES = {1: 3, 2: 1, 4: 1}

# No combination is left out; this one is run as the trainer would.
NOTES = {
    "no_in_batch": "its candidates are the query's own passages, which are on its rank; --negatives_cross_device is "
    "refused with it (config.py), so with several processes it runs without",
}
TIMEOUT = timedelta(seconds=90)
Result = tuple[float, float, str] | str
"""Relative error of the loss, of the gradient (share of the whole norm), where it is largest; or a traceback."""


@dataclass(frozen=True)
class Cell:
    """One combination. `chunk`: texts at a time with GradCache, None without; `path`: of PATHS, or FIXED."""

    world_size: int
    chunk: int | None
    path: str
    loss: str
    accumulation: int
    negatives: str
    dtype: str

    def __str__(self) -> str:
        chunk = "whole" if self.chunk is None else f"chunks of {self.chunk}"
        return (
            f"{self.world_size} processes, {chunk}, {self.path}, {self.loss}, "
            f"accumulation {self.accumulation}, {self.negatives}, {self.dtype}"
        )

    @property
    def bound(self) -> float:
        """Largest relative error of the loss and of the gradient."""
        return BOUNDS[self.dtype]


CELLS = [
    cell
    for values in product(WORLDS, CHUNKS, PATHS, LOSSES, ACCUMULATION, NEGATIVES, DTYPES)
    # Accumulating two micro-batches contains one of them, and float32 does not depend on the number of processes: what is
    # dear (4 processes) or shows less (float32, whose bound is wide) has the larger case alone.
    if (cell := Cell(*values)).accumulation == 2 or (cell.dtype == "float64" and cell.world_size < 4)
    if (cell.world_size, cell.dtype) != (4, "float32")
]
# What a row of fixed shape changes ends with the vectors, before any loss and precision: they have the largest case alone.
CELLS += [
    cell
    for values in product(WORLDS, (None, 3), (FIXED,), LOSSES, ACCUMULATION, NEGATIVES, DTYPES)
    if (cell := Cell(*values)).accumulation == 2 or cell.world_size < 4
    if (cell.loss, cell.dtype) == ("info_nce", "float64") or (cell.accumulation, cell.negatives) == (2, "uneven")
    if cell.dtype == "float64" or (cell.loss == "info_nce" and cell.world_size < 4)
    if cell.loss == "info_nce" or cell.chunk or cell.world_size == 2
]
CELLS += [
    Cell(*values)
    for values in product(WORLDS, (3,), ("blockwise",), FEW, (2,), ("uneven", "rank_without"), ("float64",))
]


def global_batch(negatives: str, accumulation: int) -> tuple[tuple[TextRow, ...], ...]:
    """The rows of each micro-batch, of all ranks: the same for every number of processes."""
    return tuple(make_rows(seed, sizes, SHORT) for seed, sizes in enumerate(NEGATIVES[negatives][:accumulation]))


def rows_of(rank: int, world_size: int, rows: Sequence[TextRow]) -> Sequence[TextRow]:
    """This rank's rows, in order; the last ranks may have fewer or none."""
    share = -(-len(rows) // world_size)
    return rows[rank * share : (rank + 1) * share]


def chunks_of(batch: Batch, chunk: int | None, *, distinct: bool) -> list[FixedRow]:
    """The texts as rows of fixed shape, as the data worker makes them."""
    rows = FixedRows("", first_position=0, pad_id=0, distinct=distinct)
    return [rows.row(part) for part in batch.tokens.split(chunk)]


# --- one rank ---------------------------------------------------------------------------------------------------------


class Rank:
    """What one process has loaded, and how it computes a cell."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.models = {name: wrap(load(folder / "model", dtype)) for name, dtype in DTYPES.items()}
        self.guides = {name: load(folder / "guide", dtype).eval() for name, dtype in DTYPES.items()}
        self.truth = torch.load(folder / "truth.pt", weights_only=True)
        self.examples = {name: load_loss(f"{ROOT}/examples/losses/{name}.py:{name}_loss") for name in EXAMPLES}

    def batches(
        self, micro_batches: Sequence[Sequence[TextRow]], loss: str, *, fixed: bool = False, chunk: int | None = None
    ) -> list[Batch]:
        """This rank's micro-batches, with `fixed` their chunks, too; the guide's tokens are those of the encoder."""
        teacher = "distillation" in MODES.get(loss, {}) or loss == "margin_mse"
        dealt = [[rows_of(rank, self.world_size, rows) for rank in range(self.world_size)] for rows in micro_batches]
        batches = [rank_batch(of_ranks[self.rank], of_ranks, teacher=teacher) for of_ranks in dealt]
        if fixed:
            batches = [replace(batch, chunks=chunks_of(batch, chunk, distinct=True)) for batch in batches]
        if loss != "gist":
            return batches
        return [replace(batch, guide_tokens=batch.tokens, guide_chunks=batch.chunks) for batch in batches]

    def settings(self, loss: str, dtype: str, chunk: int | None, block_size: int, **options: Any) -> StepSettings:
        """The step's settings; passages are shared between ranks wherever other rows' passages are candidates."""
        temperature = {"temperature": options.pop("temperature")} if "temperature" in options else {}
        config = LossConfig(**MODES.get(loss, {}), args=EXAMPLES.get(loss, {}), block_size=block_size, **temperature)
        if loss in EXAMPLES:
            options["loss"] = self.examples[loss]
        if loss == "gist":
            options["guide"] = self.guides[dtype]
        return StepSettings(loss_config=config, cross_device=loss != "no_in_batch", chunk_size=chunk, **options)

    def errors(self, loss: torch.Tensor, encoder: Encoder, want: tuple[float, Gradients]) -> Result:
        """Errors of this rank's share of the loss, summed over ranks, and of the gradient that this rank now has."""
        total = loss.double()
        if self.world_size > 1:
            dist.all_reduce(total)
        error, where = gradient_error(gradients_of(encoder), want[1])
        return abs(total.item() - want[0]) / abs(want[0]), error, where

    def compute(self, cell: Cell) -> Result:
        """One optimizer step against the truth."""
        micro_batches, fixed = global_batch(cell.negatives, cell.accumulation), cell.path == FIXED
        batches = self.batches(micro_batches, cell.loss, fixed=fixed, chunk=cell.chunk)
        block_size = BLOCK_SIZES[cell.world_size] if cell.path == "blockwise" else 0
        settings = self.settings(cell.loss, cell.dtype, cell.chunk, block_size)
        shares = forward_backward(self.models[cell.dtype], batches, settings)
        want = self.truth[cell.loss, cell.negatives, cell.accumulation]
        return self.errors(shares["loss"], unwrap(self.models[cell.dtype]), want)


# --- cells beyond the product -----------------------------------------------------------------------------------------

MANY = (3, 2, 1, 4, 2, 1, 3, 2, 2, 1, 2)  # 11 rows: 6 + 5 on two ranks, 3 + 3 + 3 + 2 on four


@dataclass(frozen=True)
class Extra:
    """A cell of its own: `compute(rank)` gives its errors."""

    world_size: int
    name: str
    bound: float
    compute: Callable[[Rank], Result]

    def __str__(self) -> str:
        return f"{self.world_size} processes, {self.name}"


def many_blocks(loss: str, chunk: int | None, rank: Rank) -> Result:
    """Several blocks on every rank, the last of them partial."""
    batches = rank.batches([make_rows(7, MANY)], loss)
    settings = rank.settings(loss, "float64", chunk, 2 if rank.world_size == 4 else 3)
    shares = forward_backward(rank.models["float64"], batches, settings)
    return rank.errors(shares["loss"], unwrap(rank.models["float64"]), rank.truth[loss, "many", 1])


def dropout(loss: str, chunk: int, fixed: bool, rank: Rank) -> Result:
    """GradCache with dropout against the same chunks with all graphs kept, from the same random state."""
    encoder = load(rank.folder / "dropout", torch.float64)
    batches = rank.batches(global_batch("uneven", 2), loss)
    if fixed:
        batches = [replace(batch, chunks=chunks_of(batch, chunk, distinct=False)) for batch in batches]
    settings = rank.settings(loss, "float64", chunk, 0)
    torch.manual_seed(7 + rank.rank)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        texts = batch.tokens.texts()
        parts = [texts[i : i + chunk] for i in range(0, len(texts), chunk)] or [[]]
        chunks = batch.chunks or [Tokens.from_lists([text.tolist() for text in part]) for part in parts]
        vector_SD = torch.cat([encoder(part) for part in chunks])
        mean = settings.loss(loss_input(vector_SD, batch, settings.cross_device), settings.loss_config).loss
        share = batch.num_queries / sum(batch.num_global_rows for batch in batches)
        (mean * share).backward()
        total += mean.detach() * share if batch.num_queries else 0.0
    want = gradients_of(encoder)
    if rank.world_size > 1:
        for value in (total, *want.values()):
            dist.all_reduce(value)
    torch.manual_seed(7 + rank.rank)
    shares = forward_backward(wrap(encoder), batches, settings)
    return rank.errors(shares["loss"], encoder, (total.item(), want))


def checkpointing(chunk: int | None, rank: Rank) -> Result:
    """Gradient checkpointing (non-reentrant) changes nothing."""
    encoder = load(rank.folder / "model", torch.float64)
    encoder.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    settings = rank.settings("info_nce", "float64", chunk, 0)
    shares = forward_backward(wrap(encoder), rank.batches(global_batch("uneven", 2), "info_nce"), settings)
    return rank.errors(shares["loss"], encoder, rank.truth["info_nce", "uneven", 2])


def behind_pooling(chunk: int | None, attention: str, fixed: bool, rank: Rank) -> Result:
    """Dense modules learn, too."""
    encoder = load(rank.folder / "dense", torch.float64, attention=attention)
    settings = rank.settings("info_nce", "float64", chunk, 0)
    batches = rank.batches(global_batch("uneven", 2), "info_nce", fixed=fixed, chunk=chunk)
    shares = forward_backward(wrap(encoder), batches, settings)
    return rank.errors(shares["loss"], encoder, rank.truth["info_nce", "dense modules", 2])


def bfloat16(chunk: int | None, fixed: bool, rank: Rank) -> Result:
    """Autocast to bfloat16, whose numbers have a relative error of up to 2^-9 each."""
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    settings = rank.settings("info_nce", "float32", chunk, 0, autocast=autocast, temperature=1.0)
    model = rank.models["float32"]
    batches = rank.batches(global_batch("uneven", 2), "info_nce", fixed=fixed, chunk=chunk)
    shares = forward_backward(model, batches, settings)
    return rank.errors(shares["loss"], unwrap(model), rank.truth["info_nce", "temperature 1", 2])


def loss_scaling(chunk: int | None, fixed: bool, rank: Rank) -> Result:
    """A real gradient scaler, as fp16 has: what it unscales is the gradient."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    settings = rank.settings("info_nce", "float32", chunk, 0, scaler=scaler)
    model = rank.models["float32"]
    batches = rank.batches(global_batch("uneven", 2), "info_nce", fixed=fixed, chunk=chunk)
    shares = forward_backward(model, batches, settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scaler.unscale_(torch.optim.SGD(trained, lr=0.0))
    return rank.errors(shares["loss"], unwrap(model), rank.truth["info_nce", "uneven", 2])


def extras() -> Iterator[Extra]:
    """All of them, for every number of processes; rows of fixed shape for two."""
    for W in WORLDS:
        ways = (False, True) if W == 2 else (False,)
        for loss, chunk in product((*LOSSES, *FEW), (None, 3)):
            yield Extra(W, f"many blocks, {loss}, chunk {chunk}", BOUNDS["float64"], partial(many_blocks, loss, chunk))
        for loss, chunk, fixed in product(("info_nce", "gte"), (1, 3, 8), ways):
            name = f"dropout, {loss}, chunk {chunk}{_of_rows(fixed)}"
            if not fixed or loss == "info_nce":
                yield Extra(W, name, BOUNDS["float64"], partial(dropout, loss, chunk, fixed))
        for chunk in (None, 3):
            yield Extra(W, f"checkpointing, chunk {chunk}", BOUNDS["float64"], partial(checkpointing, chunk))
            for attention, fixed in (("padded", False), *(("auto", fixed) for fixed in ways)):
                name = f"dense modules, {attention}, chunk {chunk}{_of_rows(fixed)}"
                yield Extra(W, name, BOUNDS["float64"], partial(behind_pooling, chunk, attention, fixed))
            for fixed in ways:
                name = f"loss scaling, chunk {chunk}{_of_rows(fixed)}"
                yield Extra(W, name, BOUNDS["float32"], partial(loss_scaling, chunk, fixed))
                # Two layers are about 20 roundings in a row, forward and back, of 2^-9 each: 20 * 2^-9 = 4 %, at
                # temperature 1 (0.02 would magnify an error of the cosine 50 times).
                yield Extra(W, f"bfloat16, chunk {chunk}{_of_rows(fixed)}", 4e-2, partial(bfloat16, chunk, fixed))


def _of_rows(fixed: bool) -> str:
    return f", {FIXED}" * fixed


EXTRAS = list(extras())


# --- all processes ----------------------------------------------------------------------------------------------------


def quiet() -> None:
    """One thread, and no progress bar for each model that is loaded."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def make_inputs(_: int, folder: Path) -> None:
    """The models, and loss and gradient of every global batch: once for all cells."""
    quiet()
    make_tiny_bert(folder / "model")
    make_tiny_bert(folder / "guide", seed=1)
    make_tiny_bert(folder / "dropout", dropout=0.1)
    add_dense(make_tiny_bert(folder / "dense"))
    truth = {}
    needed = dict.fromkeys((cell.loss, cell.negatives, cell.accumulation) for cell in CELLS)
    for loss in (*LOSSES, *FEW):
        guide = folder / "guide" if loss == "gist" else None
        for key in (key for key in needed if key[0] == loss):
            truth[key] = slow_gradients(folder / "model", global_batch(*key[1:]), loss, guide_folder=guide)
        truth[loss, "many", 1] = slow_gradients(folder / "model", [make_rows(7, MANY)], loss, guide_folder=guide)
    truth["info_nce", "temperature 1", 2] = slow_gradients(
        folder / "model", global_batch("uneven", 2), "info_nce", temperature=1.0
    )
    truth["info_nce", "dense modules", 2] = slow_gradients(folder / "dense", global_batch("uneven", 2), "info_nce")
    torch.save(truth, folder / "truth.pt")


def run_rank(
    rank: int, world_size: int, inputs: Path, folder: Path, cells: Sequence[Cell | Extra], stop_at_first: bool
) -> None:
    """All cells of one rank; results go to a file in `folder`, so that an end in mid-run keeps those before."""
    quiet()
    results: dict[str, Result] = {}
    here = None
    try:
        if world_size > 1:
            rendezvous = f"file://{folder}/rendezvous{world_size}"
            dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=TIMEOUT)
        this = Rank(inputs, rank, world_size)
        for cell in cells:
            here = cell
            results[str(cell)] = result = cell.compute(this) if isinstance(cell, Extra) else this.compute(cell)
            wrong = torch.tensor(float(not max(result[:2]) <= cell.bound))
            if stop_at_first and world_size > 1:
                dist.all_reduce(wrong)
            if stop_at_first and wrong > 0:
                break
    except Exception:
        results[str(here)] = traceback.format_exc()
    torch.save(results, folder / f"results.{world_size}.{rank}")


def worst(results: Sequence[Result]) -> Result:
    """Of several ranks' results of one cell: a traceback, else the largest errors."""
    failures = [result for result in results if isinstance(result, str)]
    if failures:
        return "\n".join(failures)
    gradient, where = max((result[1], result[2]) for result in results)
    return max(result[0] for result in results), gradient, where


def run(
    inputs: Path, worlds: Sequence[int] = WORLDS, dtypes: Sequence[str] = tuple(DTYPES), stop_at_first: bool = False
) -> tuple[dict[str, Result], dict[str, float]]:
    """Run the cells of these numbers of processes and precisions, and all extras.

    Args:
        inputs: folder of the models and the truth; made unless it is there.
        worlds, dtypes, stop_at_first: which cells, and how far.

    Returns:
        cell -> its worst result over the ranks, and the seconds of the truth and of each number of processes. With
        `stop_at_first` cells come in a mixed, fixed order and end with the first whose error is above its bound.
    """
    found: dict[str, Result] = {}
    seconds: dict[str, float] = {}

    def fork(name: str, function: Callable[..., None], *arguments: Any, num_processes: int = 1) -> None:
        start = time.perf_counter()
        torch.multiprocessing.start_processes(function, arguments, num_processes, start_method="fork")
        seconds[name] = time.perf_counter() - start

    with tempfile.TemporaryDirectory(prefix="matrix_") as name:
        folder = Path(name)
        if not inputs.exists():
            fork("truth", make_inputs, folder)
            inputs.mkdir(parents=True)
            for made in ("model", "guide", "dropout", "dense", "truth.pt"):
                shutil.move(folder / made, inputs / made)
        for W in worlds:
            cells = [cell for cell in CELLS if cell.world_size == W and cell.dtype in dtypes]
            cells += [extra for extra in EXTRAS if extra.world_size == W]
            if stop_at_first:
                random.Random(0).shuffle(cells)
            fork(f"W = {W}", run_rank, W, inputs, folder, cells, stop_at_first, num_processes=W)
            ranks = [torch.load(folder / f"results.{W}.{rank}", weights_only=True) for rank in range(W)]
            for key in dict.fromkeys(key for rank in ranks for key in rank):
                found[key] = worst([rank[key] for rank in ranks if key in rank])
            if stop_at_first and any(problem(cell, found) for cell in cells if str(cell) in found):
                break
    return found, seconds


def problem(cell: Cell | Extra, results: dict[str, Result]) -> str | None:
    """What is wrong with a cell, in a line that names it; None where nothing is."""
    result = results.get(str(cell))
    if result is None:
        return f"{cell}: was not run, because another cell ended its processes"
    if isinstance(result, str):
        return f"{cell}: {result}"
    loss_error, gradient_error, where = result
    if max(loss_error, gradient_error) <= cell.bound:
        return None
    return (
        f"{cell}: loss off by {loss_error:.1e}, gradient of {where} off by {gradient_error:.1e} of the whole gradient's "
        f"norm (bound {cell.bound:.0e})"
    )


def main() -> int:
    """Run from the shell; see the top of the file. The exit code is 1 where a cell fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", choices=WORLDS, default=WORLDS)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--stop_at_first", action="store_true")
    parser.add_argument("--inputs", type=Path, help="folder of the models and the truth, to be used again")
    parser.add_argument("--output", help="file for (results, seconds)")
    arguments = parser.parse_args()
    quiet()
    print(f"bge_core: {Path(bge_core.__file__).parent}")
    with tempfile.TemporaryDirectory(prefix="matrix_") as name:
        inputs = arguments.inputs or Path(name) / "inputs"
        results, seconds = run(inputs, arguments.worlds, arguments.dtypes, arguments.stop_at_first)
    if arguments.output:
        torch.save((results, seconds), arguments.output)
    chosen = [cell for cell in CELLS if cell.world_size in arguments.worlds and cell.dtype in arguments.dtypes]
    chosen += [extra for extra in EXTRAS if extra.world_size in arguments.worlds]
    unknown = [f"before any cell: {result}" for name, result in results.items() if name == "None"]
    wanted = [cell for cell in chosen if str(cell) in results or not arguments.stop_at_first]
    problems = unknown + [line for line in (problem(cell, results) for cell in wanted) if line]
    for name, duration in seconds.items():
        print(f"{name}: {duration:.0f} s")
    for line in problems:
        print(line)
    print(f"matrix: tried {len(results)} of {len(chosen)} cells, {len(problems)} failed")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
