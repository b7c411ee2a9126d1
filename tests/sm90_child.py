"""Generates and compiles the code of a block for a Hopper GPU (sm_90) on a machine without one.

The block, with FlexAttention in the form of the library, is traced with its backward pass on the CPU. Both graphs are
then lowered by inductor as on an H100, whose properties are given here, and Triton compiles every kernel: neither needs
a device, only launching does. The last line of output is JSON: of each kernel its registers, the bytes that it spills
and whether it uses the matrix units.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.attention import flex_attention as flex
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448, gcnArchName="",
)  # fmt: skip
TARGET = GPUTarget("cuda", 90, 32)
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


class Traced(Exception):
    """Raised in place of running a graph."""


def graphs_of(function: Any, *inputs: Tensor) -> list[tuple[torch.fx.GraphModule, bool]]:
    """The forward and the backward graph of a function of CPU tensors, as inductor gets them; ``True``: backward."""
    found: list[tuple[torch.fx.GraphModule, bool]] = []

    def keep(backward: bool) -> Any:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            found.append((graph, backward))

            def stop(_: Any) -> Any:
                raise Traced

            stop._boxed_call = True  # type: ignore[attr-defined]
            return stop

        return compiler

    backend = aot_autograd(
        fw_compiler=keep(False), bw_compiler=keep(True), decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )  # fmt: skip
    options = flex._apply_kernel_options

    def as_on_cuda(*given: Any, **named: Any) -> Any:
        return {**options(*given, **named), "OUTPUT_LOGSUMEXP": True}

    with (
        mock.patch.object(flex, "_validate_device", lambda *tensors: None),  # it refuses gradients on CPU
        mock.patch.object(flex, "_apply_kernel_options", as_on_cuda),
        mock.patch("torch._functorch.config.force_non_lazy_backward_lowering", True),
    ):
        try:
            torch.compile(function, backend=backend, dynamic=False, fullgraph=True)(*inputs)
        except Traced:
            return found
    raise RuntimeError("nothing was traced")


def pretend_h100() -> None:
    """From here on inductor and Triton find the properties of an H100."""
    for module, names in {
        torch.cuda: {
            "get_device_capability": (9, 0), "get_device_properties": H100, "current_device": 0, "is_available": True,
            "device_count": 1,
        },
        CudaInterface: {
            "get_device_properties": H100, "get_compute_capability": 90, "is_available": True, "device_count": 1,
            "current_device": 0, "raise_if_triton_unavailable": None,
        },
        CudaInterface.Worker: {"get_device_properties": H100},
    }.items():  # fmt: skip
        for name, value in names.items():
            setattr(module, name, staticmethod(lambda *_, value=value: value))
    torch._C._accelerator_getDeviceIndex = lambda: 0
    torch._inductor.utils.get_max_sharedmem = lambda: H100.shared_memory_per_block_optin
    triton_helpers.set_driver_to_gpu = lambda: None
    torch._inductor.scheduler.has_triton = lambda *_: True
    limits = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
    triton.runtime.driver.set_active(
        SimpleNamespace(
            utils=SimpleNamespace(get_device_properties=lambda _: limits),
            get_current_target=lambda: TARGET,
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
            is_active=lambda: True,
            get_active_torch_device=lambda: torch.device("cuda", 0),
        )
    )


def lowered(graph: torch.fx.GraphModule, backward: bool) -> str:
    """Inductor's code for a graph on a GPU."""
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    for node in graph.graph.nodes:
        if node.op == "call_function" and "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.recompile()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        there = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x
            for x in inputs
        ]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*there)
    lowering = GraphLowering(graph, example_inputs=there, is_backward=backward)
    with (
        V.set_debug_handler(DebugContext()),
        V.set_graph_handler(lowering),
        V.set_fake_mode(mode),
        torch._inductor.config.patch({"triton.autotune_at_compile_time": False}),
    ):
        lowering.run(*there)
        return lowering.codegen()[0].value


def kernels_in(code: str) -> list[tuple[str, str]]:
    """Name and source of each Triton kernel."""
    return re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S)


def compiled(name: str, source: str) -> dict[str, Any]:
    """What the compiler reports of a kernel; blocks of kernels that inductor would tune are of a usual size."""
    meta: dict[str, Any] = {}

    def keep(**named: Any) -> Any:
        meta.update(named)
        return lambda function: function

    kinds = ("template", "pointwise", "reduction", "persistent_reduction")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with mock.patch.multiple(triton_heuristics, **{kind: keep for kind in kinds}):
            spec.loader.exec_module(module)
        kernel = getattr(module, name)
        given = meta["triton_meta"]
        constants = dict(given.get("constants", {}))
        blocks = {"XBLOCK": 256 if name.startswith("triton_poi") else 4, "R0_BLOCK": 512}
        for parameter in inspect.signature(kernel.fn).parameters:
            if given["signature"].get(parameter, "constexpr") == "constexpr" and parameter not in constants:
                constants[parameter] = blocks.get(parameter, 16)
        signature = dict(given["signature"]) | {x: "constexpr" for x in constants if x not in given["signature"]}
        options = {"num_warps": meta.get("num_warps", 4), "num_stages": meta.get("num_stages", 1)}
        attributes = given["configs"][0] if given.get("configs") else {}
        made = triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGET, options=options)
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(made.asm["ptx"])
        command = [str(PTXAS), "-v", "--gpu-name", "sm_90a", str(ptx), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", report), re.search(r"(\d+) bytes spill stores", report)
    assert registers is not None and spilled is not None
    return {
        "name": name, "cubin": len(made.asm["cubin"]), "registers": int(registers[1]), "spilled": int(spilled[1]),
        "matrix_units": "wgmma" in made.asm["ptx"], "shared": made.metadata.shared,
    }  # fmt: skip


def block_call(length: int) -> tuple[Any, list[Tensor]]:
    """A block at the shape of the 2.2B model in bfloat16, over documents with an image, and its input."""
    from neo_components.components import flex_attention as module
    from neo_components.components.block_inputs import BlockInputs
    from neo_components.components.pre_buffer import PreBuffer

    with torch.device("cpu"):
        stack = PreBuffer(1, 2048, 16, 8, 128, 6144).to(torch.bfloat16)
    block = stack.layers[0]
    ids = torch.arange(length)[None] // 512
    image_ids = torch.where(torch.arange(length)[None] % 512 < 128, ids, -1)
    attend = module.FlexAttention(ids, image_ids)
    attend.hopper = True
    seen: dict[str, Any] = {}

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.update(options)
        return q[..., : v.shape[-1]]

    heads = [torch.zeros(1, length, n, c, dtype=torch.bfloat16) for n, c in ((16, 256), (8, 256), (8, 128))]
    with mock.patch.object(module, "flex_attention", lambda: spy):
        attend(*heads, 128**-0.5)
    real = module.flex_attention()

    def same_call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return real(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **seen).transpose(1, 2)

    positions = torch.arange(length)[None, :, None].expand(1, length, 3)
    inputs = BlockInputs(stack.rotaries[0](positions), same_call, image_ids, (image_ids >= 0).long())
    x = torch.zeros(1, length, 2048, dtype=torch.bfloat16, requires_grad=True)
    return lambda x: block(x, inputs), [x]


if __name__ == "__main__":
    function, inputs = block_call(int(sys.argv[1]))
    graphs = graphs_of(function, *inputs)
    pretend_h100()
    found = {}
    for graph, backward in graphs:
        code = lowered(graph, backward)
        found["backward" if backward else "forward"] = [compiled(*kernel) for kernel in kernels_in(code)]
    print(json.dumps(found))
