"""`redpp-serve plan`: choose the engine and kernels of both versions of a package on this machine."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from redpp_serve.capture.sniff import ZIP_ERRORS
from redpp_serve.errors import RedppError
from redpp_serve.options import PlanOptions
from redpp_serve.packaging.mar import ARTIFACT
from redpp_serve.report.data import Report
from redpp_serve.report.folder import change_report, read_report
from redpp_serve.runtime.device import parse_device
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
        RedppError: the folder or the device cannot be used, or a network does not run in the precision.
    """
    where = str(parse_device(options.device))
    serving = served_as(folder, options)
    torch.set_num_threads(serving["threads"])
    found = {}
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
    for name in ("threads", "batch_size"):
        if type(serving[name]) is not int or serving[name] < 1:
            raise RedppError(
                f"{name} is {str(serving[name])[:40]!r}",
                "a whole number of at least 1",
                f"give it with --{name.replace('_', '-')}",
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


def artifact_bytes(archive: Path) -> bytes:
    """Return the artifact in an archive.

    Raises:
        RedppError: no archive, or one without an artifact.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            return file.read(ARTIFACT)
    except (*ZIP_ERRORS, KeyError) as error:
        raise RedppError(
            f"{archive} is no archive that can be planned ({error})",
            "a folder with original.mar and pruned.mar",
            "write one with 'redpp-serve package', and give that folder",
        ) from error
