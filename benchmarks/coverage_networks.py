"""List the classifiers of `benchmarks.coverage`: at least one of each family that torchvision and timm deploy."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

_TORCHVISION = """
    resnet18 resnext50_32x4d densenet121 googlenet mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 regnet_x_400mf
    regnet_y_400mf efficientnet_b0 convnext_tiny vit_b_32 swin_t swin_v2_t vgg11 alexnet squeezenet1_0 mnasnet0_5
    inception_v3 maxvit_t efficientnet_v2_s squeezenet1_1 mobilenet_v3_large mnasnet0_75 mnasnet1_0 mnasnet1_3
    shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 regnet_x_800mf regnet_y_800mf regnet_x_1_6gf
    regnet_y_1_6gf resnet34 resnet50 efficientnet_b1 efficientnet_b2 densenet169 vit_b_16 vgg11_bn vgg16_bn swin_s
    convnext_small wide_resnet50_2 resnet101
"""
_TIMM = """
    resnet18d seresnet50 resnet26t ecaresnet26t skresnet18 resnest14d res2net50_26w_4s resnetv2_50 densenet121 dla34
    dpn68 hrnet_w18_small cspresnet50 cspdarknet53 darknet53 vovnet39a ese_vovnet19b_dw repvgg_a0 selecsls42b
    tresnet_m xception41 inception_v4 efficientnet_b0 tf_efficientnetv2_b0 mobilenetv2_100 mobilenetv3_large_100
    mobilenetv4_conv_small mixnet_s mnasnet_100 ghostnet_100 lcnet_100 tinynet_a fbnetc_100 rexnet_100 regnetx_008
    regnety_008 nf_resnet50 eca_nfnet_l0 hgnetv2_b0 starnet_s1 repghostnet_050 convnext_atto convnextv2_atto
    inception_next_tiny convmixer_768_32 fastvit_t8 repvit_m0_9 efficientvit_b0 mobilevit_xxs edgenext_xx_small
    efficientformer_l1 levit_128s poolformer_s12 caformer_s18 vit_tiny_patch16_224 deit_tiny_patch16_224
    deit3_small_patch16_224 beit_base_patch16_224 cait_xxs24_224 eva02_tiny_patch14_224 swin_tiny_patch4_window7_224
    swinv2_tiny_window8_256 mixer_s16_224 resmlp_12_224 gmlp_s16_224 pvt_v2_b0 twins_svt_small pit_ti_224
    visformer_tiny xcit_nano_12_p16_224 coatnet_0_rw_224 tiny_vit_5m_224 davit_tiny focalnet_tiny_srf
    cpubone_nano csatv2 cspnext_tiny efficientvim_m1 fasternet_t0 gcvit_xxtiny hiera_tiny_224 iformer_t lcnetv2_small
    lowformer_b0 mambaout_femto mvitv2_tiny nextvit_small rdnet_tiny sequencer2d_s shvit_s1 swiftformer_xs
    efficientformerv2_s0 efficientvit_m0
"""
# The libraries take turns, so that a run that is cut short has seen both.
NETWORKS = [
    f"{library}:{name}"
    for pair in zip_longest(_TORCHVISION.split(), _TIMM.split())
    for library, name in zip(("torchvision", "timm"), pair, strict=True)
    if name
]


def arguments_of(arch: str, side: int) -> list[dict[str, Any]]:
    """Arguments of the builder to try for square images of ``side`` pixels, in this order."""
    library, _, name = arch.partition(":")
    if name in ("googlenet", "inception_v3") and library == "torchvision":
        return [{"aux_logits": False, "init_weights": False}]
    if library == "torchvision" and name.startswith("vit_"):
        return [{"image_size": side}]
    if library == "torchvision" and name.startswith("maxvit"):
        return [{"input_size": (side, side)}]
    return [{"img_size": side}, {}] if library == "timm" else [{}]
