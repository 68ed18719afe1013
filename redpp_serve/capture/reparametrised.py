"""Weights that a file or a module keeps in parts: masks, weight norm and spectral norm, made into the plain weight.

Sources: ``torch.nn.utils.prune`` (``weight_orig * weight_mask``), ``torch.nn.utils.weight_norm`` and
``torch.nn.utils.parametrizations.weight_norm`` (``g * v / |v|``), and both forms of ``spectral_norm`` in eval mode
(``weight / (u @ weight @ v)``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

_PARTS = (
    re.compile(r"(?P<stem>(?:.*\.)?)parametrizations\.(?P<leaf>\w+)\.original[01]?"),
    re.compile(r"(?P<stem>(?:.*\.)?)(?P<leaf>\w+)_(?:orig|g)"),
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # their output channels are dimension 1


def plain_name(name: str) -> str | None:
    """Return the name of the plain weight that an entry is the main part of; None where it is no such part."""
    for pattern in _PARTS:
        if found := pattern.fullmatch(name):
            return found["stem"] + found["leaf"]
    return None


def make_plain(
    name: str, tensors: Mapping[str, Tensor], owner: nn.Module | None
) -> tuple[str, Tensor, tuple[str, ...]] | None:
    """Compute a plain weight from the parts that a file keeps.

    Args:
        name: the plain weight, such as ``conv.weight``.
        tensors: the file's tensors by name.
        owner: the module that the weight belongs to.

    Returns:
        What was applied, the weight, and the entries used; None where the file has no parts of it that are understood.
    """
    stem, _, leaf = name.rpartition(".")
    inner = f"{stem}.parametrizations.{leaf}".lstrip(".")
    spectral = partial(_spectral, axis=1 if isinstance(owner, _TRANSPOSED) else 0)
    forms: tuple[tuple[str, tuple[str, ...], Callable[..., Tensor]], ...] = (
        ("the masks of torch.nn.utils.prune", (f"{name}_orig", f"{name}_mask"), _masked),
        ("spectral norm", (f"{name}_orig", f"{name}_u", f"{name}_v"), spectral),
        ("weight norm", (f"{name}_g", f"{name}_v"), _normed),
        ("weight norm", (f"{inner}.original0", f"{inner}.original1"), _normed),
        ("spectral norm", (f"{inner}.original", f"{inner}.0._u", f"{inner}.0._v"), spectral),
    )
    known = {part for _, parts, _ in forms for part in parts}
    if any(key.startswith(f"{inner}.") and key not in known for key in _around(inner, tensors)):
        return None  # further parametrizations on top, which the file's names do not tell
    for what, parts, compute in forms:
        if all(part in tensors for part in parts):
            try:
                with torch.no_grad():
                    return what, compute(*(_wide(tensors[part]) for part in parts)), parts
            except (RuntimeError, IndexError):  # the parts do not go together
                return None
    return None


def remove_unfilled(module: nn.Module, names: Collection[str], own: Mapping[str, object]) -> list[str]:
    """Take masks and norms off a module wherever the file does not bring the parts that they need.

    Args:
        module: the module, changed in place.
        names: the names in the file, as the module would call them.
        own: the module's names.

    Returns:
        The names of the weights that are plain now.
    """
    freed = []
    for path, layer in module.named_modules():
        prefix = f"{path}." if path else ""
        for leaf, needed, remove in _parametrised(layer, prefix, own):
            if not all(name in names for name in needed):
                with torch.no_grad():
                    remove()
                freed.append(prefix + leaf)
    return freed


def _parametrised(
    layer: nn.Module, prefix: str, own: Mapping[str, object]
) -> list[tuple[str, list[str], Callable[[], object]]]:
    """List the weights of a layer that are kept in parts: name, names of the parts, and how to make it plain."""
    found: list[tuple[str, list[str], Callable[[], object]]] = []
    if parametrize.is_parametrized(layer):
        for leaf in list(layer.parametrizations):  # type: ignore[arg-type]
            parts = [name for name in own if name.startswith(f"{prefix}parametrizations.{leaf}.")]
            found.append((leaf, parts, _remover(parametrize.remove_parametrizations, layer, leaf)))
    for hook in list(layer._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            parts = [f"{prefix}{hook.name}_{part}" for part in "gv"]
            found.append((hook.name, parts, _remover(remove_weight_norm, layer, hook.name)))
        elif isinstance(hook, SpectralNorm):
            parts = [f"{prefix}{hook.name}_{part}" for part in ("orig", "u", "v")]
            found.append((hook.name, parts, _remover(_remove_spectral_norm, layer, hook.name)))
        elif isinstance(hook, prune.BasePruningMethod):
            parts = [f"{prefix}{hook._tensor_name}_{part}" for part in ("orig", "mask")]
            found.append((hook._tensor_name, parts, _remover(prune.remove, layer, hook._tensor_name)))
    return found


def _remove_spectral_norm(layer: nn.Module, leaf: str) -> None:
    """Remove spectral norm and, which torch forgets, the hook that would ask a state_dict for its parts."""
    remove_spectral_norm(layer, leaf)
    for key, hook in list(layer._load_state_dict_pre_hooks.items()):
        if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
            del layer._load_state_dict_pre_hooks[key]


def _remover(remove: Callable[..., object], layer: nn.Module, leaf: str) -> Callable[[], object]:
    return lambda: remove(layer, leaf)


def _around(inner: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the entries of one parametrized weight; the few that torch numbers, without a walk over the file."""
    own = [f"{inner}.{k}.{part}" for k in range(4) for part in ("_u", "_v", "base")]
    return [key for key in own if key in tensors]


def _wide(tensor: Tensor) -> Tensor:
    """Return half precision as float32, in which products of parts are rounded once."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _masked(weight: Tensor, mask: Tensor) -> Tensor:
    return weight * mask.to(weight.dtype)


def _normed(g: Tensor, v: Tensor) -> Tensor:
    """Return ``g * v / |v|``, the norm over every dimension in which ``g`` is one number."""
    if g.dim() == 0:
        return v.mul(g / torch.linalg.vector_norm(v))
    over = [k for k, size in enumerate(g.shape) if size == 1]
    if g.dim() != v.dim() or len(over) < g.dim() - 1:
        raise RuntimeError("g is not one number for each slice of v")
    norm: Tensor = torch.linalg.vector_norm(v, dim=over, keepdim=True) if over else v.abs()
    return v.mul(g / norm)


def _spectral(weight: Tensor, u: Tensor, v: Tensor, axis: int) -> Tensor:
    """Return the weight over its spectral norm, whose singular vectors ``u`` and ``v`` the file keeps."""
    if weight.dim() <= axis or weight.shape[axis] != u.numel():
        axis = 1 - axis
    matrix = weight.movedim(axis, 0).flatten(1)
    return weight / torch.dot(u, torch.mv(matrix, v))
