"""Every kind of file is told apart by its bytes, and each one that holds no network is refused with the next step."""

import gzip
import io
import pickle
import pickletools
import tarfile
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from redpp_serve.archives import open_zip
from redpp_serve.capture.sniff import FileKind, refusal, scan, shorten, sniff
from redpp_serve.errors import RedppError
from tests.attacks import files


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state.bin"
    torch.save(files.Net().state_dict(), path)
    return path


def test_state_dict_zip(state: Path) -> None:
    assert sniff(state) is FileKind.STATE_DICT
    assert scan(state).unsafe == ()
    assert "torch._utils._rebuild_tensor_v2" in scan(state).globals


def test_legacy_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "old.onnx"
    torch.save(files.Net().state_dict(), path, _use_new_zipfile_serialization=False)
    assert sniff(path) is FileKind.LEGACY_STATE_DICT


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [True, False])
def test_module_and_its_globals(tmp_path: Path, legacy: bool, protocol: int) -> None:
    path = tmp_path / "net.safetensors"
    torch.save(files.Net(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    assert sniff(path) is FileKind.MODULE
    assert "tests.attacks.files.Net" in scan(path).unsafe
    assert "torch.nn.modules.conv.Conv2d" in scan(path).unsafe
    assert not any("computed" in name for name in scan(path).globals)


@pytest.mark.parametrize("legacy", [True, False])
def test_objects_beside_tensors(tmp_path: Path, legacy: bool) -> None:
    path = files.poisoned_pickle(tmp_path / "x.pt", tmp_path / "marker", legacy=legacy)
    assert sniff(path) is FileKind.OBJECTS
    assert scan(path).unsafe == ("io.open",) or scan(path).unsafe == ("builtins.open",)
    assert not (tmp_path / "marker").exists()


def test_torchscript_and_exported_program(tmp_path: Path) -> None:
    assert sniff(files.torchscript(tmp_path / "x.pth", files.Net())) is FileKind.TORCHSCRIPT
    assert sniff(files.exported(tmp_path / "y.pt")) is FileKind.EXPORTED


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    safetensors.torch.save_file(files.Net().state_dict(), path)
    assert sniff(path) is FileKind.SAFETENSORS


@pytest.mark.parametrize("length", [0x280, 0x10280, 0x4034B50])
def test_safetensors_whose_header_length_looks_like_another_format(tmp_path: Path, length: int) -> None:
    """In bytes these lengths are the start of a pickle and of a zip."""
    path = files.safetensors(tmp_path / "x", {"a": files.entry(0, 8)}, bytes(8), length)
    assert sniff(path) is FileKind.SAFETENSORS


def test_kinds_say_whether_they_run_code() -> None:
    runs = {FileKind.MODULE, FileKind.OBJECTS, FileKind.TORCHSCRIPT, FileKind.EXPORTED}
    safe = {FileKind.STATE_DICT, FileKind.LEGACY_STATE_DICT, FileKind.SAFETENSORS, FileKind.INDEX, FileKind.ONNX}
    assert {kind for kind in FileKind if kind.runs_code} == runs
    assert {kind for kind in FileKind if kind.loadable} == runs | safe


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights"))
    return buffer.getvalue()


def _zip(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x")
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
REFUSED = {
    "html": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", FileKind.HTML, "login"),
    "html without doctype": (b"<HTML><head></head></HTML>", FileKind.HTML, "login"),
    "xml error": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", FileKind.HTML, "login"),
    "lfs": (LFS, FileKind.LFS_POINTER, "git lfs pull"),
    "empty": (b"", FileKind.EMPTY, "fetch"),
    "gzip": (gzip.compress(b"weights"), FileKind.ARCHIVE, "extract"),
    "tar": (_tar(), FileKind.ARCHIVE, "extract"),
    "other zip": (_zip("readme.md"), FileKind.OTHER_ZIP, "extract"),
    "json": (b'{"layers": [1, 2]}', FileKind.TEXT, "weights"),
    "json of one long word": (b'{"a234":{"b": 1}}', FileKind.TEXT, "weights"),
    "text cut inside a character": (b"a" + "é".encode() * 4096, FileKind.TEXT, "weights"),
    "plain pickle": (pickle.dumps({"a": [1.0]}), FileKind.PLAIN_PICKLE, "torch.save"),
    "number in a pickle": (pickle.dumps(1), FileKind.PLAIN_PICKLE, "torch.save"),
    "pickle with a huge string": (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\x00\x00abc", FileKind.TRUNCATED, "fetch"),
    "binary": (bytes(range(256)), FileKind.UNKNOWN, "torch.save"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(tmp_path: Path, name: str) -> None:
    content, kind, advice = REFUSED[name]
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert sniff(path) is kind
    error = refusal(path, kind)
    assert not kind.loadable
    assert str(path) in error.found and kind.value in error.found
    assert advice in error.do and "state_dict" in error.expected


def test_directory_lists_weights_inside(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").touch()
    assert sniff(tmp_path) is FileKind.DIRECTORY
    assert "weights.safetensors" in refusal(tmp_path, FileKind.DIRECTORY).do


def test_missing_and_special_files(tmp_path: Path) -> None:
    with pytest.raises(RedppError, match="does not exist"):
        sniff(tmp_path / "none.pt")
    with pytest.raises(RedppError, match="not a regular file"):
        sniff(Path("/dev/null"))


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
@pytest.mark.parametrize("save", ["state", "script"])
def test_truncated_zip(tmp_path: Path, state: Path, share: float, save: str) -> None:
    whole = state if save == "state" else files.torchscript(tmp_path / "script", files.Net())
    path = tmp_path / "cut.pt"
    path.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    assert sniff(path) is FileKind.TRUNCATED


def test_truncated_legacy_file(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(files.Net().state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:300])
    assert sniff(path) is FileKind.TRUNCATED


def test_damaged_pickle_in_zip(tmp_path: Path, state: Path) -> None:
    cut = files.rewritten(state, tmp_path / "x.pt", lambda name, data: data[:50] if name.endswith("data.pkl") else data)
    assert sniff(cut) is FileKind.TRUNCATED


@pytest.mark.parametrize("name", ["../x", "state/../../x", "/etc/x", "state\\..\\x", "C:\\x"])
def test_traversal(tmp_path: Path, state: Path, name: str) -> None:
    path = files.with_entry(state, tmp_path / "x.pt", name)
    with pytest.raises(RedppError, match="leads out of the archive"):
        sniff(path)


def test_duplicate_names(tmp_path: Path, state: Path) -> None:
    path = files.with_entry(state, tmp_path / "x.pt", "state/data.pkl")
    with pytest.raises(RedppError, match="two entries named 'state/data.pkl'"):
        sniff(path)


def test_zip_bomb(tmp_path: Path, state: Path) -> None:
    path = files.with_entry(state, tmp_path / "x.pt", "state/data/9", bytes(64 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(RedppError, match="zip bomb"):
        sniff(path)


def test_compression_alone_is_no_bomb(tmp_path: Path, state: Path) -> None:
    path = files.rewritten(state, tmp_path / "x.pt", lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert sniff(path) is FileKind.STATE_DICT


def test_encrypted_entry(tmp_path: Path, state: Path) -> None:
    path = tmp_path / "x.pt"
    data = bytearray(state.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # flag bit 0 of the first entry in the table of contents
    path.write_bytes(data)
    with pytest.raises(RedppError, match="encrypted"):
        open_zip(path)


def test_names_are_those_on_the_stack(tmp_path: Path) -> None:
    """The strings last pushed are others: POP has uncovered the ones below."""
    code = pickle.PROTO + b"\x04"
    for word in (b"os", b"system", b"collections"):
        code += pickle.SHORT_BINUNICODE + bytes([len(word)]) + word
    code += pickle.POP + pickle.STACK_GLOBAL + pickle.STOP
    path = tmp_path / "x.pkl"
    path.write_bytes(code)
    assert [op.name for op, _, _ in pickletools.genops(code)][-3:] == ["POP", "STACK_GLOBAL", "STOP"]
    assert scan(path).unsafe == ("os.system",)


def test_loader_of_nested_bytes_is_unsafe(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02ctorch.storage\n_load_from_bytes\n.")
    assert scan(path).unsafe == ("torch.storage._load_from_bytes",)


def test_shorten() -> None:
    assert shorten(["a", "b"]) == "a, b"
    assert shorten("abcdefg", limit=2) == "a, b and 5 more"
    assert len(shorten(["x" * 500])) == 80
