"""Small networks of kinds that no library of classifiers holds: recurrent, audio, video, generative, detection, graphs.

Each function or class builds one with random weights; `coverage_cases` says what it takes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
    """A convolution with batch norm and ReLU."""
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


class LstmText(nn.Module):
    """Tokens to classes by an embedding, a bidirectional LSTM of two layers, and its mean over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 24)
        self.lstm = nn.LSTM(24, 24, 2, batch_first=True, bidirectional=True)
        self.hidden, self.classifier = nn.Linear(48, 32), nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        found, _ = self.lstm(self.embed(tokens))
        return self.classifier(F.relu(self.hidden(found.mean(1))))


class GruAudio(nn.Module):
    """Spectrogram frames to classes by a GRU behind two Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU())
        self.gru, self.classifier = nn.GRU(32, 24, batch_first=True), nn.Linear(24, 6)

    def forward(self, frames: Tensor) -> Tensor:
        found, _ = self.gru(self.front(frames))
        return self.classifier(found[:, -1])


class Crnn(nn.Module):
    """A text line to characters over its width: convolutions, then a bidirectional LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(1, 16), nn.MaxPool2d(2), conv(16, 32), nn.MaxPool2d(2), conv(32, 32))
        self.lstm, self.head = nn.LSTM(32 * 8, 24, batch_first=True, bidirectional=True), nn.Linear(48, 30)

    def forward(self, line: Tensor) -> Tensor:
        x = self.features(line).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.lstm(x)[0])


class UNet(nn.Module):
    """Two levels down and up again, with skips and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = conv(3, 12), conv(12, 24), conv(24, 48)
        self.up2, self.up1 = nn.ConvTranspose2d(48, 24, 2, 2), nn.ConvTranspose2d(24, 12, 2, 2)
        self.join2, self.join1, self.head = conv(48, 24), conv(24, 12), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        y = self.middle(F.max_pool2d(second, 2))
        y = self.join2(torch.cat([self.up2(y), second], 1))
        return self.head(self.join1(torch.cat([self.up1(y), first], 1)))


class UNet3d(nn.Module):
    """One level down and up again in a volume."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = self._conv(1, 8), self._conv(8, 16)
        self.up, self.join, self.head = nn.ConvTranspose3d(16, 8, 2, 2), self._conv(16, 8), nn.Conv3d(8, 3, 1)

    @staticmethod
    def _conv(n_in: int, n_out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv3d(n_in, n_out, 3, padding=1), nn.BatchNorm3d(n_out), nn.ReLU())

    def forward(self, volume: Tensor) -> Tensor:
        first = self.down(volume)
        y = self.up(self.middle(F.max_pool3d(first, 2)))
        return self.head(self.join(torch.cat([y, first], 1)))


class Generator(nn.Sequential):
    """DCGAN's generator: a code to a picture by transposed convolutions."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Unflatten(1, (32, 1, 1)), nn.ConvTranspose2d(32, 48, 4)]
        for n_in, n_out in ((48, 24), (24, 12)):
            layers += [nn.BatchNorm2d(n_in), nn.ReLU(), nn.ConvTranspose2d(n_in, n_out, 4, 2, 1)]
        super().__init__(*layers, nn.BatchNorm2d(12), nn.ReLU(), nn.ConvTranspose2d(12, 3, 4, 2, 1), nn.Tanh())


class Discriminator(nn.Sequential):
    """DCGAN's discriminator with spectral norm."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for n_in, n_out in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.utils.parametrizations.spectral_norm(nn.Conv2d(n_in, n_out, 4, 2, 1)), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(64, 1, 4), nn.Flatten())


class Tcn(nn.Module):
    """A temporal convolutional network: dilated causal convolutions with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(8, 24, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(24, 24, 3, dilation=d), nn.BatchNorm1d(24), nn.ReLU(), nn.Conv1d(24, 24, 1))
            for d in (1, 2, 4)
        )
        self.head = nn.Linear(24, 5)

    def forward(self, series: Tensor) -> Tensor:
        x = self.first(series)
        for block, dilation in zip(self.blocks, (1, 2, 4), strict=True):
            x = F.relu(x + block(F.pad(x, (2 * dilation, 0))))
        return self.head(x[:, :, -1])


class WaveNet(nn.Module):
    """Gated dilated convolutions on a raw waveform, whose skips are added."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 16, 1)
        self.gates = nn.ModuleList(nn.Conv1d(16, 32, 2, dilation=2**k, padding=2**k) for k in range(3))
        self.outs = nn.ModuleList(nn.Conv1d(16, 32, 1) for _ in range(3))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(16, 24, 1), nn.ReLU(), nn.Conv1d(24, 20, 1))

    def forward(self, wave: Tensor) -> Tensor:
        x, total = self.first(wave), torch.zeros(1)
        for gate, out in zip(self.gates, self.outs, strict=True):
            a, b = gate(x)[:, :, : x.shape[2]].chunk(2, 1)
            kept, skip = out(a.tanh() * b.sigmoid()).chunk(2, 1)
            x, total = x + kept, total + skip
        return self.head(total)


