"""Files and folders of other programs, told from their bytes and names, and what to do with each.

Sources: the magic numbers and file identifiers that those programs document; protobuf's wire format for those without.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from redpp_serve.archives import varint

_HEAD, _FOOT = 4096, 8
_MAX_NAMES = 10_000  # of a folder that are looked at
_PORT = "load its weights into the PyTorch network they belong to, and save that network's state_dict"
_EXPORTED = "give the PyTorch weights that it was made from"
_TREES = "give a PyTorch network: this program prunes nothing else"
_UNQUANTIZED = "give the weights of the PyTorch network that it was converted from, before quantization"


@dataclass(frozen=True)
class Foreign:
    """A file of another program.

    Attributes:
        what: its name for people, without an article.
        do: what to do to get weights from it, or in its place.
    """

    what: str
    do: str


_HDF5 = Foreign("HDF5 file, as Keras writes it (.h5)", _PORT)
_KERAS = Foreign("Keras model (.keras)", _PORT)
_SAVED_MODEL = Foreign("TensorFlow SavedModel", _PORT)
_COREML = Foreign("Core ML model", _EXPORTED)
_TENSORRT = Foreign("TensorRT engine", _EXPORTED)
_SKLEARN = Foreign("pickle of scikit-learn or joblib", _TREES)
_ARRAYS = Foreign("archive of NumPy arrays (.npz)", "give the arrays as tensors by name, saved with safetensors")

# Each: where the bytes stand, the bytes, the kind.
_MAGICS: tuple[tuple[int, bytes, Foreign], ...] = (
    (0, b"\x89HDF\r\n\x1a\n", _HDF5),
    (0, b"GGUF", Foreign("GGUF file of llama.cpp", _UNQUANTIZED)),
    *((0, magic, Foreign("GGML file of llama.cpp", _UNQUANTIZED)) for magic in (b"lmgg", b"tjgg", b"fmgg")),
    (4, b"TFL3", Foreign("TensorFlow Lite model", _EXPORTED)),
    (4, b"ET12", Foreign("ExecuTorch program", _EXPORTED)),
    *((start, magic, _TENSORRT) for start in (0, 4, 24) for magic in (b"ftrt", b"ptrt")),
    (0, b"\x93NUMPY", Foreign("NumPy array (.npy)", "give all weights by name, saved with safetensors")),
    (0, b"\x12\x01\0\0\0\0\0\0", Foreign("parameter file of MXNet", _PORT)),
    (0, b"\0\0\0\0\x02\0\0\0\x05\0\0\0", Foreign("weights file of Darknet", _PORT)),
    (0, b"7767517\n", Foreign("ncnn model", _EXPORTED)),
    (0, b"CBM1", Foreign("CatBoost model", _TREES)),
    (0, b"tree\nversion=", Foreign("LightGBM model", _TREES)),
    *((0, magic, _SKLEARN) for magic in (b"x\x9c", b"x\x01", b"x\xda")),
)
_FOOTER = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # of a table of LevelDB
_TABLE = Foreign("index of a TensorFlow checkpoint", _PORT)

# What a pickle that torch did not write names near its start.
_IN_PICKLES: tuple[tuple[re.Pattern[bytes], Foreign], ...] = (
    (re.compile(rb"StructuredToParameterName@@"), Foreign("parameter file of PaddlePaddle (.pdparams)", _PORT)),
    (re.compile(rb"(sklearn|joblib)\b"), _SKLEARN),
    (re.compile(rb"(xgboost|lightgbm|catboost)\b"), Foreign("pickle of gradient-boosted trees", _TREES)),
    (re.compile(rb"(tensorflow|keras)\b"), Foreign("pickle of TensorFlow or Keras", _PORT)),
    (re.compile(rb"(jax|jaxlib|flax)\b"), Foreign("pickle of JAX arrays", _PORT)),
    (
        re.compile(rb"numpy\b"),
        Foreign("pickle of NumPy arrays", "give the arrays as tensors by name, saved with safetensors"),
    ),
)

# What a folder holds, and what it then is.
_FOLDERS: tuple[tuple[tuple[str, ...], Foreign], ...] = (
    (("saved_model.pb",), _SAVED_MODEL),
    (("Manifest.json", "Data"), Foreign("Core ML package", _EXPORTED)),
    (
        (".metadata",),
        Foreign(
            "distributed checkpoint of PyTorch",
            "make one file of it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt",
        ),
    ),
    (
        ("zero_to_fp32.py",),
        Foreign("checkpoint of DeepSpeed", "make one file of it with the script zero_to_fp32.py inside it"),
    ),
    (("_CHECKPOINT_METADATA",), Foreign("checkpoint of Orbax (JAX)", _PORT)),
    (("__model__",), Foreign("model of PaddlePaddle", _PORT)),
)


def identify(path: Path) -> Foreign | None:
    """Return which other program's file or folder this is; None where it is none that is known.

    Raises:
        OSError: it cannot be read.
    """
    if path.is_dir():
        names = {inner.name for inner in islice(path.iterdir(), _MAX_NAMES)}
        return next((kind for needed, kind in _FOLDERS if names.issuperset(needed)), None)
    with path.open("rb") as file:
        head = file.read(_HEAD)
        file.seek(max(0, path.stat().st_size - _FOOT))
        foot = file.read(_FOOT)
    for start, magic, kind in _MAGICS:
        if head.startswith(magic, start):
            return kind
    if foot == _FOOTER:
        return _TABLE
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        found = next((kind for pattern, kind in _IN_PICKLES if pattern.search(head)), None)
        return None if b"torch" in head else found
    return _without_magic(head, path.stat().st_size)


def identify_zip(names: Collection[str]) -> Foreign | None:
    """Return which other program's archive holds entries of these names; None where it is none that is known."""
    if any(name.endswith("model.weights.h5") for name in names):
        return _KERAS
    if names and all(name.endswith(".npy") for name in names):
        return _ARRAYS
    if "MAR-INF/MANIFEST.json" in names:
        return Foreign("archive for TorchServe (.mar)", "give the weights file that was put into it")
    if any(name.endswith(".mlmodel") for name in names):
        return _COREML
    return None


def _without_magic(head: bytes, size: int) -> Foreign | None:
    """Tell formats that begin with data: OpenVINO's XML, MessagePack, and protobuf messages but ONNX."""
    if len(head) < 16:
        return None
    if head[4:5] == b"{" and b'"stride"' in head:  # Ultralytics writes its settings before the engine
        return _TENSORRT
    if head.lstrip().startswith((b"<?xml", b"<net")) and b"<net name=" in head:
        return Foreign("OpenVINO model", _EXPORTED)
    if 0x81 <= head[0] <= 0x8F and 0xA1 <= head[1] <= 0xBF and head[2 : 2 + (head[1] & 31)].isalnum():
        return Foreign("MessagePack file, as Flax writes it", _PORT)
    if head[0] == 0x0A and re.search(rb"\x12.(Placeholder|Const|VarHandleOp|NoOp)", head, re.DOTALL):
        return Foreign("TensorFlow graph (.pb)", _PORT)
    if head[0] == 0x08 and 1 <= head[1] <= 20 and head[2] == 0x12:  # a version, then a message with a message inside
        length, start = varint(head, 3) or (0, 13)
        if head[start : start + 1] == b"\x0a":
            return _SAVED_MODEL if head[1] == 1 and start + length == size else _COREML
    return None
