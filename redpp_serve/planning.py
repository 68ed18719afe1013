"""`redpp-serve plan`: choose the engine and kernels of both versions of a package on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import load
from redpp_serve.options import PlanOptions, Serving, takes
from redpp_serve.packaging.bounds import check_answers
from redpp_serve.packaging.mar import artifact_bytes
from redpp_serve.packaging.trust import check_tree
from redpp_serve.report.data import Report
from redpp_serve.report.folder import change_report, read_report
from redpp_serve.runtime.device import parse_device
from redpp_serve.runtime.engine_choice import check_engine_here
from redpp_serve.runtime.memory import keep_blocks
from redpp_serve.runtime.model import ServingModel
from redpp_serve.variants import VARIANTS


def plan(folder: Path, options: PlanOptions = PlanOptions()) -> dict[str, Any]:
    """Time engines, and kernels for each layer, of both versions as a worker does at load, and keep the times for it.

    Args:
        folder: the folder that `package` wrote.
        options: where and how long to time; what they leave open is the package's.

    Returns:
        `Plan.to_json` for ``original`` and ``pruned``.

    Raises:
        RedppError: the folder, the device or the engine cannot be used, or a network does not run in the precision.
    """
    device = parse_device(options.device)
    where, serving = str(device), served_as(folder, options)
    check_engine_here(serving["engine"], device)
    torch.set_num_threads(serving["threads"])
    keep_blocks()  # as in a worker, whose times these are
    found = {}
    check_tree(folder)
    for variant in VARIANTS:
        check_answers(load(artifact_bytes(variant.archive_in(folder))).graph, serving["batch_size"])
    for variant in VARIANTS:
        model = ServingModel(
            artifact_bytes(variant.archive_in(folder)),
            where,
            precision=serving["precision"],
            batch=serving["batch_size"],
            plan_seconds=options.time_budget,
            engine=serving["engine"],
            everything=options.all,
        )
        found[variant.name] = model.plan.to_json()
    return found


def served_as(folder: Path, options: PlanOptions = PlanOptions()) -> dict[str, Any]:
    """Return ``threads``, ``batch_size``, ``precision`` and ``engine`` of a package; those in ``options`` go before.

    Raises:
        RedppError: a number that is none.
    """
    serving: dict[str, Any] = {"threads": 1, "batch_size": 1, "precision": "fp32", "engine": "auto"}
    reported = _options(folder)
    for name in serving:
        value = getattr(options, name, None)
        serving[name] = reported.get(name, serving[name]) if value is None else value
    for name in ("precision", "engine"):
        if not isinstance(serving[name], str):
            choices = " or ".join(takes(Serving, name))
            raise RedppError(f"{name} is {str(serving[name])[:40]!r}", choices, f"give it with --{name}")
    for name in ("threads", "batch_size"):
        limits = takes(Serving, name)
        if type(serving[name]) is not int or serving[name] not in limits:
            raise RedppError(
                f"{name} is {str(serving[name])[:40]!r}", str(limits), f"give it with --{name.replace('_', '-')}"
            )
    return serving


def record(folder: Path, plans: dict[str, Any]) -> bool:
    """Put the plans into the folder's report.json and report.html; return False where they cannot be written."""
    return change_report(folder, lambda report: Report.from_json({**report.to_json(), "plan": plans}))


def _options(folder: Path) -> dict[str, Any]:
    try:
        return {name: value for name, value in read_report(folder).options.items() if value is not None}
    except RedppError:
        return {}
