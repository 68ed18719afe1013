"""Small networks; also what ``--arch tests/small_networks.py:Small`` builds."""

from torch import Tensor, nn


class Small(nn.Module):
    """Two convolutions with batch norms and a classifier."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()
        )
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Wide(nn.Module):
    """Three layers, most of whose time goes into the one between the hidden units."""

    def __init__(self, width: int = 2048, classes: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(144, width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x.flatten(1)).relu()).relu())


class Two(nn.Module):
    """An image and a vector; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.join = nn.Linear(8, 8)
        self.side = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.join(self.norm(self.conv(image)).relu().mean((2, 3)))
        return self.head(hidden + self.side(vector)), hidden


class Flat(nn.Module):
    """One layer, which is the output: nothing to prune."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)
