"""Registers operators in the `redpp` namespace of torch, once per process."""

from collections.abc import Callable

import torch

NAMESPACE = "redpp"


def register(name: str, signature: str, *, cpu: Callable, cuda: Callable, fake: Callable) -> None:
    """Defines `redpp::<name>` with its CPU, CUDA and shape-only implementations.

    Archives carry their own copy of this package, so one process may import several copies: the first one serves all
    of them, as long as the signatures agree.

    Args:
        name: operator name without the namespace.
        signature: arguments and result in torch's schema language, such as `(Tensor x) -> Tensor`.
        cpu, cuda: implementations taking the arguments of the signature in order.
        fake: same, computing only shape, dtype and device of the result.

    Raises:
        RuntimeError: another copy already defined the operator with a different signature.
    """
    qualified = f"{NAMESPACE}::{name}"
    packet = getattr(getattr(torch.ops, NAMESPACE), name, None)
    if packet is not None:
        found, expected = str(packet.default._schema), str(torch._C.parse_schema(qualified + signature))
        if found != expected:
            raise RuntimeError(
                f"{qualified} is already defined in this process as '{found}', this copy needs '{expected}'; "
                "load archives of different versions in separate processes"
            )
        return
    torch.library.define(qualified, signature, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "CPU", cpu)
    torch.library.impl(qualified, "CUDA", cuda)
    torch.library.register_fake(qualified, fake)
