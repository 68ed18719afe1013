"""Where computed channels are stored in a result: the table of positions that the fused operators take.

`positions` is (n_out, D) int32: computed channel o goes to the result's channels `positions[o]`; -1 fills the row of a
channel with fewer than D. Every channel of the result appears exactly once. None means one each, in order.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from redpp_serve.kernels.checks import version

# positions -> (version, channels) that it was found good with.
_accepted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_positions_shape(op: str, positions: Tensor | None, n_out: int, channels: int, device: torch.device) -> None:
    """Refuses a table that does not fit the layer. Reads no values.

    Raises:
        ValueError: naming the argument, what it should be and what it is.
    """
    if positions is None:
        if channels != n_out:
            raise ValueError(f"{op}: channels must be the weight's {n_out} outputs without positions, found {channels}")
        return
    if channels < 0:
        raise ValueError(f"{op}: channels must not be negative, found {channels}")
    fits = positions.dim() == 2 and positions.shape[0] == n_out and positions.dtype == torch.int32
    if not fits or positions.device != device:
        raise ValueError(
            f"{op}: positions must be torch.int32 of shape ({n_out}, slots) on {device}, "
            f"found {positions.dtype} {tuple(positions.shape)} on {positions.device}"
        )


def check_positions(op: str, positions: Tensor | None, channels: int) -> None:
    """Refuses a table that does not name every channel of the result exactly once.

    On CUDA this synchronises, so the answer is remembered for as long as the tensor lives unchanged. Tensors made
    under `torch.inference_mode` keep no version: changes to them go unseen.

    Raises:
        ValueError: naming the first channel that is missing, named twice or out of range.
    """
    if positions is None:
        return
    key = (version(positions), channels)
    if _accepted.get(positions) == key:
        return
    found = positions[positions != -1].sort().values.tolist()
    if len(found) != channels or found != list(range(channels)):
        wrong = next((c for i, c in enumerate(found) if c != i), len(found))
        raise ValueError(
            f"{op}: positions must name every channel of 0..{channels - 1} exactly once, found {len(found)} entries; "
            f"the first that is out of place is {wrong}"
        )
    _accepted[positions] = key


def spread(computed: Tensor, positions: Tensor, channels: int, dim: int) -> Tensor:
    """Computed channels of dimension `dim` stored at their positions; the meaning of the table."""
    source = torch.empty(channels, dtype=torch.int64, device=positions.device)
    outputs, slots = (positions >= 0).nonzero(as_tuple=True)
    source[positions[outputs, slots].long()] = outputs
    return computed.index_select(dim, source)
