"""The trial run of archives: right outputs pass; wrong ones, crashes and hangs are told apart and leave no process."""

import zipfile
from pathlib import Path

import numpy
import psutil
import pytest
import torch

import redpp_serve.packaging.trials as smoke
from redpp_serve.errors import RedppError
from redpp_serve.packaging.mar import build_mar
from redpp_serve.packaging.server_config import model_config
from redpp_serve.packaging.trials import run_trials, try_archive
from tests.support.served import SHAPE, VARIANTS, artifact, expected, network, npy, write_archives

X = numpy.random.default_rng(0).standard_normal(SHAPE, dtype=numpy.float32)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = write_archives(tmp_path_factory.mktemp("smoke"))
    return [folder / f"{variant}.mar" for variant in VARIANTS.values()]


def right(version: str) -> list[numpy.ndarray]:
    return [numpy.array(expected(version, torch.from_numpy(X)))]


def with_handler(archive: Path, path: Path, code: str) -> Path:
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, code.encode() if name == "handler.py" else source.read(name))
    return path


def run_archives(archives: list[Path], request: bytes, outputs: list[list[numpy.ndarray]]) -> list[dict[str, object]]:
    return run_trials([try_archive(archive, request, ys) for archive, ys in zip(archives, outputs)])


def no_child_left() -> bool:
    return not [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


def test_right_outputs_pass_with_their_time(archives: list[Path]) -> None:
    results = run_archives(archives, npy(X), [right(version) for version in VARIANTS])
    assert [r["archive"] for r in results] == ["original.mar", "pruned.mar"]
    assert all(0 < float(str(r["milliseconds"])) < 60_000 for r in results)


def test_other_outputs_are_refused_by_name(archives: list[Path]) -> None:
    with pytest.raises(RedppError, match="handler of pruned.mar failed.*other outputs than the network"):
        run_archives(archives, npy(X), [right("1.0"), [right("2.0")[0] * 1.01]])
    assert no_child_left()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precisions_pass_within_their_rounding_and_wrong_outputs_do_not(
    archives: list[Path], precision: str
) -> None:
    trial = lambda outputs: try_archive(archives[0], npy(X), outputs, precision)  # noqa: E731
    wrong = right("1.0")[0].copy()
    wrong.flat[0] += 0.2 * numpy.abs(wrong).max()
    run_trials([trial(right("1.0"))], precision)
    with pytest.raises(RedppError, match="original.mar.*other outputs than the network.*try --precision fp32"):
        run_trials([trial([wrong])], precision)
    if precision == "bf16":  # it is not taken for single precision
        with pytest.raises(RedppError, match="original.mar.*other outputs than the network"):
            run_trials([trial(right("1.0"))], "fp32")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_archive_with_one_wrong_weight_is_refused(tmp_path: Path, precision: str) -> None:
    graph = network()
    graph.tensors["lw"][2, 1] *= -1
    wrong = build_mar(
        artifact("1.0", graph), name="tiny", version="1.0", model_config=model_config(4, 20, 1, precision)
    )
    (tmp_path / "wrong.mar").write_bytes(wrong)
    with pytest.raises(RedppError, match="wrong.mar.*other outputs than the network"):
        run_trials([try_archive(tmp_path / "wrong.mar", npy(X), right("1.0"), precision)], precision)


def test_a_missing_output_is_refused(archives: list[Path]) -> None:
    with pytest.raises(RedppError, match="original.mar"):
        run_archives(archives[:1], npy(X), [[*right("1.0"), right("1.0")[0]]])


def test_a_refused_request_shows_what_the_handler_said(archives: list[Path]) -> None:
    with pytest.raises(RedppError, match="original.mar.*expected"):
        run_archives(archives[:1], npy(X[:1]), [right("1.0")])


def test_a_crash_shows_its_last_lines(archives: list[Path], tmp_path: Path) -> None:
    broken = with_handler(archives[0], tmp_path / "broken.mar", "raise ImportError('no module named sesame')")
    with pytest.raises(RedppError, match="broken.mar failed.*no module named sesame") as caught:
        run_archives([broken], npy(X), [right("1.0")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["silence", "interrupt"])
def test_a_handler_that_hangs_is_ended(
    archives: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    hung = with_handler(archives[0], tmp_path / "hung.mar", "import time\ntime.sleep(600)")
    monkeypatch.setattr(smoke, "TIMEOUT_S", 1.0)
    if how == "interrupt":
        monkeypatch.setattr(smoke, "_answer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run_archives([hung], npy(X), [right("1.0")])
    else:
        with pytest.raises(RedppError, match="hung.mar failed.*no answer in 1 s"):
            run_archives([hung], npy(X), [right("1.0")])
    assert no_child_left()
