"""How many kernels torch.compile makes of one layer of bge-large's shape, forward and backward; without a GPU.

    python benchmarks/compiled_layer.py [--tokens 4096]     needs g++ and the package triton, which is not run

Inductor writes its program for an H200, of which `pretend` tells it; what that program starts is counted: Triton's
kernels, and others (matrix products, attention). Hidden dropout is 0.1, weights are float32 under autocast or, as in a
working copy, bf16 but for the norms'. Prints JSON.
"""

import fake_gpu  # noqa: F401  the device

# isort: split
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import harness
import torch
import torch._inductor.config as inductor
import triton
from models import LARGE, random_encoder
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

H200 = {
    "name": "NVIDIA H200",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 141 << 30,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232_448,
    "L2_cache_size": 50 << 20,
    "gcnArchName": "",
}


@contextmanager
def pretend() -> Iterator[None]:
    """Let Inductor and Triton find an H200, and let them look for no patterns by running them."""
    answers: dict[str, Callable[..., Any]] = {
        "get_device_properties": lambda *_: SimpleNamespace(**H200),
        "get_device_capability": lambda *_: (9, 0),
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
    }
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    triton.runtime.driver.set_active(driver)
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
            if hasattr(CudaInterface, name):
                stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(answer)))
        stack.enter_context(
            mock.patch.object(CudaInterface.Worker, "get_device_properties", answers["get_device_properties"])
        )
        for passes in (joint_graph, post_grad):
            stack.enter_context(mock.patch.object(passes, "lazy_init", lambda *_, **__: None))
        stack.enter_context(inductor.patch(compile_threads=1, force_disable_caches=True))
        yield


def kernels(graph: torch.fx.GraphModule, inputs: list[Any]) -> dict[str, int]:
    """What Inductor's program for a graph starts."""
    compile_fx._recursive_post_grad_passes(graph, is_inference=False)
    lowered = GraphLowering(graph, example_inputs=inputs, is_inference=False)
    with V.set_graph_handler(lowered), V.set_debug_handler(mock.MagicMock()), V.set_extern_kernel_nodes([]):
        lowered.run(*inputs)
        code = lowered.codegen()[0]
    body = getattr(code, "value", code).split("def call(")[1]
    others = re.findall(r"(?:extern_kernels\.|torch\.ops\.)[\w.]+\(", body)
    return {"triton": len(re.findall(r"\.run\(", body)), "others": len(others)}


def count(num_tokens: int, half: bool) -> dict[str, dict[str, int]]:
    """Kernels of the forward and of the backward."""
    found = {}

    def counted(name: str) -> Callable[[torch.fx.GraphModule, list[Any]], torch.fx.GraphModule]:
        def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> torch.fx.GraphModule:
            found[name] = kernels(graph, inputs)
            return graph

        return compiler

    def partition(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        compile_fx._recursive_joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, inputs, **options | {"compiler": "inductor"})

    with torch.device("meta"):
        encoder = random_encoder(LARGE | {"num_hidden_layers": 2, "attention_probs_dropout_prob": 0.0}, "auto")
    layer = encoder.backbone.encoder.layer[0]
    types = {
        name: torch.bfloat16 if half and "LayerNorm" not in name else torch.float32
        for name, _ in layer.named_parameters()
    }
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    one_thread = torch.autograd.set_multithreading_enabled(False)  # the backward is compiled within the same modes
    with pretend(), one_thread, mode, V.set_fake_mode(mode), torch.autocast("cuda", torch.bfloat16):
        starts = torch.empty(129, dtype=torch.int32, device="cuda")
        hidden = torch.empty(1, num_tokens, LARGE["hidden_size"], device="cuda", requires_grad=True)
        weights = [
            torch.empty(weight.shape, dtype=dtype, device="cuda", requires_grad=True)
            for weight, dtype in zip(layer.parameters(), types.values(), strict=True)
        ]

        def run(hidden: Tensor, starts: Tensor, *weights: Tensor) -> Tensor:
            told = {"attention_mask": None, "cu_seqlens": starts, "longest": 512, "kernel": "torch"}
            out: Tensor = torch.func.functional_call(layer, dict(zip(types, weights, strict=True)), (hidden,), told)
            return out

        compiled = aot_function(
            run,
            fw_compiler=counted("forward"),
            bw_compiler=counted("backward"),
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )
        out = compiled(hidden, starts, *weights)
        out.backward(torch.empty_like(out))
    return found


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--tokens", type=int, default=4096)
    args = options.parse_args()
    ways = {"float32 weights": False, "bf16 weights": True}
    print(json.dumps({way: count(args.tokens, half) for way, half in ways.items()}))


if __name__ == "__main__":
    main()
