"""A model's passes over rows of fixed shape, held as CUDA graphs: a whole pass is one launch.

A graph repeats what the device was told when it was captured, on the same memory. So a row is copied into its bucket's
own tensors, its vectors are copied out, and between them nothing is asked of the host:

    represent   vectors, without gradient              encoding, and GradCache's first pass
    forward     vectors, and what the backward needs   then the loss, of any kind, outside of graphs
    backward    adds d(<vectors, given>) / d(weights) to one flat float32 vector

All graphs share one pool of memory: a backward follows its forward before any other graph is repeated. Random numbers
are drawn anew at each repetition, from the device's generator, so that restoring its state gives the same dropout.

On a CPU nothing is captured: the same functions run, on the same tensors.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bge_core.encoder.encode import HALF
from bge_core.encoder.fixed import FixedRow
from bge_core.encoder.kernels import first_line
from bge_core.encoder.model import Encoder

logger = logging.getLogger(__name__)
MAX_BUCKETS = 32  # whose graphs are kept; beyond, the least recently used go

Pass = Callable[[], None]


class Capture:
    """Makes graphs of functions that work on tensors of their own.

    Args:
        device: a GPU; elsewhere functions stay what they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_on = device, device.type == "cuda"
        if self.is_on:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, passes: Sequence[Pass], warm_up: Pass) -> list[Pass]:
        """What repeats each of the passes; `warm_up` runs what they run, and changes nothing that is kept.

        Random numbers go on as if nothing had been drawn, so that it does not matter when a graph is captured. Where
        none can be, this is said, and from then on the functions run as they are, those of graphs made before, too.
        """
        if not self.is_on:
            return [*passes]
        try:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                self.warm_up(warm_up)
                return [self.capture(each) for each in passes]
        except Exception as problem:  # of a driver, a compiler, another author's model
            logger.warning("--cuda_graphs: none can be captured here, going on without: %s", first_line(problem))
            self.is_on = False
            if self.device.type == "cuda":
                # To the generator a capture that broke off goes on, and it would refuse to draw.
                generator = torch.cuda.default_generators[torch.cuda.current_device()]
                generator.graphsafe_set_state(generator.clone_state())
            return [*passes]

    def rehearse(self, function: Pass) -> None:
        """Run it, with random numbers as if nothing had been drawn; where graphs are made, as their warm-up does."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            self.warm_up(function) if self.is_on else function()

    def warm_up(self, function: Pass) -> None:
        """Run it twice, so that what happens once has happened.

        On the stream of the captures: autograd's nodes of weights keep the stream that they were made on, and a capture
        that meets another one takes it in.
        """
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                function()
        current.wait_stream(self.stream)

    def capture(self, function: Pass) -> Pass:
        """A graph of what the function does."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: meanwhile the data loader's thread pins memory
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            function()
        return graph.replay


