"""Which entry of a checkpoint is which tensor of a network, found by fitting names and shapes.

Training programs write names around those of the network: Lightning ``model.``, DataParallel ``module.``,
torch.compile ``_orig_mod.``, FSDP and activation checkpointing theirs, in any order. Wrappers' names carry nothing and
are left out on both sides; a prefix is one under which the file has every tensor that the network needs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from redpp_serve.capture.reparametrised import plain_name
from redpp_serve.capture.sniff import shorten
from redpp_serve.errors import RedppError

# The names under which wrappers hold what they wrap: DataParallel and DistributedDataParallel, torch.compile, FSDP of
# torch and of fairscale, activation checkpointing, Lightning Fabric, Opacus.
WRAPPERS = frozenset(
    {
        *("module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"),
        *("_forward_module", "_module"),
    }
)
# Buffers that modules compute when they are built; files of other releases of a library have them or lack them.
COMPUTED = frozenset(
    {
        *("num_batches_tracked", "position_ids", "token_type_ids", "relative_position_index", "attn_mask"),
        *("relative_coords_table", "attention_bias_idxs", "causal_mask", "masked_bias", "inv_freq"),
    }
)
# Words in the names of what only training uses. A layer may be called like a score, so those never hold a weight.
_TRAINING = frozenset(
    {
        *("loss", "losses", "criterion", "criterions", "criteria", "metric", "metrics", "lpips", "perceptual"),
        *("optimizer", "optimizers", "optimiser", "optim", "scheduler", "schedulers", "ema", "swa", "teacher"),
    }
)
_SCORES = frozenset(
    {
        *("acc", "accuracy", "f1", "precision", "recall", "auroc", "auc", "iou", "miou", "jaccard", "dice", "confmat"),
        *("mse", "mae", "rmse", "psnr", "ssim", "fid", "kid", "perplexity", "bleu", "rouge", "queue", "score"),
    }
)
_COUNTERS = re.compile(
    r"(class|cls|pos|ce|label|sample)_?weights?|n_averaged|num_updates|(global_)?(step|epoch|iter|iteration)s?"
    r"|best_\w+|total_(ops|params)|queue(_ptr)?"
)
_PARAMETERS = frozenset({"weight", "bias", "running_mean", "running_var"})
_WORD = re.compile(r"[fF]1|[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_PART = re.compile(r"((?:.*\.)?)parametrizations\.(\w+)\..+|(.*)_(?:orig|mask|g|v|u)")
_MAX_DEPTH = 16  # components of a prefix


@dataclass(frozen=True)
class NameFit:
    """The entries of a checkpoint by the names of a network.

    Attributes:
        prefix: what stands before the network's names in the file, with a dot at its end; may be empty.
        named: the entries under it by the network's names, and those that it does not know by their own.
        outside: names of other entries, but for those that only training needs.
        metadata: version numbers of modules by their path in the network, where the file has them.
        messages: lines for the user about what was stripped or left out.
    """

    prefix: str
    named: dict[str, Tensor]
    outside: list[str]
    metadata: dict[str, Any] | None
    messages: list[str]


def fit_names(module: nn.Module, state_dict: Mapping[str, Tensor]) -> NameFit:
    """Find the entries of ``state_dict`` that belong to ``module``.

    Raises:
        RedppError: several sets of entries fit, and differ.
    """
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    strip: Callable[[str], str] = canonical
    if _collide(map(canonical, own)) or _collide(map(canonical, state_dict)):
        strip = str  # a layer is called like a wrapper
    entries = {strip(name): value for name, value in state_dict.items()}
    prefixes, added = _fitting({strip(name): value for name, value in own.items()}, entries)
    prefix = _only(prefixes, entries)
    network = _Network(own, {strip(path): path for path, _ in module.named_modules()}, added)
    known = own.keys() | {name for name, _ in module.named_buffers()}
    named: dict[str, Tensor] = {}
    outside, idle = [], []
    for name, value in entries.items():
        if name.startswith(prefix):
            place, beyond = network.place(name.removeprefix(prefix))
            if place not in known and plain_name(place) not in own and _is_idle(beyond):
                idle.append(name)
            else:
                named[place] = value
        elif name.startswith(tuple(prefixes)) or _is_idle(_beyond(name, prefix)):
            idle.append(name)
        else:
            outside.append(name)
    messages = _renamings(state_dict, strip, prefix, added)
    if idle:
        messages.append(f"left out {len(idle)} entries that the network does not need: {shorten(idle)}")
    versions = {
        network.place(f"{strip(path)}.".removeprefix(prefix).rstrip("."))[0]: version
        for path, version in getattr(state_dict, "_metadata", {}).items()
        if f"{strip(path)}.".startswith(prefix)
    }
    return NameFit(prefix, named, outside, versions, messages)


def canonical(name: str) -> str:
    """Return a name or path without the components that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def is_computed(name: str) -> bool:
    """Return whether an entry is a buffer that modules compute themselves, or never read in evaluation."""
    return name.rpartition(".")[2] in COMPUTED


def tied_names(tensors: Mapping[str, Any]) -> list[list[str]]:
    """Return the names of tensors that are one and the same in memory, where there are several of them."""
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, value in tensors.items():
        if isinstance(value, Tensor) and not is_lazy(value) and value.numel() and value.device.type != "meta":
            groups[value.data_ptr(), value.shape, value.stride(), value.dtype].append(name)
    return [names for names in groups.values() if len(names) > 1]


