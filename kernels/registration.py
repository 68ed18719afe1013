"""Registration of the operators in torch's `redpp` namespace, with the dispatch that all of them share."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "redpp"


def register(
    name: str,
    schema: str,
    *,
    check: Callable[..., Sequence[int]],
    reference: Callable[..., Tensor],
    kernel: str,
    allocate: Callable[[Tensor, Sequence[int]], Tensor],
    check_values: Callable[..., None] = lambda *arguments: None,
) -> None:
    """Define `redpp::<name>` for the CPU, for CUDA, and for tracing with shapes alone.

    Archives carry their own copy of this package, so one process may import several copies: the first one serves all
    of them, as long as the schemas agree. Every callable takes the arguments of the schema in order; the first of them
    is the tensor that determines device and precision.

    Args:
        name: operator name without the namespace.
        schema: arguments and result in torch's schema language, such as `(Tensor x) -> Tensor`.
        check: refuses arguments that do not fit together, without reading values; returns the shape of the result.
        reference: computes the result in plain PyTorch; runs on the CPU, and for fp64 everywhere.
        kernel: module whose function ``launch_<name>`` computes the result with GPU kernels, on the device that is
            current. It needs triton, and is imported when the first CUDA tensor comes in.
        allocate: makes an uninitialised result of a shape, laid out as the implementations lay it out.
        check_values: refuses wrong values inside of the tensors.

    Raises:
        RuntimeError: another copy already defined the operator with a different schema.
    """
    qualified = f"{NAMESPACE}::{name}"
    packet = getattr(getattr(torch.ops, NAMESPACE), name, None)
    if packet is not None:
        found, expected = str(packet.default._schema), str(torch._C.parse_schema(qualified + schema))
        if found != expected:
            raise RuntimeError(
                f"{qualified} is already defined in this process as '{found}', this copy needs '{expected}'; "
                "load archives of different versions in separate processes"
            )
        return

    def run_on_cpu(*arguments: Any) -> Tensor:
        check(*arguments)
        check_values(*arguments)
        return reference(*arguments)

    def run_on_cuda(*arguments: Any) -> Tensor:
        x = arguments[0]
        if x.dtype == torch.float64:
            return run_on_cpu(*arguments)
        check(*arguments)
        check_values(*arguments)
        with torch.cuda.device(x.device):
            result: Tensor = getattr(import_module(kernel), f"launch_{name}")(*arguments)
            return result

    def infer(*arguments: Any) -> Tensor:
        return allocate(arguments[0], check(*arguments))

    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "CPU", run_on_cpu)
    torch.library.impl(qualified, "CUDA", run_on_cuda)
    torch.library.register_fake(qualified, infer)