class Bucket:
    """The passes over rows of one bucket.

    Args:
        vectors: a row -> (N, D).
        row: one of the bucket, on the device.
        capture: see there.
        weights: with regard to which is differentiated.
        sums: what their gradients are added to.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        vectors: Callable[[FixedRow], Tensor],
        row: FixedRow,
        capture: Capture,
        weights: Sequence[Tensor] = (),
        sums: Sequence[Tensor] = (),
    ) -> None:
        self.vectors, self.capture, self.weights, self.sums = vectors, capture, weights, sums
        tensors: dict[str, Any] = {name: x.clone() for name, x in vars(row).items() if isinstance(x, Tensor)}
        self.row = replace(row, **tensors)
        self.passes: dict[str, Pass] = {}
        self.gradient_ND: Tensor | None = None

    @torch.inference_mode(False)  # else nobody outside of that mode could use the bucket again
    def represent(self, row: FixedRow) -> Tensor:
        """Vectors (N, D), without gradient."""
        self._load(row)
        if "represent" not in self.passes:
            (self.passes["represent"],) = self.capture([self._represent], self._represent)
        self._repeat("represent", self._represent)
        return self.represented_ND.clone()

    def forward(self, row: FixedRow) -> Tensor:
        """Vectors (N, D); `backward` has to follow before anything else."""
        self._load(row)
        if "forward" not in self.passes:
            both = self.capture([self._forward, self._backward], self.rehearse)
            self.passes |= dict(zip(("forward", "backward"), both, strict=True))
        self._repeat("forward", self._forward)
        return self.vector_ND.detach().clone()

    def backward(self, gradient_ND: Tensor) -> None:
        """Add the weights' gradients, from that of the vectors of the last `forward`, to the sums."""
        assert self.gradient_ND is not None
        self.gradient_ND.copy_(gradient_ND)
        self._repeat("backward", self._backward)

    def _repeat(self, name: str, function: Pass) -> None:
        (self.passes[name] if self.capture.is_on else function)()

    def _load(self, row: FixedRow) -> None:
        for name, own in vars(self.row).items():
            if isinstance(own, Tensor) and name != "place_S":
                own.copy_(getattr(row, name))

    def _represent(self) -> None:
        with torch.no_grad():
            self.represented_ND = self.vectors(self.row)

    def _forward(self) -> None:
        with torch.enable_grad():
            self.vector_ND = self.vectors(self.row)
        if self.gradient_ND is None:
            self.gradient_ND = torch.zeros_like(self.vector_ND)

    def _backward(self) -> None:
        for total, gradient in zip(self.sums, self._differentiate(), strict=True):
            if gradient is not None:
                total.add_(gradient)

    def _differentiate(self) -> tuple[Tensor | None, ...]:
        with torch.autocast(self.vector_ND.device.type, enabled=False):
            return torch.autograd.grad(self.vector_ND, self.weights, self.gradient_ND, allow_unused=True)

    def rehearse(self) -> None:
        """A forward and its backward that change nothing."""
        self._forward()
        self._differentiate()


class Buckets:
    """The buckets whose passes are held.

    Args:
        make: a bucket from one of its rows.
        visits: so many rows of a bucket come by before it is held: graphs of what is not seen again are not worth it.
    """

    def __init__(self, make: Callable[[FixedRow], Bucket], visits: int = 1) -> None:
        self.make, self.visits = make, visits
        self.seen: dict[Any, int] = {}
        self.held: OrderedDict[Any, Bucket] = OrderedDict()

    def of(self, row: FixedRow) -> Bucket | None:
        """The bucket of a row; None where it is not held."""
        key = row.bucket
        self.seen[key] = self.seen.get(key, 0) + 1
        if key not in self.held and self.seen[key] < self.visits:
            return None
        bucket = self.held.pop(key, None) or self.make(row)
        self.held[key] = bucket
        if len(self.held) > MAX_BUCKETS:
            self.held.popitem(last=False)
        return bucket


def in_half(encoder: Encoder, half: torch.dtype | None) -> Callable[[FixedRow], Tensor]:
    """`encoder.vectors` under autocast to `half`; None: without."""

    def vectors(row: FixedRow) -> Tensor:
        # Without its cache: a graph must not read what was rounded before it was captured.
        with torch.autocast(encoder.device.type, half, enabled=half is not None, cache_enabled=False):
            return encoder.vectors(row)

    return vectors


def why_no_graphs(encoder: Encoder, half: torch.dtype | None) -> str | None:
    """Why the encoder's passes cannot be graphs here and now; None: they can."""
    if encoder.device.type != "cuda":
        return "this is no GPU"
    with torch.autocast("cuda", half, enabled=half is not None):
        if encoder.fixed_rows() is not None:
            return None
    if half is None:
        return "it needs --bf16 or --fp16"
    return "no attention kernel that works here takes this model's texts without padding, or with its dropout"


def hold_passes(encoder: Encoder, precision: str) -> None:
    """Let the encoder's passes without gradient be graphs, from a bucket's second row on; else say why not.

    Args:
        encoder: on its device, in evaluation mode.
        precision: "fp16", "bf16" or "no", in which it will run.
    """
    half = HALF.get(precision)
    if reason := why_no_graphs(encoder, half):
        logger.warning("--cuda_graphs: not while encoding: %s", reason)
        return

    vectors, capture = in_half(encoder, half), Capture(encoder.device)
    buckets = Buckets(lambda row: Bucket(vectors, row, capture), visits=2)

    def represent(row: FixedRow) -> Tensor:
        bucket = None if encoder.training else buckets.of(row)
        return encoder.vectors(row) if bucket is None else bucket.represent(row)

    encoder.represent = represent
