"""Small networks for the tests of the sensitivity analysis."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions, a residual sum and one ReLU module called twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(x + self.bn2(self.conv2(y)))


class SmallResNet(nn.Module):
    """A stem, two residual blocks, a depthwise-separable tail, pooling, a linear."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.pool = nn.MaxPool2d(2)
        self.block1 = Residual(width)
        self.block2 = Residual(width)
        self.tail = nn.Sequential(
            nn.Conv2d(width, width, 3, groups=width), nn.ReLU6(), nn.Conv2d(width, 2 * width, 1)
        )
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(torch.relu(self.stem(x)))
        y = self.block2(self.block1(y))
        y = torch.sigmoid(self.tail(y)) * 2
        return self.fc(y.mean((2, 3)))


class Gates(nn.Module):
    """A linear network with a product of two branches, a concatenation and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(6, 8)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.relu(self.a(x)), self.b(x)
        joined = torch.cat((left * right, left + right), 1)
        return self.out(joined)


class Attention(nn.Module):
    """Matrix products and a sum that have no kernel which writes floats."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        weights = torch.softmax(q @ k.transpose(0, 1), 1)
        y = x + self.out(weights @ v)
        return self.head(y)


class Recurrent(nn.Module):
    """An LSTM, which has kernels for dynamic activations only, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        values, _ = self.lstm(x.unsqueeze(1))
        return self.fc(values[:, 0])


def made(kind: type[nn.Module]) -> nn.Module:
    """A network in evaluation mode whose batch-norms have statistics of their own."""
    torch.manual_seed(1)
    model = kind().train()
    example = batches(kind)[0]
    for _ in range(3):
        model(example)
    return model.eval()


def batches(kind: type[nn.Module], count: int = 3) -> list[Tensor]:
    """Batches of four inputs."""
    generator = torch.Generator().manual_seed(2)
    shape = (4, 3, 16, 16) if kind is SmallResNet else (4, 6)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def planted() -> nn.Module:
    """A network whose depthwise layer has one output channel with weights 300 times the others'.

    The ReLU6 behind it keeps the activation's range.
    """
    model = made(SmallResNet)
    assert isinstance(model, SmallResNet)
    depthwise, pointwise = model.tail[0], model.tail[2]
    assert isinstance(depthwise, nn.Conv2d)
    assert isinstance(pointwise, nn.Conv2d)
    with torch.no_grad():
        depthwise.weight[3] *= 300
        pointwise.weight *= 30  # so that what happens before is seen at the output
        model.fc.bias.zero_()
    return model
