"""Documents beside a network, and archives of one, that claim what no sound ones do."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import ones

Maker = Callable[[Path], Any]
DEEP = 100_000
STEERING = "\x1b]0;owned\x07\x1b[2J\u202e"


def options(*lines: str) -> str:
    """Return the section of ``package`` with these options."""
    return "package:\n" + "".join(f"  {line}\n" for line in lines)


# redpp.yaml, read by ``package --config`` and ``config``
OPTIONS: dict[str, str] = {
    "a million digits": options(f"input: {'9' * 40_000}x{'9' * 20_000}"),
    "sizes that overflow": options(f"input: {'x'.join(['9999999999'] * 100)}"),
    "sizes as large as they may be": options("input: 1024x1024x1024"),
    "ten thousand sizes": options(f"input: {'x'.join(['1'] * 10_000)}"),
    "a range of many digits": options(f"input: 4:int64:0..{'9' * 50_000}"),
    "a range that overflows": options(f"input: 4:int64:-{1 << 63}..{1 << 63}"),
    "a letter of any size": options("input: 1xHxW", "range: [H=1..9999999999, W=1..9999999999/1]"),
    "nested lists": "[" * 30_000,
    "nested objects": '{"a":' * 10_000,
    "nested blocks": "".join(f"{' ' * k}a:\n" for k in range(340)),
    "aliases of aliases": "a0: &a0 [x]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 60)),
    "an alias of itself": "package: &a {input: *a}\n",
    "a merge of itself": "package: &a {<<: *a}\n",
    "a tag of Python": options('input: !!python/object/apply:os.system ["touch $REDPP_MARKER"]'),
    "steering keys": json.dumps({STEERING: {"input": "1"}}),
    "steering values": json.dumps({"package": {"input": STEERING, "time-budget": STEERING}}),
    "numbers beyond floats": options("time-budget: 1e999", "max-error: .nan"),
    "digits for a number": options(f"time-budget: {'9' * 5000}"),
    "JSON nested in an option": options(f"""input-args: '{{"a":{"[" * 20_000}'"""),
}
# the names of classes, read by ``package --labels``
LABELS: dict[str, str] = {
    "nested lists": "[" * DEEP,
    "nested objects": '{"id2label":' * DEEP,
    "closed nested lists": "[" * 900 + "]" * 900,
    "a number of many digits": "[" + "9" * 100_000 + "]",
    "steering names": json.dumps([STEERING, "a"]),
    "a number": '{"id2label": 7}',
    "keys of many digits": json.dumps({"9" * 5000: "a"}),
    "sixteen MB of lines": "\n" * (16 << 20),
    "eight million names": "a\n" * (8 << 20),
    "a text beyond the limit": "a" * ((16 << 20) + 1),
}
# config.json beside weights, read by ``inspect`` and ``package``
CONFIGS: dict[str, str] = {
    "nested lists": "[" * DEEP,
    "closed nested objects": '{"a":' * 900 + "1" + "}" * 900,
    "numbers of many digits": '{"hidden_size": ' + "9" * 4000 + "}",
    "numbers of too many digits": '{"hidden_size": ' + "9" * 100_000 + "}",
    "numbers beyond floats": '{"architecture": "resnet18", "num_classes": 1e999}',
    "an architecture that steers": json.dumps({"architecture": STEERING}),
    "an architecture that is a list": json.dumps({"architecture": ["resnet18"], "architectures": [["x"]]}),
    "a million keys": json.dumps(dict.fromkeys(map(str, range(300_000)), 0)),
}


def index(**files: str) -> Maker:
    """Make an index of tensors in these files."""
    return lambda path: path.write_text(json.dumps({"metadata": {}, "weight_map": files}))


def _beside(path: Path, name: str, put: Maker) -> None:
    put(path.parent / name)
    index(w=name)(path)


# *.index.json, read by ``inspect`` and ``package``
INDICES: dict[str, Maker] = {
    "a file above": index(w="../../etc/passwd"),
    "a file at the root": index(w="/etc/passwd"),
    "a file above on Windows": index(w="..\\x"),
    "the folder": index(w="."),
    "the index itself": lambda path: index(w=path.name)(path),
    "another index": lambda path: _beside(path, "b.index.json", index(w=path.name)),
    "a link out": lambda path: _beside(path, "link", lambda part: part.symlink_to("/etc/passwd")),
    "a pipe": lambda path: _beside(path, "pipe", os.mkfifo),
    "a device": lambda path: _beside(path, "zero", lambda part: part.symlink_to("/dev/zero")),
    "names that steer": lambda path: _beside(path, STEERING, lambda part: part.write_bytes(save({"w": ones(1)}))),
    "a tensor that is not there": lambda path: _beside(path, "s", lambda part: part.write_bytes(save({"v": ones(1)}))),
    "a thousand and one files": index(**{f"w{k}": f"f{k}" for k in range(1001)}),
    "nested objects": lambda path: path.write_text('{"weight_map": ' + '{"a":' * DEEP),
    "numbers for names": lambda path: path.write_text('{"weight_map": {"w": 1e999}}'),
}


def zipped(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> None:
    """Write a zip of these entries after those of a state_dict."""
    from torch import save as save_file

    save_file({"w": ones(4)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        for name, data in entries:
            archive.writestr(name, data)


def link(name: str, target: str) -> tuple[zipfile.ZipInfo, bytes]:
    """Return the entry of a link."""
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info, target.encode()


def tiny_members(path: Path, count: int) -> None:
    """A zip of so many empty members, which share one record of 30 bytes and differ in the table of contents."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for k in range(1000):
            archive.writestr(f"{k:07d}", b"")
    whole = stream.getvalue()
    start = whole.index(b"PK\x01\x02")
    row = whole[start : start + 46 + 7]
    table = b"".join(row[:46] + b"%07d" % k for k in range(count))
    size, place = len(table).to_bytes(8, "little"), start.to_bytes(8, "little")
    number = count.to_bytes(8, "little")
    end64 = b"PK\x06\x06" + (44).to_bytes(8, "little") + b"\x2d\x00\x2d\x00" + bytes(8) + number * 2 + size + place
    locator = b"PK\x06\x07" + bytes(4) + (start + len(table)).to_bytes(8, "little") + b"\x01\x00\x00\x00"
    end = b"PK\x05\x06" + bytes(4) + b"\xff" * 4 + b"\xff" * 8 + bytes(2)
    path.write_bytes(whole[:start] + table + end64 + locator + end)


# archives, read by ``inspect`` and ``package``
ARCHIVES: dict[str, Maker] = {
    "a link in place of weights": lambda path: zipped(path, link("archive/data/1", "/etc/passwd")),
    "a link out": lambda path: zipped(path, link("archive/../../x", "/etc/passwd")),
    "a device": lambda path: zipped(path, (_special("archive/data/7"), b"")),
    "a million tiny members": lambda path: tiny_members(path, 1_000_000),
    "half a million tiny members": lambda path: tiny_members(path, 500_000),
    "names that steer": lambda path: zipped(path, (f"archive/{STEERING}", b"x")),
    "a name of 60,000 letters": lambda path: zipped(path, ("archive/" + "a" * 60_000, b"x")),
    "names that differ in case": lambda path: zipped(path, ("archive/DATA.PKL", b"x"), ("archive/Data.pkl", b"x")),
    "folders in folders": lambda path: zipped(path, ("archive/" + "a/" * 30_000, b"")),
}


def _special(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFCHR | 0o777) << 16
    return info


def write_beside(path: Path, content: str, network: Path) -> None:
    """Write a document, and a copy of a sound network beside it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    shutil.copy(network, path.parent / "model.pt")
