"""Put a handler of eager PyTorch in the place of a package's original: what users have, beside the pruned version.

``python -m benchmarks.stock dist/resnet50 resnet50.pth resnet50 stock/resnet50`` copies the package of a network of
torchvision; then ``redpp-serve compare stock/resnet50 --trust-package`` serves both on TorchServe, and compares their
answers as it always does.
"""

from __future__ import annotations

import argparse
import shutil
import zipfile
from pathlib import Path

from redpp_serve.variants import ORIGINAL

_HANDLER = """
import io
import sys

import numpy as np
import torch
from ts.torch_handler.base_handler import BaseHandler

try:
    import torchvision
except RuntimeError:  # its compiled operators belong to a torch of another build; no classifier needs them
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision


class Stock(BaseHandler):
    def initialize(self, context):
        torch.set_num_threads(1)
        self.model = torchvision.models.get_model("{network}", weights=None).eval()
        self.model.load_state_dict(torch.load({weights!r}, weights_only=True))
        self.initialized = True

    def handle(self, data, context):
        arrays = [np.load(io.BytesIO(row.get("body") or row.get("data"))) for row in data]
        inputs = [torch.from_numpy(x if x.ndim == 4 else x[None]) for x in arrays]
        with torch.inference_mode():
            outputs = self.model(torch.cat(inputs)).split([len(x) for x in inputs])
        return [{{"outputs": [(y if len(y) > 1 else y[0]).tolist()]}} for y in outputs]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the package")
    parser.add_argument("checkpoint", type=Path, help="the state_dict that it was made of")
    parser.add_argument("network", help="torchvision's name of the network")
    parser.add_argument("out", type=Path, help="the copy")
    options = parser.parse_args()
    shutil.copytree(options.folder, options.out)
    archive = options.out / ORIGINAL.archive
    with zipfile.ZipFile(options.folder / ORIGINAL.archive) as old, zipfile.ZipFile(archive, "w") as new:
        for entry in old.infolist():
            if entry.filename != "handler.py":
                new.writestr(entry, old.read(entry))
        new.writestr("handler.py", _HANDLER.format(network=options.network, weights=str(options.checkpoint.resolve())))


if __name__ == "__main__":
    main()
