"""The trial run of archives: right outputs pass; wrong ones, crashes and hangs are told apart and leave no process."""

import _thread
import json
import re
import signal
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from redpp_serve.errors import RedppError
from redpp_serve.options import Serving
from redpp_serve.packaging.mar import build_mar
from redpp_serve.packaging.server_config import model_config
from redpp_serve.packaging.trials import Trial, run_trials, try_archive
from tests.support.served import SHAPE, VARIANTS, built, expected, network, npy, write_archives

X = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = write_archives(tmp_path_factory.mktemp("smoke"))
    return [folder / f"{variant}.mar" for variant in VARIANTS.values()]


def right(version: str) -> dict[str, np.ndarray]:
    return {"output_0": np.array(expected(version, torch.from_numpy(X)))}


def with_handler(archive: Path, path: Path, code: str) -> Path:
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, code.encode() if name == "handler.py" else source.read(name))
    return path


def answering(folder: Path, *outputs: object, precision: str = "fp32") -> Trial:
    """Return a trial whose program prints these outputs at once, with the first version's as the expected ones."""
    program = folder / "program.py"
    program.write_text(f"print('{json.dumps({'milliseconds': 1.0, 'reply': {'outputs': outputs}})}')")
    return Trial("some.mar", (str(program),), {}, right("1.0"), precision, modules=())


def no_child_left() -> bool:
    return not [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.exhaustive
def test_right_outputs_pass_in_every_precision_with_their_time(archives: list[Path]) -> None:
    trials = [try_archive(archive, npy(X), right(v)) for archive, v in zip(archives, VARIANTS, strict=True)]
    half = [try_archive(archives[0], npy(X), right("1.0"), precision) for precision in ("fp16", "bf16")]
    results = run_trials([*trials, *half])
    assert [r["archive"] for r in results] == ["original.mar", "pruned.mar", "original.mar", "original.mar"]
    assert all(0 < float(str(r["milliseconds"])) < 60_000 for r in results)
    with pytest.raises(RedppError, match="original.mar.*other outputs than the network"):
        run_trials([replace(half[1], precision="fp32")])  # bf16 is not taken for single precision
    run_trials([replace(half[1], precision="fp32", half="bf16")])  # weights of 16 bits round as that precision does


def test_other_outputs_are_refused_by_name(archives: list[Path], tmp_path: Path) -> None:
    good = answering(tmp_path, right("1.0")["output_0"].tolist())
    run_trials([good])
    wrong = replace(good, name="wrong.mar", outputs={"output_0": right("1.0")["output_0"] * 1.01})
    with pytest.raises(RedppError, match="handler of wrong.mar failed.*other outputs than the network"):
        run_trials([good, wrong])
    assert no_child_left()
    other = right("1.0")["output_0"].copy()
    other.flat[0] += 0.2 * np.abs(other).max()
    for precision in ("fp16", "bf16"):
        with pytest.raises(RedppError, match="some.mar.*other outputs than the network.*try --precision fp32"):
            run_trials([answering(tmp_path, other.tolist(), precision=precision)])
    for outputs in ([], [right("1.0")["output_0"].tolist()] * 2, [right("1.0")["output_0"].tolist()[:-1]]):
        with pytest.raises(RedppError, match="some.mar"):
            run_trials([answering(tmp_path, *outputs)])


@pytest.mark.exhaustive
def test_an_archive_with_one_wrong_weight_is_refused(tmp_path: Path) -> None:
    graph = network()
    graph.tensors["lw"][2, 1] *= -1
    for precision in ("fp32", "bf16"):
        config = model_config(Serving(4, 20, 1, precision))
        wrong = build_mar(built("1.0", graph), name="tiny", model_config=config)
        (tmp_path / "wrong.mar").write_bytes(wrong)
        with pytest.raises(RedppError, match="wrong.mar.*other outputs than the network"):
            run_trials([try_archive(tmp_path / "wrong.mar", npy(X), right("1.0"), precision)])


def test_a_refused_request_shows_what_the_handler_said(archives: list[Path]) -> None:
    with pytest.raises(RedppError, match="original.mar.*expected"):
        run_trials([try_archive(archives[0], npy(X[:1]), right("1.0"))])


def test_a_crash_shows_its_last_lines(archives: list[Path], tmp_path: Path) -> None:
    broken = with_handler(archives[0], tmp_path / "broken.mar", "raise ImportError('no module named sesame')")
    with pytest.raises(RedppError, match="broken.mar failed.*no module named sesame") as caught:
        run_trials([try_archive(broken, npy(X), right("1.0"))])
    assert "\n" not in str(caught.value)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, even where the test run was started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_handler_that_hangs_is_ended(archives: list[Path], tmp_path: Path, interruptible: None) -> None:
    hung = with_handler(archives[0], tmp_path / "hung.mar", "import time\ntime.sleep(600)")
    trial = replace(try_archive(hung, npy(X), right("1.0")), modules=())  # so that it hangs before a second has passed
    with pytest.raises(RedppError, match="hung.mar failed.*no answer in 1 s"):
        run_trials([trial], timeout_s=1.0)
    assert no_child_left()
    timer = threading.Timer(1.0, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run_trials([trial])
    timer.join()
    assert no_child_left()


def test_a_process_that_a_handler_leaves_behind_is_ended(archives: list[Path], tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = (
        "import subprocess, sys\n"
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(note)!r}, 'w').write(str(left.pid))\nraise SystemExit"
    )
    with pytest.raises(RedppError, match="leaving.mar failed"):
        run_trials([try_archive(with_handler(archives[0], tmp_path / "leaving.mar", code), npy(X), right("1.0"))])
    _, alive = psutil.wait_procs([p for p in psutil.process_iter() if p.pid == int(note.read_text())], timeout=10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_programs_import_nothing_of_the_installed_project() -> None:
    """They run the code that was packaged; test_mar and test_triton_repository show the same of what they import."""
    for path in files("redpp_serve.packaging.trials").iterdir():
        if path.name.endswith(".py") and path.name != "__init__.py":
            assert not re.search(r"^\s*(from|import) (redpp_serve|\.)", path.read_text(), re.M), path.name