class AudioConv(nn.Sequential):
    """M5: strided convolutions on a raw waveform."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv1d(1, 24, 40, 8)]
        for n_in, n_out in ((24, 24), (24, 48)):
            layers += [nn.BatchNorm1d(n_in), nn.ReLU(), nn.MaxPool1d(4), nn.Conv1d(n_in, n_out, 3)]
        tail = [nn.BatchNorm1d(48), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(48, 10)]
        super().__init__(*layers, *tail)


class VaeEncoder(nn.Module):
    """A picture to mean and logarithm of the variance of its code, as a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 16, 2), conv(16, 32, 2), nn.Flatten())
        self.mu, self.logvar = nn.Linear(32 * 64, 8), nn.Linear(32 * 64, 8)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        found = self.body(image)
        return {"mu": self.mu(found), "logvar": self.logvar(found)}


class VaeDecoder(nn.Module):
    """A code to a picture: a Linear, then upsampling and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.head = nn.Linear(8, 32 * 64), conv(32, 16), conv(16, 8), nn.Conv2d(8, 3, 1)

    def forward(self, code: Tensor) -> Tensor:
        x = self.first(code).view(-1, 32, 8, 8)
        x = self.b(F.interpolate(self.a(F.interpolate(x, scale_factor=2)), scale_factor=2))
        return self.head(x).sigmoid()


class Siamese(nn.Module):
    """Two pictures through one encoder, and whether they show the same."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv(1, 16, 2), conv(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 1))

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        a, b = self.encoder(pair[0]), self.encoder(pair[1])
        return self.head(torch.cat([(a - b).abs(), a * b], 1))


