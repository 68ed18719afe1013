"""Files and folders of other programs are named, with what to do, and none is taken for another."""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from redpp_serve.capture.load import load_file
from redpp_serve.capture.sniff import FileKind, sniff
from redpp_serve.errors import RedppError


def field(number: int, data: bytes) -> bytes:
    """A field of a protobuf message."""
    length, size = len(data), b""
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + data


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return buffer.getvalue()


def of_module(name: str) -> bytes:
    return b"\x80\x04c" + name.encode() + b"\nThing\n)\x81."


FILES: dict[str, tuple[bytes, str]] = {
    "keras h5": (b"\x89HDF\r\n\x1a\n" + bytes(90), "HDF5"),
    "keras 3": (zipped("metadata.json", "config.json", "model.weights.h5"), "Keras model"),
    "saved model": (b"\x08\x01" + field(2, field(1, b"\x2a\x05serve" * 60)), "TensorFlow SavedModel"),
    "frozen graph": (field(1, field(1, b"x") + field(2, b"Placeholder")) * 3, "TensorFlow graph"),
    "tf checkpoint": (bytes(range(40)) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", "TensorFlow checkpoint"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(50), "TensorFlow Lite"),
    "tensorrt": (b"ftrt" + bytes(50), "TensorRT engine"),
    "tensorrt of ultralytics": (struct.pack("<i", 40) + b'{"description": "", "stride": 32}' + bytes(20), "TensorRT"),
    "core ml": (b"\x08\x04" + field(2, field(1, field(1, b"image"))) + field(200 >> 3, b"rest"), "Core ML model"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(50), "GGUF"),
    "npz": (zipped("a.npy", "b.npy"), "NumPy arrays"),
    "npy": (b"\x93NUMPY\x01\0" + bytes(50), "NumPy array"),
    "flax": (b"\x81\xa6params\x82\xa6conv_0" + bytes(50), "MessagePack"),
    "paddle": (pickle.dumps({"linear.w": 1, "StructuredToParameterName@@": {}}, 2), "PaddlePaddle"),
    "sklearn": (of_module("sklearn.linear_model"), "scikit-learn"),
    "joblib": (b"x\x9c" + bytes(50), "joblib"),
    "xgboost": (of_module("xgboost.core"), "trees"),
    "numpy pickle": (pickle.dumps({"w": np.ones(3)}), "NumPy arrays"),
    "keras pickle": (of_module("keras.src.saving"), "Keras"),
    "jax pickle": (of_module("jax._src.array"), "JAX"),
    "mxnet": (b"\x12\x01\0\0\0\0\0\0" + bytes(50), "MXNet"),
    "darknet": (b"\0\0\0\0\x02\0\0\0\x05\0\0\0" + bytes(50), "Darknet"),
    "openvino": (b'<?xml version="1.0"?>\n<net name="x" version="11">', "OpenVINO"),
    "executorch": (b"\x30\0\0\0ET12" + bytes(50), "ExecuTorch"),
    "mar": (zipped("MAR-INF/MANIFEST.json", "model.pt"), "TorchServe"),
    "lightgbm": (b"tree\nversion=v4\n", "LightGBM"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_programs(tmp_path: Path, name: str) -> None:
    data, what = FILES[name]
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    assert sniff(path) is FileKind.FOREIGN
    for trust in (False, True):
        with pytest.raises(RedppError, match=f"a file of another program: .*{what}"):
            load_file(path, trust=trust)


FOLDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "saved model": (("saved_model.pb", "variables"), "SavedModel"),
    "core ml": (("Manifest.json", "Data"), "Core ML"),
    "distributed": ((".metadata", "__0_0.distcp"), "dcp_to_torch"),
    "deepspeed": (("zero_to_fp32.py", "latest"), "zero_to_fp32.py"),
    "orbax": (("_CHECKPOINT_METADATA", "d"), "Orbax"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_other_programs(tmp_path: Path, name: str) -> None:
    names, what = FOLDERS[name]
    for inner in names:
        (tmp_path / inner).write_bytes(b"")
    with pytest.raises(RedppError, match=what):
        load_file(tmp_path, trust=False)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save({"numpy.keras.w": torch.ones(1)}, path),
        lambda path: torch.save({"sklearn": torch.ones(1)}, path, _use_new_zipfile_serialization=False),
    ],
)
def test_names_of_programs_in_weights(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "x.pt")
    assert load_file(tmp_path / "x.pt", trust=False).state_dict


@pytest.mark.parametrize("size", range(1, 20))
def test_short_files(tmp_path: Path, size: int) -> None:
    for data in (b"\x08\x01\x12\x03\x0a" * 4, b"\x81\xa6params" * 3, b"\x0a\xff" * 10, b"\0" * 20, b"ET12ftrt" * 3):
        (tmp_path / "x").write_bytes(data[:size])
        with pytest.raises(RedppError):
            load_file(tmp_path / "x", trust=False)


def test_pickles_of_quantizers(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02ctorchao.dtypes\nAffineQuantizedTensor\n.")
    with pytest.raises(RedppError, match="quantized by torchao"):
        load_file(path, trust=False)
