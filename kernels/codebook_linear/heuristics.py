"""Decoding and tiles of the codebook Linear: pure functions of the shape and of the number of multiprocessors."""

from dataclasses import dataclass
from functools import lru_cache

from redpp_serve.kernels.codebook_linear.packing import GROUP_BYTES

DECODES = ("prmt8", "prmt16", "pair", "pointer")
FEW_VALUES = 8  # that a permutation of one table half selects from
MAX_SPLIT = 16
STEPS_PER_SPLIT = 2  # fewer do not fill the pipeline of loads
WARPS_PER_PROCESSOR = 16  # four for each scheduler: enough to issue a decoding instruction at every clock


@dataclass(frozen=True)
class CodebookBlocks:
    """Work of one program.

    Attributes:
        decode: one of `DECODES`.
        rows: rows of its tile of the result.
        outputs: outputs of its tile of the result.
        groups: groups of packed bytes of each output in a step of its loop.
        split: programs that share one tile's reduction; each writes fp32 sums, which a second launch adds in a fixed
            order.
        stages: steps whose loads are in flight.
        warps: warps of the program.
    """

    decode: str
    rows: int
    outputs: int
    groups: int
    split: int
    stages: int
    warps: int


def check_decode(op: str, decode: str, values: int, itemsize: int) -> None:
    """Refuse a strategy that cannot decode such a codebook.

    Raises:
        ValueError: naming the operator, what was expected and what was found.
    """
    if decode not in ("auto", *DECODES):
        raise ValueError(f"{op}: decode must be auto or one of {', '.join(DECODES)}, found {decode!r}")
    if decode == "prmt8" and values > FEW_VALUES:
        raise ValueError(f"{op}: decode prmt8 takes at most {FEW_VALUES} values, found {values}")
    if decode in ("prmt8", "prmt16", "pair") and itemsize != 2:
        raise ValueError(f"{op}: decode {decode} takes values of 2 bytes (fp16, bf16), found {itemsize} bytes")


def best_decode(values: int, itemsize: int) -> str:
    """Return the strategy with the fewest instructions for each weight."""
    if itemsize != 2:
        return "pointer"
    return "prmt8" if values <= FEW_VALUES else "prmt16"


@lru_cache(maxsize=4096)
def codebook_blocks(
    rows: int, n_out: int, n_in_bytes: int, values: int, itemsize: int, decode: str, processors: int
) -> CodebookBlocks:
    """Return tiles and shares for ``rows`` x n_out sums over the packed bytes of one output.

    Weights are operand A of the matrix instructions, which takes them from registers; so few rows make a narrow tile
    that does nothing but decode, and the reduction is shared until every multiprocessor has `WARPS_PER_PROCESSOR`.

    Args:
        rows: rows of the input.
        n_out: outputs.
        n_in_bytes: packed bytes of one output, from `packing.packed_bytes`.
        values: length of the codebook.
        itemsize: bytes of a value.
        decode: ``auto`` or one of `DECODES`.
        processors: multiprocessors of the device.
    """
    chosen = best_decode(values, itemsize) if decode == "auto" else decode
    most_rows = 64 if itemsize == 2 else 32
    tile_rows = 8 if itemsize == 2 else 16  # IEEE products in fp32 have no narrower tile
    while tile_rows < min(rows, most_rows):
        tile_rows *= 2
    # For 16 rows two warps decode with fewer instructions: the compiler then takes the older matrix instructions.
    warps = 2 if itemsize == 2 and tile_rows == 16 else 4
    outputs = 16 * warps if n_out > 32 else 32 if n_out > 16 else 16
    groups = n_in_bytes // GROUP_BYTES
    per_step = 2 if groups > 1 and itemsize == 2 else 1
    steps = -(-groups // per_step)
    programs = -(-rows // tile_rows) * -(-n_out // outputs)
    wanted, split = WARPS_PER_PROCESSOR // warps * processors, 1
    while split < MAX_SPLIT and programs * split < wanted and steps >= 2 * split * STEPS_PER_SPLIT:
        split *= 2
    return CodebookBlocks(
        chosen, tile_rows, outputs, per_step, split, 4 if tile_rows <= 16 and itemsize == 2 else 3, warps
    )
