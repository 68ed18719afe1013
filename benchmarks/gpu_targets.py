"""What was wanted of the GPU runtime, held against a run's cells, and the tables that a person reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Row = dict[str, Any]
CODEBOOK_TIMES = {(4096, 4096): 2.0, (4096, 25088): 3.0}  # (n_out, n_in): cold, over the dense library call
CODEBOOK_ROWS, PEER_ROWS = 8, 32
PEERS = ("gemlite", "nf4")
COMPILED_TIMES, COMPILED_BATCH = 1.3, 8
STOCK_TIMES, STOCK_BATCH = 3.0, 1
PLANNED_TIMES = 0.98
COMPILED = "torch.compile max-autotune"


@dataclass(frozen=True)
class Target:
    """``value`` is the worst of what was measured, None for nothing; ``detail`` says where, or why there is none."""

    name: str
    wanted: float
    value: float | None
    detail: str

    @property
    def verdict(self) -> str:
        return "not measured" if self.value is None else "met" if self.value >= self.wanted else "missed"

    @property
    def line(self) -> str:
        figure = "" if self.value is None else f" {self.value:.2f}"
        detail = f"; {self.detail}" if self.detail else ""
        return f"{self.verdict}: {self.name}:{figure} (at least {self.wanted:g} wanted){detail}"

    def to_json(self) -> Row:
        return {**asdict(self), "verdict": self.verdict}


def evaluate(rows: Sequence[Row]) -> list[Target]:
    """Every target of the runtime. One that a run did not reach at all its points says which are missing."""
    linear = [row for row in rows if row["section"] == "linear" and "peer" not in row]
    networks = [row for row in rows if row["section"] == "network"]
    return [
        *_codebook(linear),
        *_peers(linear),
        *_networks(networks),
        _planned([r for r in rows if r["section"] == "planned"]),
    ]


def worst(name: str, wanted: float, found: Iterable[tuple[str, float | None]]) -> Target:
    """The target over several points: the smallest value counts, and points without one are named."""
    points = list(found)
    measured = [(value, where) for where, value in points if value is not None]
    missing = [where for where, value in points if value is None]
    detail = f"without {', '.join(missing)}" if missing and measured else ""
    if not measured:
        return Target(name, wanted, None, "")
    value, where = min(measured)
    return Target(name, wanted, value, "; ".join(filter(None, [f"worst at {where}", detail])))


def median_us(row: Row, name: str, state: str = "cold") -> float | None:
    """Median microseconds of a contender, None without a time."""
    times = row["contenders"].get(name, {}).get(f"{state}_us")
    return times[0] if times else None


def best(row: Row, prefix: str, state: str = "cold") -> tuple[float, str] | None:
    """The fastest contender whose name starts so, which is what a planner that times all of them takes."""
    times = [(median_us(row, name, state), name) for name in row["contenders"] if name.startswith(prefix)]
    return min(((time, name) for time, name in times if time is not None), default=None)


def quotient(over: float | None, under: float | None) -> float | None:
    return None if over is None or under is None else over / under


def _codebook(linear: Sequence[Row]) -> list[Target]:
    found = []
    for (n_out, n_in), wanted in CODEBOOK_TIMES.items():
        for count in (16, 8):
            points = []
            for row in linear:
                if (row["n_out"], row["n_in"]) == (n_out, n_in) and row["rows"] <= CODEBOOK_ROWS:
                    fastest = best(row, f"codebook{count}:")
                    where = f"{row['rows']} rows" + (f" with {fastest[1].partition(':')[2]}" if fastest else "")
                    points.append((where, quotient(median_us(row, "dense"), fastest and fastest[0])))
            name = f"codebook of {count} over cuBLAS fp16, {n_out}x{n_in}, up to {CODEBOOK_ROWS} rows, cold"
            found.append(worst(name, wanted, points))
    return found


def _peers(linear: Sequence[Row]) -> list[Target]:
    found = []
    for peer in PEERS:
        points = []
        for row in (row for row in linear if row["rows"] <= PEER_ROWS):
            fastest = best(row, "codebook16:")
            points.append(
                (
                    f"{row['n_out']}x{row['n_in']}, {row['rows']} rows",
                    quotient(median_us(row, peer), fastest and fastest[0]),
                )
            )
        found.append(worst(f"codebook of 16 over {peer}, up to {PEER_ROWS} rows, cold", 1.0, points))
    return found


def _networks(networks: Sequence[Row]) -> list[Target]:
    apart = {(row["network"], row["batch"]): row for row in networks if "peer" in row}
    plain = [row for row in networks if "peer" not in row]
    large = [row for row in plain if row["batch"] >= COMPILED_BATCH]
    single = [row for row in plain if row["batch"] == STOCK_BATCH]

    def over(reference: str, rows: Iterable[Row]) -> list[tuple[str, float | None]]:
        return [
            (
                f"{row['network']}, batch {row['batch']}",
                quotient(median_us(row, reference, "device"), median_us(row, "pruned", "device")),
            )
            for row in rows
        ]

    compiled = over(COMPILED, (apart.get((row["network"], row["batch"]), row) for row in large))
    return [
        worst(f"pruned over {COMPILED} of the original, batch {COMPILED_BATCH} and more", COMPILED_TIMES, compiled),
        worst("pruned over the stock eager handler (fp32), batch 1", STOCK_TIMES, over("stock fp32", single)),
        worst("pruned over the stock eager handler in fp16, batch 1", STOCK_TIMES, over("stock fp16", single)),
    ]


def _planned(planned: Sequence[Row]) -> Target:
    points = []
    for row in planned:
        times = [(name, cell.get("warm_ratio")) for name, cell in row["contenders"].items() if name != row["reference"]]
        points += [
            (f"{row['network']} {row['version']} {row['layer']} batch {row['batch']} ({name})", r[0] if r else None)
            for name, r in times
        ]
    return worst("what the planner chooses over dense, measured again", PLANNED_TIMES, points)


def text(result: Row) -> str:
    """All tables and the targets of a result."""
    rows = result["rows"]
    parts = [
        _linear_table([r for r in rows if r["section"] == "linear"]),
        _conv_table([r for r in rows if r["section"] == "conv"]),
        _network_table([r for r in rows if r["section"] == "network"]),
    ]
    failures = sorted(
        {f"{name}: {cell['failed']}" for row in rows for name, cell in row["contenders"].items() if "failed" in cell}
    )
    if failures:
        parts.append("Without a time:\n" + "\n".join(f"  {line[:200]}" for line in failures))
    if result["not reached"]:
        counted = Counter((" ".join(key.split()[:2]), why) for key, why in result["not reached"].items())
        lines = [f"  {count} of {name}: {why}" for (name, why), count in counted.items()]
        parts.append("Not reached (each is named in the file):\n" + "\n".join(lines))
    parts.append(
        "\n".join(Target(**{k: t[k] for k in ("name", "wanted", "value", "detail")}).line for t in result["targets"])
    )
    return "\n\n".join(filter(None, parts))


def _cell(row: Row, name: str | None) -> str:
    if name is None:
        return f"{'-':>18}"
    cold, warm = median_us(row, name), median_us(row, name, "warm")
    return f"{'-':>18}" if cold is None or warm is None else f"{cold:>9.2f} {warm:>8.2f}"


def _linear_table(rows: Sequence[Row]) -> str:
    rows = sorted((r for r in rows if "peer" not in r), key=lambda r: (-r["n_out"] * r["n_in"], r["rows"]))
    if not rows:
        return ""
    names = ("dense", "fused", "codebook16", "codebook8", "int4pack", "nf4", "gemlite", "fp8")
    lines = [
        "Linear, microseconds (cold, warm L2); the fastest decode strategy of each codebook, and its roofline share",
        f"{'n_out x n_in':>13}{'rows':>5}" + "".join(f"{name:>18}" for name in names) + "  codebook16/dense",
    ]
    for row in rows:
        cells, fastest = [], best(row, "codebook16:")
        for name in names:
            found = best(row, f"{name}:") if name.startswith("codebook") else (0.0, name)
            cells.append(_cell(row, found and found[1]))
        against = quotient(median_us(row, "dense"), fastest and fastest[0])
        share = row["contenders"][fastest[1]]["roofline_share"] if fastest else None
        shape = f"{row['n_out']}x{row['n_in']}"
        tail = "" if against is None else f"{against:>8.2f} {fastest[1].partition(':')[2]}, share {share:.2f}"
        lines.append(f"{shape:>13}{row['rows']:>5}{''.join(cells)}{tail}")
    return "\n".join(lines)


def _conv_table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    names = ("dense", "cudnn", "fused", "depthwise", "split")
    lines = [
        "Convolutions with epilogue, microseconds (cold, warm L2)",
        f"{'layer':34}{'batch':>6}{'width':>6}" + "".join(f"{name:>18}" for name in names) + "  best/dense, cold",
    ]
    for row in rows:
        fastest = min(((time, n) for n in names[1:] if (time := median_us(row, n)) is not None), default=None)
        against = quotient(median_us(row, "dense"), fastest and fastest[0])
        tail = "" if against is None else f"{against:>8.2f} {fastest[1]}"
        lines.append(
            f"{row['layer']:34}{row['batch']:>6}{row['width']:>6}{''.join(_cell(row, n) for n in names)}{tail}"
        )
    return "\n".join(lines)


def _network_table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [
        "Networks: milliseconds with inputs on the GPU and on the host (median), images/s, peak MB, MB of weights, "
        "times stock fp32"
    ]
    for row in rows:
        for name, cell in row["contenders"].items():
            if "failed" not in cell:
                device, host = cell["device_us"][0], cell["host_us"][0]
                stock = quotient(median_us(row, "stock fp32", "device"), device)
                lines.append(
                    f"{row['network']:16}{row['batch']:>5} {name:28}{device / 1e3:>9.3f}{host / 1e3:>9.3f}"
                    f"{cell['images_per_s']:>10.0f}"
                    f"{cell['peak_mb']:>9.0f}{cell['weight_mb']:>8.1f}" + (f"{stock:>8.2f}" if stock else "")
                )
    return "\n".join(lines)
