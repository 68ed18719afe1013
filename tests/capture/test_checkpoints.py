"""Names, prefixes and parts of weights as training programs write them, fitted to an architecture."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from redpp_serve.capture.checkpoints import load_into
from redpp_serve.capture.load import load_file
from redpp_serve.errors import RedppError

State = dict[str, Tensor]


class Net(nn.Module):
    """Two blocks and a head, with the shapes of a small image classifier."""

    def __init__(self) -> None:
        super().__init__()

        def block(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

        self.f, self.h = nn.Sequential(block(3, 8), block(8, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.f(x).mean((2, 3)))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """A decoder that shares its embedding."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.e, self.d = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        if tied:
            self.d.weight = self.e.weight


class Positions(nn.Module):
    """Buffers that modules compute: one that is saved, one that is not."""

    def __init__(self, saved: bool = True) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)
        self.register_buffer("position_ids", torch.arange(6), persistent=saved)
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def trained(make: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(1)
    net = make().eval()
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.1)
    return net


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def replaced(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {name.replace(old, new): value for name, value in state.items()}


def assert_loaded(target: nn.Module, source: nn.Module) -> None:
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


WRAPPED: dict[str, tuple[Callable[[State], State], str]] = {
    **{
        f"prefix {p}": (partial(prefixed, p), "stripped")
        for p in (
            *("model.", "net.", "backbone.", "module.", "student.", "_orig_mod.", "_fsdp_wrapped_module.", "0."),
            *("_forward_module.model.", "module._orig_mod.", "_orig_mod.module.", "model._orig_mod.net.", "a.b.c.d."),
            *("module.module.", "model.module.backbone.", "encoder.", "_checkpoint_wrapped_module.", "learner.model_."),
        )
    },
    "fsdp inside": (replaced("f.", "f._fsdp_wrapped_module."), "_fsdp_wrapped_module."),
    "recompute inside": (replaced("f.0.", "f.0._checkpoint_wrapped_module."), "_checkpoint_wrapped_module."),
    "compiled inside": (replaced("f.1.", "f.1._orig_mod."), "_orig_mod."),
    "parallel features": (replaced("f.", "f.module."), "module."),
    "all at once": (
        lambda s: prefixed("_forward_module.model._orig_mod.", replaced("f.", "f._fsdp_wrapped_module.module.")(s)),
        "prefix 'model.'",
    ),
    "criterion": (lambda s: {**prefixed("model.", s), "criterion.weight": torch.ones(4)}, "criterion.weight"),
    "class weights": (lambda s: {**s, "class_weights": torch.ones(4)}, "class_weights"),
    "loss with a network": (lambda s: {**prefixed("net.", s), "lossFn.vgg.0.weight": torch.ones(9, 3)}, "lossFn"),
    "torchmetrics": (
        lambda s: {**prefixed("model.", s), "train_acc.tp": torch.ones(4), "val_f1.confmat": torch.ones(4, 4)},
        "train_acc.tp",
    ),
    "metric": (lambda s: {**prefixed("model.", s), "val_metrics.MulticlassAUROC.thresholds": torch.ones(9)}, "val_m"),
    "average": (lambda s: {**s, "model_ema.decay": torch.tensor(0.9), "model_ema.fweight": torch.ones(3)}, "model_ema"),
    "swa": (lambda s: {**prefixed("module.", s), "n_averaged": torch.tensor(3)}, "n_averaged"),
    "thop": (lambda s: {**s, "total_ops": torch.zeros(1), "f.0.0.total_params": torch.zeros(1)}, "total_ops"),
    "teacher of another kind": (lambda s: {**prefixed("student.", s), "teacher.w": torch.ones(7)}, "teacher.w"),
    "counter of a frozen norm": (lambda s: {**s, "h.num_batches_tracked": torch.tensor(1)}, "num_batches_tracked"),
    "the same twice": (lambda s: {**prefixed("model.", s), **prefixed("net.", s)}, "prefix 'model.'"),
    "position ids": (lambda s: {**s, "f.position_ids": torch.arange(5)}, "position_ids"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_names_of_wrappers_and_training(name: str) -> None:
    source, target = trained(), Net()
    change, message = WRAPPED[name]
    notes = load_into(target, change(source.state_dict()))
    assert_loaded(target, source)
    assert message in "; ".join(notes)


@pytest.mark.parametrize(
    ("pair", "apart"),
    [
        (("student.", "teacher."), True),
        (("G.", "D."), True),
        (("encoder_q.", "encoder_k."), True),
        (("module.student.", "module.teacher."), True),
        (("a.model.", "b.model."), True),
    ],
)
def test_two_networks_that_fit(pair: tuple[str, str], apart: bool) -> None:
    first, second = trained().state_dict(), Net().state_dict()
    with pytest.raises(RedppError, match="several networks.*--weights-key") as refused:
        load_into(Net(), {**prefixed(pair[0], first), **prefixed(pair[1], second)})
    assert all(prefix.removeprefix("module.") in str(refused.value) for prefix in pair)


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("G", lambda a, b: {"G": a, "D": b}),
        ("student.", lambda a, b: {**prefixed("student.", a), **prefixed("teacher.", b)}),
        ("student", lambda a, b: {"state_dict": {**prefixed("student.", a), **prefixed("teacher.", b)}, "epoch": 1}),
        ("student", lambda a, b: {**prefixed("module.student.", a), **prefixed("module.teacher.", b)}),
        ("nets.G", lambda a, b: {"nets": {"G": a, "D": b}}),
        ("nets.G.state_dict", lambda a, b: {"nets": {"G": {"state_dict": a}, "D": b}}),
        ("state_dict", lambda a, b: {"state_dict": a, "state_dict_ema": b}),
        ("state_dict.G", lambda a, b: {"state_dict": {**prefixed("G.", a), **prefixed("D.", b)}}),
        ("backbone.", lambda a, b: {**prefixed("backbone.", a), "head.weight": torch.ones(3, 4)}),
    ],
)
def test_weights_key(tmp_path: Path, key: str, content: Callable[[State, State], Any]) -> None:
    source, target = trained(), Net()
    torch.save(content(source.state_dict(), Net().state_dict()), tmp_path / "x.pt")
    loaded = load_file(tmp_path / "x.pt", trust=False, key=key)
    assert loaded.state_dict is not None
    load_into(target, loaded.state_dict)
    assert_loaded(target, source)


def test_weights_key_that_is_not_there(tmp_path: Path) -> None:
    torch.save({"G": trained().state_dict(), "D": Net().state_dict()}, tmp_path / "x.pt")
    with pytest.raises(RedppError, match="'H'.*one of D, G"):
        load_file(tmp_path / "x.pt", trust=False, key="H")
    with pytest.raises(RedppError, match="several sets.*--weights-key G"):
        load_file(tmp_path / "x.pt", trust=False)


def test_a_module_in_a_module(tmp_path: Path) -> None:
    torch.save(nn.ModuleDict({"student": nn.Linear(2, 3), "teacher": nn.Linear(2, 4)}), tmp_path / "x.pt")
    module = load_file(tmp_path / "x.pt", trust=True, key="teacher.").module
    assert isinstance(module, nn.Linear) and module.out_features == 4


def test_the_architecture_may_wrap_the_network() -> None:
    source = trained()
    for make in (
        nn.DataParallel,
        lambda net: nn.ModuleDict({"_orig_mod": net}),
        lambda net: nn.ModuleDict({"model": net}),
    ):
        target = make(Net())  # type: ignore[operator]
        load_into(target, source.state_dict())
        inner = list(target.state_dict().values())
        assert all(torch.equal(a, b) for a, b in zip(inner, source.state_dict().values(), strict=True))


def test_what_is_missing_stays_an_error() -> None:
    state = prefixed("model.", trained().state_dict())
    del state["model.h.bias"]
    with pytest.raises(RedppError, match="under the prefix 'model.'.*1 missing: h.bias"):
        load_into(Net(), state)
    state = {**prefixed("model.", trained().state_dict()), "model.f.2.weight": torch.ones(2, 2)}
    with pytest.raises(RedppError, match="1 unexpected: f.2.weight"):
        load_into(Net(), state)
    state = {**prefixed("backbone.", trained().state_dict()), "head.weight": torch.ones(2, 2)}
    with pytest.raises(RedppError, match="fit the architecture, but.*1 more: head.weight.*--weights-key backbone"):
        load_into(Net(), state)


REPARAMETRISED: dict[str, Callable[[nn.Module], object]] = {
    "structured mask": lambda m: prune.ln_structured(m.f[0][0], "weight", 0.5, n=1, dim=0),
    "mask of the head": lambda m: prune.l1_unstructured(m.h, "weight", 0.5),
    "mask of a bias": lambda m: prune.random_unstructured(m.h, "bias", 2),
    "two masks": lambda m: (prune.random_unstructured(m.h, "weight", 3), prune.l1_unstructured(m.h, "weight", 3)),
    "global masks": lambda m: prune.global_unstructured(
        [(m.f[0][0], "weight"), (m.f[1][0], "weight")], prune.L1Unstructured, amount=0.4
    ),
    "old weight norm": lambda m: weight_norm(m.f[0][0]),
    "old weight norm over all": lambda m: weight_norm(m.h, dim=None),
    "old weight norm of dim 1": lambda m: weight_norm(m.h, dim=1),
    "new weight norm": lambda m: parametrizations.weight_norm(m.f[1][0]),
    "new weight norm of dim 1": lambda m: parametrizations.weight_norm(m.h, dim=1),
    "old spectral norm": lambda m: spectral_norm(m.f[0][0]),
    "new spectral norm": lambda m: parametrizations.spectral_norm(m.h),
    "both": lambda m: (weight_norm(m.f[0][0]), parametrizations.spectral_norm(m.h)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("name", REPARAMETRISED)
def test_parts_of_weights(name: str, prefix: str) -> None:
    source, plain, alike = trained(), Net().eval(), Net().eval()
    REPARAMETRISED[name](source)
    REPARAMETRISED[name](alike)
    source.eval()
    x = torch.randn(2, 3, 8, 8)
    notes = load_into(plain, prefixed(prefix, source.state_dict()))
    torch.testing.assert_close(plain(x), source(x))
    assert "applied" in "; ".join(notes)
    assert "applied" not in "; ".join(load_into(alike, prefixed(prefix, source.state_dict())))
    torch.testing.assert_close(alike.eval()(x), source(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", REPARAMETRISED)
def test_plain_weights_for_a_module_that_keeps_parts(name: str) -> None:
    source, target = trained(), Net().eval()
    REPARAMETRISED[name](target)
    notes = load_into(target, prefixed("net.", source.state_dict()))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(target(x), source(x))
    assert "took off" in "; ".join(notes)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_parts_for_a_module_with_new_ones() -> None:
    source, target = trained(), Net().eval()
    weight_norm(source.h)  # type: ignore[arg-type]
    spectral_norm(source.f[0][0])  # type: ignore[index]
    parametrizations.weight_norm(target.h)
    parametrizations.spectral_norm(target.f[0][0])  # type: ignore[arg-type]
    load_into(target, source.eval().state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(target(x), source(x))


def test_parametrizations_that_the_file_does_not_tell() -> None:
    source = trained()
    parametrizations.orthogonal(source.h)  # type: ignore[arg-type]
    with pytest.raises(RedppError, match="missing: h.weight"):
        load_into(Net(), source.state_dict())


def test_transposed_convolutions_have_their_channels_second() -> None:
    source, target = nn.ConvTranspose2d(6, 6, 3), nn.ConvTranspose2d(6, 6, 3)
    spectral_norm(source)
    load_into(target, source.eval().state_dict())
    x = torch.randn(1, 6, 4, 4)
    torch.testing.assert_close(target(x), source(x))


@pytest.mark.parametrize("missing", ["e.weight", "d.weight"])
def test_tied_weights(missing: str) -> None:
    source, target = trained(Tied), Tied()
    state = {name: value for name, value in source.state_dict().items() if name != missing}
    assert "share memory" in "; ".join(load_into(target, prefixed("model.", state)))
    assert_loaded(target, source)
    with pytest.raises(RedppError, match="1 missing"):
        load_into(Tied(tied=False), state)


def test_tied_weights_that_differ() -> None:
    with pytest.raises(RedppError, match="one tensor in the architecture and differ"):
        load_into(Tied(), trained(lambda: Tied(tied=False)).state_dict())


def test_computed_buffers() -> None:
    source = trained(Positions)
    state = dict(source.state_dict())
    for there in (True, False):
        for saved in (True, False):
            one = deepcopy(state) if there else {k: v for k, v in state.items() if k != "position_ids"}
            load_into(Positions(saved), one)
    target = Positions()
    load_into(target, {**state, "table": torch.full((3,), 7.0)})
    assert torch.equal(target.table, torch.full((3,), 7.0))  # type: ignore[arg-type]


FOREIGN: dict[str, tuple[str, Tensor]] = {
    "lora": ("base_model.model.h.lora_A.default.weight", torch.ones(2, 8)),
    "lora of kohya": ("lora_unet_down.lora_down.weight", torch.ones(2, 8)),
    "gptq": ("h.qweight", torch.ones(2, 8, dtype=torch.int32)),
    "awq": ("h.qzeros", torch.ones(2, 8, dtype=torch.int32)),
    "bitsandbytes int8": ("h.SCB", torch.ones(4)),
    "bitsandbytes nf4": ("h.weight.quant_state.bitsandbytes__nf4", torch.ones(4, dtype=torch.uint8)),
    "bitsandbytes absmax": ("h.weight.absmax", torch.ones(4)),
    "observers": ("h.activation_post_process.min_val", torch.ones(1)),
    "fp8": ("h.weight_scale_inv", torch.ones(1)),
    "flat": ("f._flat_param", torch.ones(99)),
    "optimizer": ("h.exp_avg", torch.ones(4, 8)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_entries_of_another_kind(name: str) -> None:
    key, value = FOREIGN[name]
    for state in ({key: value}, {**trained().state_dict(), key: value}, {"h.bias": torch.ones(4), key: value}):
        with pytest.raises(RedppError, match="the file holds (adapters|weights|quantized|the flat|the state)"):
            load_into(Net(), state)


def test_quantized_dynamically(tmp_path: Path) -> None:
    state = {"h.scale": torch.tensor(1.0), "h._packed_params.dtype": torch.qint8, "h._packed_params._packed": (1, 2)}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(RedppError, match=r"quantized by torch\.ao"):
        load_file(tmp_path / "x.pt", trust=False)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.complex64, torch.bool, torch.int64])
def test_numbers_of_another_kind(dtype: torch.dtype) -> None:
    state = dict(trained().state_dict())
    state["h.weight"] = torch.full((4, 8), 1).to(dtype)
    if dtype is not torch.bool:
        state["h.weight"] = state["h.weight"] * 2
    if dtype is torch.bool:
        state["h.weight"] = torch.ones(4, 8, dtype=torch.int16) * 3
    with pytest.raises(RedppError, match="numbers of another kind: h.weight"):
        load_into(Net(), state)


def test_many_names_are_fitted_in_no_time() -> None:
    state = {f"a.b.c.layer{i}.weight": torch.ones(1) for i in range(1000)}
    net = nn.ModuleDict({f"layer{i}": nn.PReLU() for i in range(1000)})
    assert "prefix 'a.b.c.'" in load_into(net, state)[0]


class Lazy(nn.Module):
    """Layers whose shapes follow from the first input, or from the file."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.h = nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.n(self.c(x)).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_layers_take_their_shapes_from_the_file() -> None:
    source, x = Lazy().eval(), torch.randn(2, 3, 8, 8)
    source(x)
    for prefix in ("", "model."):
        target = Lazy().eval()
        load_into(target, prefixed(prefix, source.state_dict()))
        torch.testing.assert_close(target(x), source(x))
    with pytest.raises(RedppError, match="1 missing: h.bias"):
        load_into(Lazy(), {name: value for name, value in source.state_dict().items() if name != "h.bias"})
