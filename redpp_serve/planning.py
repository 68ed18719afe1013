"""`redpp-serve plan`: choose the kernels of both versions of a package on this machine."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from redpp_serve.capture.sniff import ZIP_ERRORS
from redpp_serve.errors import RedppError
from redpp_serve.packaging.mar import ARTIFACT
from redpp_serve.report.data import Report
from redpp_serve.report.folder import change_report, read_report
from redpp_serve.runtime.device import parse_device
from redpp_serve.runtime.model import ServingModel
from redpp_serve.runtime.planner import PLAN_SECONDS
from redpp_serve.variants import VARIANTS


def plan(
    folder: Path,
    *,
    device: str | None = None,
    precision: str | None = None,
    batch: int | None = None,
    threads: int | None = None,
    seconds: float = PLAN_SECONDS,
    everything: bool = False,
) -> dict[str, Any]:
    """Time the candidates for each layer of both versions, as a worker does at load, and keep the times for it.

    Args:
        folder: the folder that `package` wrote.
        device: ``cpu`` or ``cuda:N``; None: a GPU where there is one.
        precision: the precision; None: the package's.
        batch: the largest batch; None: the package's.
        threads: threads on a CPU; None: the package's.
        seconds: time budget for each version.
        everything: time also kernels that the rules would skip.

    Returns:
        `Plan.to_json` for ``original`` and ``pruned``.

    Raises:
        RedppError: the folder or the device cannot be used, or a network does not run in the precision.
    """
    where = str(parse_device(device))
    wanted = {"threads": threads, "batch_size": batch, "precision": precision}
    options: dict[str, Any] = {"threads": 1, "batch_size": 1, "precision": "fp32"} | _options(folder)
    options |= {name: value for name, value in wanted.items() if value is not None}
    for name in ("threads", "batch_size"):
        if type(options[name]) is not int or options[name] < 1:
            raise RedppError(
                f"{name} is {str(options[name])[:40]!r}",
                "a whole number of at least 1",
                f"give it with --{name.replace('_', '-')}",
            )
    torch.set_num_threads(options["threads"])
    found = {}
    for variant in VARIANTS:
        model = ServingModel(
            _artifact(variant.archive_in(folder)),
            where,
            precision=options["precision"],
            batch=options["batch_size"],
            plan_seconds=seconds,
            everything=everything,
        )
        found[variant.name] = model.plan.to_json()
    return found


def record(folder: Path, plans: dict[str, Any]) -> bool:
    """Put the plans into the folder's report.json and report.html; return False where they cannot be written."""
    return change_report(folder, lambda report: Report.from_json({**report.to_json(), "plan": plans}))


def _options(folder: Path) -> dict[str, Any]:
    try:
        return {name: value for name, value in read_report(folder).options.items() if value is not None}
    except RedppError:
        return {}


def _artifact(archive: Path) -> bytes:
    try:
        with zipfile.ZipFile(archive) as file:
            return file.read(ARTIFACT)
    except (*ZIP_ERRORS, KeyError) as error:
        raise RedppError(
            f"{archive} is no archive that can be planned ({error})",
            "a folder with original.mar and pruned.mar",
            "write one with 'redpp-serve package', and give that folder",
        ) from error
