"""Unpack a TorchServe archive into the working folder and run its handler on ``request.bin``.

Usage: python run_archive.py ARCHIVE PRECISION. It prints the time, the reply and the statuses as one line of JSON.
"""

import importlib
import json
import sys
import time
import types
import zipfile
from pathlib import Path


def main(archive: str, precision: str) -> None:
    """Run the handler as TorchServe would, with a context that answers what it asks for."""
    folder = Path("unpacked").resolve()
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    sys.path.insert(0, str(folder))
    statuses: list[tuple[int, str]] = []
    context = types.SimpleNamespace(
        system_properties={"model_dir": str(folder), "gpu_id": None, "batch_size": 1},
        model_yaml_config={"handler": {"threads": 1, "precision": precision}},
        model_name="smoke",
        manifest=json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text()),
        set_response_status=lambda code=200, phrase="", idx=0: statuses.append((code, phrase)),
        set_response_header=lambda *a, **k: None,
        set_all_response_status=lambda *a, **k: None,
        set_response_content_type=lambda *a, **k: None,
        get_request_header=lambda *a, **k: None,
        get_all_request_header=lambda *a, **k: {},
        get_request_id=lambda *a, **k: None,
    )
    service = importlib.import_module("handler").Service()
    service.initialize(context)
    request = Path("request.bin").read_bytes()
    start = time.perf_counter()
    (reply,) = service.handle([{"body": request}], context)
    milliseconds = 1e3 * (time.perf_counter() - start)
    text = reply if isinstance(reply, str) else bytes(reply).decode()
    print(json.dumps({"milliseconds": milliseconds, "reply": json.loads(text), "statuses": statuses}))


if __name__ == "__main__":
    main(*sys.argv[1:])
