"""The README of a packaged model: the exact commands to serve it and to ask it something."""

from __future__ import annotations

from redpp_serve.graph.graph import InputSpec
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.packaging.triton_repository import TYPES

_TEXT = """# {name}: original (1.0) and pruned (2.0)

Written by redpp-serve. `report.html` says what was pruned and what it changed. Run the commands below in this folder.

## Serve both versions
```
redpp-serve serve .
```
Or with a TorchServe of your own: torchserve, torch, numpy, pillow, PyYAML and a Java runtime (17) are needed,
redpp-serve is not.
```
torchserve --start --foreground --ncs --ts-config config.properties --log-config log4j2.xml \\
    --model-store . --models {name}=original.mar {name}=pruned.mar
```
The first one listed is the default; always ask for a version by its URL. TorchServe writes tokens to
`key_file.json` in the folder it was started in; send the one under `inference` with each request.

## Ask
Inputs: {inputs}. `{example}` is one of the synthetic inputs that the pruning was checked with.
`redpp-serve serve` prints this command with its own port and token; with a TorchServe of your own:
```
TOKEN=$(python -c "import json; print(json.load(open('key_file.json'))['inference']['key'])")
curl -H "Authorization: Bearer $TOKEN" -H "Content-Type: application/octet-stream" \\
    --data-binary @{example} http://127.0.0.1:8080/predictions/{name}/2.0
```
{accepted}
The answer is `{{"outputs": [...]}}`, one nested list for each output of the network. A request that cannot be served
gets its own 400 with the reason; the others of its batch are not affected. Always send a Content-Type: without one
TorchServe takes the body for a web form.

## The same on Triton Inference Server
`triton/` is a model repository: version 1 is the original, 2 the pruned network.
```
redpp-serve serve . --server triton
```
Or with a Triton of your own that has the Python back end (a current release: older ones have published security holes);
its Python needs torch and numpy, redpp-serve is not needed:
```
tritonserver --model-repository=triton --http-address=127.0.0.1 --grpc-address=127.0.0.1 --metrics-address=127.0.0.1
```
Name the version in each request: without one Triton takes the highest. From Python with `tritonclient[http]`:
```python
import numpy
import tritonclient.http as triton

sample = {load}
inputs = []
for name, kind in {kinds}.items():
    rows = sample[name][None]  # Triton's inputs have a batch dimension: one or more rows
    inputs.append(triton.InferInput(name, rows.shape, kind))
    inputs[-1].set_data_from_numpy(rows)
with triton.InferenceServerClient("127.0.0.1:8000") as client:
    answer = client.infer("{name}", inputs, model_version="2")
print(answer.as_numpy("output_0"))
```
Triton takes tensors alone, no images and no JSON of other layouts. A request with NaN or infinity gets its own 400; 503
means that too many requests wait. Each GPU that Triton sees gets one worker for each version, a machine without one gets
one on the CPU; `instance_group` in `triton/{name}/config.pbtxt` says otherwise.

## Compare and roll out
```
redpp-serve compare .
```
Version 1.0 stays what it was: rolling back is asking for 1.0 again.

## Metrics
Set `PROMETHEUS_MULTIPROC_DIR` to an empty folder before TorchServe starts, and run
`python -m redpp_serve.handlers.exporter --port 9400 --dir "$PROMETHEUS_MULTIPROC_DIR"` (`redpp-serve serve` does both).
Triton serves the same metrics beside its own, on its metrics port.
Histograms `redpp_handler_seconds`, `redpp_inference_seconds`, `redpp_batch_size`, counter `redpp_requests_total` by
outcome, gauges `redpp_model_parameters`, `redpp_model_macs`, `redpp_model_bytes`; labels model, version, variant.
"""


def sample_name(inputs: tuple[InputSpec, ...]) -> str:
    """The file in a package that holds one request."""
    return "sample.npy" if len(inputs) == 1 else "sample.npz"


def readme(name: str, inputs: tuple[InputSpec, ...], preprocess: Preprocess | None) -> str:
    """The text for a model of that name."""
    shapes = "; ".join(f"`{i.name}` {'x'.join(map(str, i.shape))} {i.dtype}" for i in inputs)
    accepted = (
        "Accepted: `.npy` or JSON of that shape"
        if len(inputs) == 1
        else "Accepted: `.npz` or JSON with the inputs by name"
    )
    if preprocess:
        mean, std = (", ".join(f"{v:g}" for v in values) for values in (preprocess.mean, preprocess.std))
        accepted += (
            f"; PNG and JPEG, converted to mode {preprocess.mode}, resized to {preprocess.height}x{preprocess.width} and "
            f"normalised with mean ({mean}) and std ({std})"
        )
    else:
        accepted += "; images are refused, for no pre-processing was declared (`--preprocess`)"
    example = sample_name(inputs)
    load = f'{{"{inputs[0].name}": numpy.load("{example}")}}' if len(inputs) == 1 else f'numpy.load("{example}")'
    kinds = "{" + ", ".join(f'"{i.name}": "{TYPES[i.dtype].removeprefix("TYPE_")}"' for i in inputs) + "}"
    return _TEXT.format(name=name, inputs=shapes, accepted=accepted + ".", example=example, load=load, kinds=kinds)
