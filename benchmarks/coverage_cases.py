"""Networks of `benchmarks.coverage` beside classifiers of images: what builds each, and the inputs that it takes.

They are small on purpose, with random weights: own definitions, models of torchvision for other tasks than
classification, and models of transformers from configurations of a few layers (``pip install transformers``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from benchmarks import coverage_own as own
from redpp_serve.capture.arch import build, import_library


@dataclass(frozen=True)
class Case:
    """A network and its inputs.

    Attributes:
        make: builds it.
        inputs: what ``--input`` takes.
        constants: what ``--input-args`` takes.
    """

    make: Callable[[], nn.Module]
    inputs: str
    constants: Mapping[str, Any] = field(default_factory=dict)


def _vision(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: build(f"torchvision:{name}", arguments)


def _pyramid() -> nn.Module:
    """ResNet-18 with a feature pyramid, as torchvision's detectors have it."""
    backbones = import_library("torchvision").models.detection.backbone_utils
    found: nn.Module = backbones.resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return found


class _SsdHead(nn.Module):
    """SSDLite's convolutional heads on two of MobileNet's levels."""

    def __init__(self) -> None:
        super().__init__()
        features = import_library("torchvision").models.mobilenet_v3_small(weights=None).features
        self.low, self.high = features[:9], features[9:]
        self.classes = nn.ModuleList(nn.Conv2d(n, 12, 3, padding=1) for n in (48, 576))
        self.boxes = nn.ModuleList(nn.Conv2d(n, 8, 3, padding=1) for n in (48, 576))

    def forward(self, image: Tensor) -> dict[str, list[Tensor]]:
        levels = [low := self.low(image), self.high(low)]
        heads = {"classes": self.classes, "boxes": self.boxes}
        return {name: [h(x) for h, x in zip(head, levels, strict=True)] for name, head in heads.items()}


def _hugging(config: str, model: str, **sizes: Any) -> Callable[[], nn.Module]:
    """Build a model of transformers from a configuration of these sizes."""

    def make() -> nn.Module:
        import_library("torchvision")  # which transformers imports too
        library = importlib.import_module("transformers")
        found: nn.Module = getattr(library, model)(getattr(library, config)(**sizes))
        return found

    return make


_BERT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 20,
}
_TOKENS = "input_ids=12:int64"
_MASKED = "input_ids=12:int64 attention_mask=12:int64"
_PIXELS = "pixel_values=3x32x32"

