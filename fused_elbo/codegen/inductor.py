"""What ``torch.compile`` generates for a GPU that need not be there: kernels launched and bytes moved.

The graphs are traced on a CPU, moved to "cuda" as fake tensors and lowered by Inductor as for an H200; nothing is compiled
further, or run. Bytes are Inductor's own count, of what each kernel reads and writes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import debug, decomposition, graph
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from .hardware import GPUS, LANES_PER_WARP
from .triton_kernels import no_gpu_needed

ARCHITECTURE = 90
# A launch in the code that calls the kernels: Inductor's own, or an operator's of PyTorch such as the drawing of a seed.
LAUNCH = re.compile(r"^\s+(?:\w+\.run\(|aten\.|extern_kernels\.|torch\.ops\.)", re.MULTILINE)
CUDA = torch.device("cuda", 0)


def lowered(
    function: Callable[..., Any], inputs: Sequence[tuple[tuple[int, ...], bool]], dtype: torch.dtype
) -> list[tuple[int, int]]:
    """Launches and bytes of the forward, then of the backward, that ``torch.compile`` would make of a function.

    Args:
        function: from tensors to a tensor, or to several.
        inputs: the tensors' shapes, and whether each requires grad.
        dtype: theirs.
    """
    found: list[tuple[int, int]] = []

    def partition(joint: torch.fx.GraphModule, *args: Any, **options: Any) -> Any:
        placeholder = next(node for node in joint.graph.nodes if node.op == "placeholder")
        with V.set_fake_mode(placeholder.meta["val"].fake_mode):
            joint_graph_passes(joint)
        return min_cut_rematerialization_partition(joint, *args, **options, compiler="inductor")

    def compiler(module: torch.fx.GraphModule, given: Sequence[Any], *, is_backward: bool) -> Callable[..., Any]:
        found.append(_lower(*_on_cuda(module, given), is_backward=is_backward))
        return make_boxed_func(module.forward)

    with FakeTensorMode():
        tensors = [torch.empty(shape, dtype=dtype, requires_grad=wanted) for shape, wanted in inputs]
        compiled = aot_function(
            function,
            functools.partial(compiler, is_backward=False),
            functools.partial(compiler, is_backward=True),
            partition,
            decompositions=decomposition.select_decomp_table(),
        )
        values = compiled(*tensors)
        values = values if isinstance(values, (tuple, list)) else (values,)
        torch.autograd.grad(values, [t for t in tensors if t.requires_grad], [torch.empty_like(v) for v in values])
    return found


def _on_cuda(module: torch.fx.GraphModule, given: Sequence[Any]) -> tuple[torch.fx.GraphModule, list[Any]]:
    """A copy of a traced graph, and its fake inputs, as if they were on a GPU."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=CUDA)

    def named(value: Any) -> Any:
        return CUDA if isinstance(value, torch.device) else value

    module = copy.deepcopy(module)
    with next(t for t in given if isinstance(t, Tensor)).fake_mode:
        for node in module.graph.nodes:
            node.args, node.kwargs = (torch.fx.node.map_aggregate(a, named) for a in (node.args, node.kwargs))
            if "val" in node.meta:
                node.meta["val"] = tree_map(moved, node.meta["val"])
        given = [moved(t) for t in given]
    module.recompile()
    return module, given


def _lower(module: torch.fx.GraphModule, given: Sequence[Any], *, is_backward: bool) -> tuple[int, int]:
    fake = next(t for t in given if isinstance(t, Tensor)).fake_mode
    with _as_on_a_gpu(), V.set_fake_mode(fake), V.set_debug_handler(debug.DebugContext()):
        post_grad_passes(module, is_inference=False)
        lowering = graph.GraphLowering(module, example_inputs=given, is_backward=is_backward)
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*given)
            code, _ = lowering.codegen()
            moved, *_ = lowering.count_bytes()
    return len(LAUNCH.findall(code.value.partition("def call(")[2].partition("return (")[0])), int(moved)


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    properties = DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=GPUS[ARCHITECTURE].multiprocessors,
        cc=ARCHITECTURE,
        major=ARCHITECTURE // 10,
        regs_per_multiprocessor=2**16,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=LANES_PER_WARP,
    )
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (DeviceProperties, "create", properties),
            (CudaInterface.Worker, "get_device_properties", properties),
            (torch.cuda, "get_device_properties", properties),
            (torch.cuda, "get_device_capability", divmod(ARCHITECTURE, 10)),
            (torch.cuda, "current_device", 0),
            (torch.cuda, "is_available", True),
        ):
            stack.enter_context(mock.patch.object(owner, name, lambda *_, value=value: value))
        stack.enter_context(no_gpu_needed(ARCHITECTURE))
        yield