class DenseGraph(nn.Module):
    """A graph network on a dense adjacency matrix, given as a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.near = nn.ModuleList(), nn.ModuleList()
        for n_in, n_out in ((8, 24), (24, 24)):
            self.own.append(nn.Linear(n_in, n_out))
            self.near.append(nn.Linear(n_in, n_out))
        self.classifier = nn.Linear(24, 3)

    def forward(self, graph: dict[str, Tensor]) -> Tensor:
        x, edges = graph["nodes"], graph["edges"].softmax(-1)
        for own, near in zip(self.own, self.near, strict=True):
            x = F.relu(own(x) + edges @ near(x))
        return self.classifier(x.mean(1))


class SuperResolution(nn.Module):
    """EDSR: residual blocks, PixelShuffle, and the picture itself enlarged."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1)) for _ in range(3)
        )
        self.tail = nn.Sequential(nn.Conv2d(16, 48, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(12, 3, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        x = first = self.first(image)
        for block in self.blocks:
            x = x + 0.1 * block(x)
        return self.tail(x + first) + F.interpolate(image, scale_factor=2, mode="bicubic")


class Denoiser(nn.Module):
    """A diffusion model's step: a picture and a time, whose embedding scales and shifts the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 24), nn.SiLU(), nn.Linear(24, 48))
        self.first, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.GroupNorm(4, 24)
        self.second, self.head = nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[:, :, None, None].chunk(2, 1)
        x = self.first(image)
        return self.head(F.silu(self.second(F.silu(self.norm(x) * (1 + scale) + shift))) + x)


class StyleBlock(nn.Module):
    """A generator with noise-free adaptive instance norms that a style sets."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 16, 8, 8))
        self.mapping = nn.Sequential(nn.Linear(16, 24), nn.LeakyReLU(0.2), nn.Linear(24, 32))
        self.conv, self.rgb = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 3, 1)

    def forward(self, code: Tensor) -> Tensor:
        scale, shift = self.mapping(code)[:, :, None, None].chunk(2, 1)
        x = self.conv(self.start.expand(code.shape[0], -1, -1, -1))
        return self.rgb(F.leaky_relu(F.instance_norm(x) * scale + shift, 0.2))


class Detector(nn.Module):
    """A backbone with a pyramid of two levels and heads that both levels share; a dict of lists comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Sequential(conv(3, 16, 2), conv(16, 24, 2)), conv(24, 48, 2)
        self.p1, self.p2 = nn.Conv2d(24, 24, 1), nn.Conv2d(48, 24, 1)
        self.head, self.scores, self.boxes = conv(24, 24), nn.Conv2d(24, 6, 1), nn.Conv2d(24, 8, 1)

    def forward(self, image: Tensor) -> dict[str, list[Tensor]]:
        low = self.c1(image)
        high = self.p2(self.c2(low))
        levels = [self.p1(low) + F.interpolate(high, scale_factor=2), high]
        found = [self.head(level) for level in levels]
        return {"scores": [self.scores(x) for x in found], "boxes": [self.boxes(x) for x in found]}


class Keypoints(nn.Module):
    """A stacked hourglass of one stack: heat maps at a quarter of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, 2), conv(16, 24, 2))
        self.skip, self.low, self.out, self.head = conv(24, 24), conv(24, 24), conv(24, 24), nn.Conv2d(24, 17, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        low = F.interpolate(self.low(F.max_pool2d(x, 2)), scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(self.out(self.skip(x) + low))


class PointNet(nn.Module):
    """Points to classes: shared convolutions of width 1, and the largest over the points."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, n_out in ((3, 24), (24, 48), (48, 64)):
            layers += [nn.Conv1d(n_in, n_out, 1), nn.BatchNorm1d(n_out), nn.ReLU()]
        self.shared = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, points: Tensor) -> Tensor:
        return self.head(self.shared(points).max(2).values)


class Table(nn.Module):
    """Categories and numbers of a table, the categories each with an embedding of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embeds = nn.ModuleList(nn.Embedding(10, 6) for _ in range(4))
        self.body = nn.Sequential(nn.Linear(30, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU())
        self.head = nn.Linear(24, 2)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        rows = [embed(categories[:, k]) for k, embed in enumerate(self.embeds)]
        return self.head(self.body(torch.cat([*rows, numbers], 1)))


class TwoTowers(nn.Module):
    """A user and an item as unit vectors, and how well they go together."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = (
            nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 12)) for _ in "ui"
        )

    def forward(self, user: Tensor, item: Tensor) -> dict[str, Tensor]:
        a, b = F.normalize(self.user(user), dim=1), F.normalize(self.item(item), dim=1)
        return {"user": a, "item": b, "score": (a * b).sum(1)}


class MaskedEncoder(nn.Module):
    """torch's own transformer encoder on tokens with a mask, and a class of the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(100, 32), nn.Parameter(torch.randn(1, 16, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(32, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        found = self.encoder(self.embed(ids) + self.place, src_key_padding_mask=mask == 0)
        return self.classifier(found[:, 0])


class ImageTransformer(nn.Module):
    """A DETR: a small backbone, torch's own transformer, and queries with classes and boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.query = nn.Sequential(conv(3, 16, 2), conv(16, 32, 2)), nn.Parameter(torch.randn(1, 5, 32))
        self.transformer = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)
        self.classes, self.boxes = nn.Linear(32, 7), nn.Linear(32, 4)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        tokens = self.body(image).flatten(2).transpose(1, 2)
        found = self.transformer(tokens, self.query.expand(image.shape[0], -1, -1))
        return {"logits": self.classes(found), "boxes": self.boxes(found).sigmoid()}


class VideoLstm(nn.Module):
    """Frames through one convolutional encoder, then a GRU cell step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv(3, 12, 2), conv(12, 24, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.cell, self.head = nn.GRUCell(24, 16), nn.Linear(16, 4)

    def forward(self, video: Tensor) -> Tensor:
        state = video.new_zeros(video.shape[0], 16)
        for k in range(video.shape[1]):
            state = self.cell(self.encoder(video[:, k]), state)
        return self.head(state)


class Policy(nn.Module):
    """An actor and a critic on one body, as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU())
        self.actor, self.critic = nn.Linear(48, 4), nn.Linear(48, 1)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        found = self.body(observation)
        return self.actor(found).softmax(-1), self.critic(found)