OWN = {
    "lstm text": Case(own.LstmText, "12:int64"),
    "gru audio": Case(own.GruAudio, "20x40"),
    "crnn": Case(own.Crnn, "1x32x64"),
    "u-net": Case(own.UNet, "3x32x32"),
    "u-net 3d": Case(own.UNet3d, "1x8x16x16"),
    "dcgan generator": Case(own.Generator, "32"),
    "dcgan discriminator": Case(own.Discriminator, "3x32x32"),
    "tcn": Case(own.Tcn, "8x32"),
    "wavenet": Case(own.WaveNet, "1x64"),
    "audio convolutions": Case(own.AudioConv, "1x2000"),
    "vae encoder": Case(own.VaeEncoder, "3x32x32"),
    "vae decoder": Case(own.VaeDecoder, "8"),
    "siamese": Case(own.Siamese, "1x16x16 1x16x16"),
    "dense graph": Case(own.DenseGraph, "nodes=10x8 edges=10x10"),
    "super-resolution": Case(own.SuperResolution, "3x16x16"),
    "diffusion step": Case(own.Denoiser, "image=3x16x16 time=1"),
    "style generator": Case(own.StyleBlock, "16"),
    "detector": Case(own.Detector, "3x64x64"),
    "hourglass": Case(own.Keypoints, "3x64x64"),
    "pointnet": Case(own.PointNet, "3x50"),
    "table": Case(own.Table, "categories=4:int64 numbers=6"),
    "two towers": Case(own.TwoTowers, "user=16 item=16"),
    "transformer encoder": Case(own.MaskedEncoder, "ids=16:int64 mask=16:int64"),
    "detr": Case(own.ImageTransformer, "3x32x32"),
    "video gru": Case(own.VideoLstm, "4x3x16x16"),
    "policy": Case(own.Policy, "12"),
}
VISION = {
    "deeplabv3_mobilenet_v3_large": Case(_vision("deeplabv3_mobilenet_v3_large", num_classes=5), "3x64x64"),
    "deeplabv3_resnet50": Case(_vision("deeplabv3_resnet50", num_classes=5), "3x64x64"),
    "fcn_resnet50": Case(_vision("fcn_resnet50", num_classes=5), "3x64x64"),
    "lraspp_mobilenet_v3_large": Case(_vision("lraspp_mobilenet_v3_large", num_classes=5), "3x64x64"),
    "r3d_18": Case(_vision("r3d_18"), "3x8x32x32"),
    "mc3_18": Case(_vision("mc3_18"), "3x8x32x32"),
    "r2plus1d_18": Case(_vision("r2plus1d_18"), "3x8x32x32"),
    "s3d": Case(_vision("s3d"), "3x14x224x224"),
    "mvit_v2_s": Case(_vision("mvit_v2_s"), "3x16x224x224"),
    "swin3d_t": Case(_vision("swin3d_t"), "3x4x64x64"),
    "resnet18 with a pyramid": Case(_pyramid, "3x64x64"),
    "mobilenet_v3_small with ssd heads": Case(_SsdHead, "3x64x64"),
}
HUGGING = {
    "bert": Case(_hugging("BertConfig", "BertForSequenceClassification", **_BERT), _MASKED),
    "bert without a mask": Case(_hugging("BertConfig", "BertModel", **_BERT), _TOKENS),
    "distilbert": Case(
        _hugging(
            *("DistilBertConfig", "DistilBertForSequenceClassification"),
            **{"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        ),
        _MASKED,
    ),
    "roberta": Case(_hugging("RobertaConfig", "RobertaForSequenceClassification", **_BERT), _MASKED),
    "albert": Case(_hugging("AlbertConfig", "AlbertForSequenceClassification", **_BERT, embedding_size=16), _MASKED),
    "electra": Case(_hugging("ElectraConfig", "ElectraForTokenClassification", **_BERT, embedding_size=16), _MASKED),
    "mpnet": Case(_hugging("MPNetConfig", "MPNetModel", **_BERT), _MASKED),
    "gpt2": Case(
        _hugging("GPT2Config", "GPT2LMHeadModel", vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=4),
        _TOKENS,
        {"use_cache": False},
    ),
    "llama": Case(
        _hugging("LlamaConfig", "LlamaForCausalLM", **_BERT, num_key_value_heads=2), _TOKENS, {"use_cache": False}
    ),
    "t5 encoder": Case(
        _hugging("T5Config", "T5EncoderModel", vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
        _TOKENS,
    ),
    "vit": Case(_hugging("ViTConfig", "ViTForImageClassification", **_VIT), _PIXELS),
    "deit": Case(_hugging("DeiTConfig", "DeiTForImageClassification", **_VIT), _PIXELS),
    "dinov2": Case(_hugging("Dinov2Config", "Dinov2Model", **_VIT), _PIXELS),
    "beit": Case(_hugging("BeitConfig", "BeitModel", **_VIT), _PIXELS),
    "swin": Case(
        _hugging(
            *("SwinConfig", "SwinForImageClassification"),
            **{"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]},
            window_size=4,
        ),
        _PIXELS,
    ),
    "segformer": Case(
        _hugging(
            *("SegformerConfig", "SegformerForSemanticSegmentation"),
            **{"hidden_sizes": [16, 24, 32, 48], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 4]},
            decoder_hidden_size=32,
        ),
        "pixel_values=3x64x64",
    ),
    "mobilevit": Case(
        _hugging(
            *("MobileViTConfig", "MobileViTForImageClassification"),
            **{"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 16, 16, 24, 24, 32, 48]},
        ),
        "pixel_values=3x64x64",
    ),
    "convnextv2": Case(
        _hugging("ConvNextV2Config", "ConvNextV2ForImageClassification", hidden_sizes=[16, 24, 32, 48], depths=[1] * 4),
        _PIXELS,
    ),
    "resnet": Case(
        _hugging(
            *("ResNetConfig", "ResNetForImageClassification"),
            **{"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1] * 4, "layer_type": "basic"},
        ),
        _PIXELS,
    ),
    "dpt": Case(
        _hugging(
            *("DPTConfig", "DPTForDepthEstimation"),
            **{**_VIT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
            **{"neck_hidden_sizes": [8, 16, 16, 24], "fusion_hidden_size": 16, "is_hybrid": False},
        ),
        _PIXELS,
    ),
    "yolos": Case(
        _hugging(
            *("YolosConfig", "YolosForObjectDetection"), **{**_VIT, "image_size": [32, 32]}, num_detection_tokens=5
        ),
        _PIXELS,
    ),
    "wav2vec2": Case(_hugging("Wav2Vec2Config", "Wav2Vec2ForCTC", **_SPEECH), "input_values=1200"),
    "hubert": Case(_hugging("HubertConfig", "HubertModel", **_SPEECH), "input_values=1200"),
    "whisper encoder": Case(
        lambda: _hugging(
            *("WhisperConfig", "WhisperModel"),
            **{"vocab_size": 100, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "max_source_positions": 20},
            **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "num_mel_bins": 16},
            **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        )().get_encoder(),
        "input_features=16x40",
    ),
    "audio spectrogram transformer": Case(
        _hugging(
            *("ASTConfig", "ASTForAudioClassification"),
            **{**_VIT, "patch_size": 4},
            **{"frequency_stride": 4, "time_stride": 4, "max_length": 24, "num_mel_bins": 16},
        ),
        "input_values=24x16",
    ),
    "clip": Case(
        _hugging(
            *("CLIPConfig", "CLIPModel"),
            text_config={**_BERT, "projection_dim": 16, "eos_token_id": 99},
            vision_config={**_VIT, "projection_dim": 16},
            projection_dim=16,
        ),
        f"{_TOKENS} {_PIXELS}",
    ),
    "clip vision": Case(
        _hugging("CLIPVisionConfig", "CLIPVisionModelWithProjection", **_VIT, projection_dim=16), _PIXELS
    ),
    "patchtst": Case(
        _hugging(
            *("PatchTSTConfig", "PatchTSTForClassification"),
            **{"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 16},
            **{"num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "num_targets": 3},
        ),
        "past_values=32x2",
    ),
}
CASES = {
    **{f"own:{name}": case for name, case in OWN.items()},
    **{f"torchvision:{name}": case for name, case in VISION.items()},
    **{f"transformers:{name}": case for name, case in HUGGING.items()},
}