@dataclass(frozen=True)
class _Network:
    """The names of a network.

    Attributes:
        own: its tensors.
        folders: the path of each module by its path without wrappers.
        added: the path of the part of it that the file holds, with a dot at its end; may be empty.
    """

    own: Mapping[str, Tensor]
    folders: Mapping[str, str]
    added: str

    def place(self, name: str) -> tuple[str, list[str]]:
        """Return the network's name for an entry, and the components of it that lead out of the known modules."""
        parts = (self.added + name).split(".")
        for k in range(len(parts) - 1, -1, -1):
            folder = self.folders.get(".".join(parts[:k]))
            if folder is not None:
                return ".".join([*([folder] if folder else []), *parts[k:]]), parts[k:]
        return name, parts


def _collide(names: Iterable[str]) -> bool:
    names = list(names)
    return len(set(names)) < len(names) or "" in names


def _fitting(own: Mapping[str, Tensor], entries: Mapping[str, Tensor]) -> tuple[list[str], str]:
    """Return the prefixes under which the file has all that the network needs, and the part of the network meant.

    Without any such prefix, return the one under which most of the network's names stand.
    """
    best: tuple[int, list[str], str] = (0, [""], "")
    for added in _common_paths(own):
        part = {name.removeprefix(added): value for name, value in own.items()}
        needed, covers = _covers(part, entries)
        full = [prefix for prefix, found in covers.items() if needed <= found]
        if not needed or "" in full:
            return [""], added
        if full:
            return full, added
        prefix = max(covers, key=lambda p: (len(covers[p]), -len(p)), default="")
        if len(covers.get(prefix, ())) > max(best[0], len(needed) // 2):
            best = (len(covers[prefix]), [prefix], added)
    return best[1], best[2]


def _covers(own: Mapping[str, Tensor], entries: Mapping[str, Tensor]) -> tuple[set[str], dict[str, set[str]]]:
    """Return what a network needs, and for each prefix of the file what stands under it with the right shape."""
    key = {name: name for name in own}  # a tensor counts under the first name of those that share its memory
    for names in tied_names(own):
        key.update(dict.fromkeys(names, names[0]))
    parts = {plain for name in own if (plain := plain_name(name)) is not None}
    key.update({name: plain for name in own if (plain := _whole(name)) in parts and plain is not None})
    needed = {key[name] for name in own if not is_computed(name)}
    covers: dict[str, set[str]] = defaultdict(set)
    for entry, value in entries.items():
        components = entry.split(".")
        for k in range(min(len(components), _MAX_DEPTH)):
            name = ".".join(components[k:])
            if name in own:
                found = key[name] if has_shape(own[name], value) else None
            else:
                plain = name if name in parts else plain_name(name)
                found = key.get(plain, plain if plain in parts else None) if plain else None
            if found is not None:
                covers["".join(f"{part}." for part in components[:k])].add(found)
    return needed, covers


def _whole(name: str) -> str | None:
    """Return the plain weight that an entry would be any part of: a mask, a norm, a direction."""
    if found := _PART.fullmatch(name):
        return "".join(part for part in found.groups() if part)
    return None


def _common_paths(own: Mapping[str, Tensor]) -> list[str]:
    """Return the paths that all of a network's tensors stand under, the empty one first."""
    split = [name.split(".")[:-1] for name in own]
    paths, shared = [""], []
    for level in zip(*split, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
        paths.append(".".join(shared) + ".")
    return paths


def _only(prefixes: list[str], entries: Mapping[str, Tensor]) -> str:
    """Return the prefix that fits; where several do, their tensors must be the same."""
    first, *others = prefixes
    under = {name.removeprefix(first): value for name, value in entries.items() if name.startswith(first)}
    for other in others:
        second = {name.removeprefix(other): value for name, value in entries.items() if name.startswith(other)}
        if not all(name in second and equal(value, second[name]) for name, value in under.items()):
            raise RedppError(
                f"several networks in the file fit the architecture, those under {shorten(prefixes)}",
                "one",
                f"choose one with --weights-key, as in --weights-key {first}",
            )
    return first


def has_shape(own: Tensor, value: Tensor) -> bool:
    """Return whether a tensor has the shape of the network's own; that of a lazy layer has none yet."""
    return is_lazy(own) or own.shape == value.shape


def equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same in type, shape and every number."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _beyond(name: str, prefix: str) -> list[str]:
    """Return the components of a name after those that it shares with a prefix."""
    components, shared = name.split("."), prefix.split(".")
    same = next((k for k, (a, b) in enumerate(zip(components, shared, strict=False)) if a != b), 0)
    return components[same:]


def _is_idle(components: list[str]) -> bool:
    """Return whether the last components of a name say that inference does not read the entry."""
    leaf = components[-1] if components else ""
    if leaf in COMPUTED or _COUNTERS.fullmatch(leaf):
        return True
    words = {word.lower() for component in components for word in _WORD.findall(component)}
    return bool(words & _TRAINING) or (bool(words & _SCORES) and leaf not in _PARAMETERS)


def _renamings(state_dict: Mapping[str, Tensor], strip: Callable[[str], str], prefix: str, added: str) -> list[str]:
    messages = []
    if strip is canonical:
        found = {part for name in state_dict for part in name.split(".") if part in WRAPPERS}
        if found:
            messages.append(f"stripped the names of wrappers: {shorten(f'{part}.' for part in sorted(found))}")
    if prefix:
        messages.append(f"stripped the prefix {prefix!r}")
    if added:
        messages.append(f"took the weights for the part {added.rstrip('.')!r} of the architecture, which is all of it")
    return messages
