"""Options of the test run, and what several test modules share."""

import gc
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side: more threads would only wait for each other
logging.getLogger("torch.__trace").disabled = True  # pytest listens to it, and torch.export writes its whole trace down

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--overwrite", action="store_true", help="rewrite the golden files of tests/golden")


@pytest.fixture(scope="session", autouse=True)
def plan_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Times of kernels are taken quickly, into a file of this run, here and in every process that a test starts."""
    path = tmp_path_factory.mktemp("plans") / "plans.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDPP_PLAN_CACHE", str(path))
        patch.setenv("REDPP_PLAN_SECONDS", "2")
        yield path


@pytest.fixture(scope="session", autouse=True)
def state_home() -> Iterator[Path]:
    """State goes to a folder of this run, whose path is short enough for sockets and open to nginx's worker."""
    path = Path(tempfile.mkdtemp(prefix="redpp-state-", dir="/tmp"))
    path.chmod(0o711)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(path))
        yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """What is loaded when a module's tests begin stays: collections of garbage need not go through it again and again.

    That is a million objects of torch and of collected tests, a third of a second each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with ``golden/NAME.txt``; with ``--overwrite`` write it there instead."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--overwrite"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        assert path.is_file(), f"{path.name} is missing: run pytest with --overwrite and look at what it wrote"
        assert text == path.read_text(encoding="utf-8")

    return check


@pytest.fixture
def trials_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are tried in this process: for tests that are not about the processes of trials."""
    from redpp_serve.runtime import engine_times
    from tests.support.trials import TrialHere

    monkeypatch.setattr(engine_times, "Trial", TrialHere)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, trials_here: None) -> None:
    """Short pruning runs: few inputs, few networks around the chosen one, latencies measured in an instant."""
    from redpp_serve.pruning import inputs, pipeline, scales
    from redpp_serve.pruning.effort import Effort
    from redpp_serve.pruning.matching import SynthesisBudget

    effort = Effort(SynthesisBudget(32, 16, 4, 8, 16), frontier_points=3, latency_seconds=0.01, pace=1e-4)
    monkeypatch.setattr(pipeline, "STANDARD_EFFORT", effort)
    monkeypatch.setattr(scales, "_IMAGES_TO_MATCH", 2)
    monkeypatch.setattr(inputs, "_RANKED", 2)


@pytest.fixture(scope="session")
def packaged(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A package of the small network, merged exactly, with pre-processing; read only.

    One process of a run makes it, and each has a copy.
    """
    base = tmp_path_factory.getbasetemp()
    made = (base if worker_id == "master" else base.parent) / "made"
    with FileLock(f"{made}.lock"):
        if not made.exists():
            _package_small(made)
    return shutil.copytree(made, tmp_path_factory.mktemp("packaged") / "dist" / "small")


def _package_small(out: Path) -> None:
    from redpp_serve.handlers.preprocess import Preprocess
    from redpp_serve.options import Options, Serving
    from redpp_serve.packaging.package import package
    from tests.support.small import LABELS, SHIFT, captured, write_model

    package(
        captured(write_model(out.with_name("model"))),
        out,
        name="small",
        options=Options(method="red++"),
        serving=Serving(4, 1, 1),
        preprocess=Preprocess("L", 12, 12, (SHIFT,), (0.25,)),
        labels=LABELS,
    )


@pytest.fixture(scope="session")
def stock_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with everything that is installed here but this project."""
    home = tmp_path_factory.mktemp("stock") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True, timeout=120)
    python = home / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    there = Path(subprocess.check_output([python, "-c", where], text=True).strip())
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if "redpp" not in entry.name.lower() and not (there / entry.name).exists():
                (there / entry.name).symlink_to(entry)
    return python
