"""Measure the handler throughput of a packaged pair.

Run ``python benchmarks/handler.py redpp-demo/digits --inputs HELD_OUT.npz``.

The two archives' own handlers, in one process, without server or network: the same requests at each batch size, in
ABBA order. First the answers are held against the graphs (a fast wrong answer is not measured), then every round
gives one ratio; the table has the median and a bootstrap interval of the median.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from redpp_serve.comparison.client import Payload
from redpp_serve.comparison.payloads import folder_payloads, read_payloads
from redpp_serve.graph.artifact import load
from redpp_serve.graph.executor import Program
from redpp_serve.handlers.payload import parse
from redpp_serve.handlers.torchserve import RedppHandler
from redpp_serve.machine import describe_machine
from redpp_serve.statistics.intervals import percentile_interval
from redpp_serve.variants import NAMES

BATCHES = (1, 2, 4, 8, 16)


class Arm:
    """One archive's handler, and what it answers."""

    def __init__(self, archive: Path, scratch: Path, threads: int) -> None:
        folder = scratch / archive.stem
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
        ignore: Any = lambda *args, **kwargs: None  # noqa: E731 - statuses and headers go to the server
        self.failures: list[Any] = []
        self.context = SimpleNamespace(
            system_properties={"model_dir": str(folder), "gpu_id": None, "batch_size": max(BATCHES)},
            model_yaml_config={"handler": {"threads": threads}},
            model_name="benchmark",
            manifest=json.loads((folder / "MAR-INF/MANIFEST.json").read_text()),
            get_all_request_header=lambda index: {},
            get_request_id=lambda index: None,
            set_response_header=ignore,
            set_response_content_type=ignore,
            set_response_status=lambda *args: self.failures.append(args),
        )
        self.handler = RedppHandler()
        self.handler.initialize(self.context)
        self.graph = load(folder / "model.redpp").graph

    def answer(self, payloads: list[Payload]) -> list[bytes]:
        return self.handler.handle([{"body": bytearray(p.body)} for p in payloads], self.context)

    def check(self, payloads: list[Payload]) -> None:
        """The batch's answers must be those of the unfused graph on the handler's own parsed inputs."""
        parsed = [parse({"body": p.body}, self.handler.model.inputs, self.handler.preprocess) for p in payloads]
        with torch.no_grad():
            expected = Program(self.graph)(*(torch.stack(column) for column in zip(*parsed, strict=True)))[0].numpy()
        got = np.array([json.loads(body)["outputs"][0] for body in self.answer(payloads)])
        if self.failures or not np.allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()):
            raise SystemExit(f"wrong answers: {self.failures[:1]}, largest difference {np.abs(got - expected).max()}")


def measure(
    arms: list[Arm], payloads: list[Payload], batch: int, rounds: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Inputs per second of both arms at one batch size, and the ratio of their times."""
    seconds = np.zeros((rounds, 2))
    for k in range(rounds):
        chosen = [payloads[i] for i in rng.integers(len(payloads), size=batch)]
        for arm in (0, 1, 1, 0):
            start = time.perf_counter()
            arms[arm].answer(chosen)
            seconds[k, arm] += time.perf_counter() - start
    ratio = percentile_interval(seconds[:, 0] / seconds[:, 1], 0.5, rng)
    medians = np.median(seconds, axis=0) / 2
    return {
        "batch": batch,
        "original_per_s": round(batch / medians[0], 1),
        "redpp_per_s": round(batch / medians[1], 1),
        "ratio": round(ratio.value, 3),
        "low": round(ratio.low, 3),
        "high": round(ratio.high, 3),
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--inputs", type=Path, help="as for redpp-serve compare")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    payloads = read_payloads(options.inputs) if options.inputs else folder_payloads(options.folder)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        arms = [Arm(options.folder / f"{variant}.mar", Path(scratch), options.threads) for variant in NAMES]
        for arm in arms:
            arm.check(payloads[:8])
        rows = [measure(arms, payloads, batch, options.rounds, rng) for batch in BATCHES]
    print(f"{'batch':>5} {'original/s':>11} {'redpp/s':>9}  ratio (95 % interval)")
    for row in rows:
        print(
            f"{row['batch']:>5} {row['original_per_s']:>11} {row['redpp_per_s']:>9}  "
            f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        )
    if options.out:
        report = json.loads((options.folder / "report.json").read_text())
        model = {
            key: {k: report[key][k] for k in ("parameters", "macs", "bytes", "accuracy") if k in report[key]}
            for key in ("original", "pruned")
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "environment": describe_machine(),
            "threads": options.threads,
            "model": {"name": report["name"], **model},
            "rows": rows,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
