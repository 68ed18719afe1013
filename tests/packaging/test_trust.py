"""What is served of a package is this project's own code, or the user vouches for it."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from redpp_serve import cli
from redpp_serve.errors import RedppError
from redpp_serve.files import deterministic_zip
from redpp_serve.options import ServerOptions
from redpp_serve.packaging.trust import check_package, check_tree
from redpp_serve.serving.serve import checked_name
from tests.support.former import former_package

Files = dict[str, bytes]


@pytest.fixture
def folder(packaged: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(packaged, tmp_path / "small")


def changed(archive: Path, change: Callable[[Files], object]) -> None:
    """Write an archive anew with other entries; it is whole."""
    with zipfile.ZipFile(archive) as whole:
        files = {name: whole.read(name) for name in whole.namelist()}
    change(files)
    archive.write_bytes(deterministic_zip(files))


def setting(key: str, value: str) -> Callable[[Files], object]:
    """Add a line to the settings of an archive."""
    return lambda files: files.update({"model-config.yaml": files["model-config.yaml"] + f"{key}: {value}\n".encode()})


def told(**changes: str) -> Callable[[Files], object]:
    """Change what an archive says about itself to TorchServe."""

    def change(files: Files) -> None:
        manifest = json.loads(files["MAR-INF/MANIFEST.json"])
        manifest["model"] |= changes
        files["MAR-INF/MANIFEST.json"] = json.dumps(manifest).encode()

    return change


HANDLERS = "redpp_serve/handlers"
ARCHIVES: dict[str, tuple[Callable[[Files], object], str]] = {
    "another handler": (lambda f: f.update({"handler.py": b"import os\n"}), "has another handler.py"),
    "another module": (lambda f: f.update({f"{HANDLERS}/torchserve.py": b""}), "has another redpp_serve/handlers/t"),
    "a module more": (lambda f: f.update({"torch.py": b"import os\n"}), "adds torch.py"),
    "compiled code": (
        lambda f: f.update({"redpp_serve/__pycache__/errors.cpython-311.pyc": b"x"}),
        "adds redpp_serve/__",
    ),
    "a library": (lambda f: f.update({"redpp_serve/kernels/fast.so": b"\x7fELF"}), "adds redpp_serve/kernels/fast.so"),
    "a module less": (lambda f: f.pop(f"{HANDLERS}/metrics.py"), "lacks redpp_serve/handlers/metrics.py"),
    "a blank more": (lambda f: f.update({"handler.py": f["handler.py"] + b"\n"}), "has another handler.py"),
    "another entry point": (told(handler="json:tool"), "MANIFEST.json of another form"),
    "requirements": (told(requirementsFile="requirements.txt"), "MANIFEST.json of another form"),
    "another setting": (setting("useVenv", "true"), "no release writes"),
    "a YAML tag": (setting("threads", "!!python/object/apply:os.system [ls]"), "no release writes"),
    "an alias": (lambda f: f.update({"model-config.yaml": b"threads: &a 1\n"}), "no release writes"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_with_other_code(folder: Path, name: str) -> None:
    change, says = ARCHIVES[name]
    changed(folder / "pruned.mar", change)
    with pytest.raises(RedppError, match="pruned.mar .*--trust-package") as caught:
        check_package(folder, "torchserve", name="small")
    assert says in caught.value.found
    check_package(folder, "torchserve", name="small", trust=True)
    check_package(folder, "triton", name="small")  # which has a copy of its own


MODEL = "triton/small"
REPOSITORIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another model": (lambda m: (m / "1" / "model.py").write_text("import os"), "has another model.py"),
    "a module more": (lambda m: (m / "2" / "torch.py").write_text(""), "adds torch.py"),
    "a module less": (lambda m: (m / "2" / "redpp_serve" / "errors.py").unlink(), "lacks redpp_serve/errors.py"),
    "another interpreter": (
        lambda m: with_config(
            m, 'parameters {\n  key: "EXECUTION_ENV_PATH"\n  value {\n    string_value: "/x"\n  }\n}\n'
        ),
        "EXECUTION_ENV_PATH",
    ),
    "another back end": (lambda m: with_config(m, 'backend: "shell"\n'), "asks for what no release does"),
    "another field": (lambda m: with_config(m, 'default_model_filename: "x.py"\n'), "no release writes"),
    "two fields in a line": (lambda m: with_config(m, 'name: "a" backend: "b"\n'), "no release writes"),
    "a file from elsewhere": (
        lambda m: with_config(m, 'input_data_file: "../../x"\n'),
        "asks for what no release does",
    ),
    "labels from elsewhere": (lambda m: with_config(m, 'label_filename: "../x"\n'), "asks for what no release does"),
    "an end too many": (lambda m: with_config(m, "}\n"), "no release writes"),
}


def with_config(model: Path, more: str) -> None:
    """Add lines to the configuration."""
    path = model / "config.pbtxt"
    path.write_text(path.read_text() + more)


@pytest.mark.parametrize("name", REPOSITORIES)
def test_model_repositories_with_other_code(folder: Path, name: str) -> None:
    change, says = REPOSITORIES[name]
    change(folder / MODEL)
    with pytest.raises(RedppError, match="--trust-package") as caught:
        check_package(folder, "triton", name="small")
    assert says in caught.value.found
    check_package(folder, "triton", name="small", trust=True)
    check_package(folder, "torchserve", name="small")


def test_own_packages_and_those_of_the_former_release_need_no_trust(packaged: Path, tmp_path: Path) -> None:
    former, _ = former_package(tmp_path)
    (former / MODEL / "1" / "redpp_serve" / "__pycache__").mkdir()  # a server was run in it
    (former / MODEL / "1" / "redpp_serve" / "__pycache__" / "errors.cpython-311.pyc").write_bytes(b"x")
    for folder in (packaged, former):
        for server in ("torchserve", "triton"):
            assert checked_name(folder, ServerOptions(server)) == "small"


@pytest.mark.parametrize("part", ["original.mar", "pruned.mar", "report.json", "inputs.npz", f"{MODEL}/1/model.redpp"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link", "circle", "folder"])
def test_parts_of_another_kind(folder: Path, part: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / part
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "circle":
        path.symlink_to(path.name)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/etc/passwd")
    assert cli.main(["compare", str(folder), "--server", "triton" if "triton" in part else "torchserve"]) == 2
    error = capsys.readouterr().err
    assert (path.name in error or part == "report.json") and "What to do" in error and len(error.splitlines()) == 1


def test_links_within_a_package_are_its_own(folder: Path) -> None:
    (folder / "original.mar").rename(folder / "whole")
    (folder / "original.mar").symlink_to("whole")
    check_tree(folder)
    check_package(folder, "torchserve", name="small")


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_bit_is_found_before_a_server_starts(folder: Path, place: float) -> None:
    path = folder / "pruned.mar"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:  # somewhere in an entry's content
        info = archive.getinfo("model.redpp")
    data[info.header_offset + 30 + len(info.filename) + int(place * info.file_size)] ^= 4
    path.write_bytes(data)
    with pytest.raises(RedppError, match="damaged at model.redpp"):
        check_package(folder, "torchserve", name="small", trust=True)


def test_a_test_that_attaches_to_a_server_starts_nothing_that_needs_trust(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    nginx = tmp_path / "bin/nginx"  # is looked for, and never started
    nginx.parent.mkdir()
    nginx.write_text("#!/bin/false\n")
    nginx.chmod(0o755)
    monkeypatch.setenv("PATH", str(nginx.parent), prepend=os.pathsep)
    changed(folder / "pruned.mar", ARCHIVES["another handler"][0])
    assert cli.main(["ab", "start", str(folder), "--split", "50:50"]) == 2
    assert "has another handler.py" in capsys.readouterr().err
    assert cli.main(["ab", "start", str(folder), "--split", "50:50", "--attach"]) == 2
    assert "no servers of kind torchserve run" in capsys.readouterr().err
