"""Train the embedded demo: ``python -m fxquant.models_zoo.train_digits [OUTPUT]``.

Seeded; one CPU core needs a few minutes. Writes the weights as safetensors and prints the top-1
on the held-out split.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.models_zoo._optional import require
from fxquant.models_zoo.digits import WEIGHTS, DigitsNet, DigitsSource, upsampled
from fxquant.models_zoo.metrics import top1

_SEED = 0
_BATCH = 64
_PEAK_LEARNING_RATE = 5e-3
_MAX_ANGLE = 0.2  # radians
_MAX_SCALE = 0.12  # relative
_MAX_SHIFT = 0.12  # of half the image


def train(epochs: int, *, report: bool = True) -> DigitsNet:
    """Train on the training split with small random rotations, scalings and shifts.

    Returns:
        the net in eval mode.
    """
    torch.manual_seed(_SEED)
    images, labels = DigitsSource().training_images()
    inputs = upsampled(images)
    net = DigitsNet()
    batches = len(labels) // _BATCH
    optimizer = torch.optim.AdamW(net.parameters(), lr=_PEAK_LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LEARNING_RATE, epochs * batches)
    for epoch in range(epochs):
        net.train()
        total = 0.0
        for rows in torch.randperm(len(labels))[: batches * _BATCH].reshape(batches, _BATCH):
            loss = F.cross_entropy(net(distorted(inputs[rows])), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if report:
            print(f"epoch {epoch + 1:3d}: loss {total / batches:.4f}", flush=True)
    return net.eval()


def distorted(inputs: Tensor) -> Tensor:
    """Each image of ``(N, C, H, W)`` under its own random similarity, the border repeated."""
    count = len(inputs)
    angle = (torch.rand(count) * 2 - 1) * _MAX_ANGLE
    scale = 1 + (torch.rand(count) * 2 - 1) * _MAX_SCALE
    shift = (torch.rand(count, 2, 1) * 2 - 1) * _MAX_SHIFT
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    grid = F.affine_grid(
        torch.cat([rotation, shift], dim=2), list(inputs.shape), align_corners=False
    )
    return F.grid_sample(inputs, grid, padding_mode="border", align_corners=False)


def held_out_top1(net: DigitsNet) -> float:
    """Top-1 of ``net`` on the held-out split, in percent."""
    images, labels = DigitsSource().evaluation_images()
    with torch.no_grad():
        return top1(net(upsampled(images)), labels)


def save(net: DigitsNet, path: Path) -> None:
    """Write the net's state as safetensors, readable by everyone."""
    safetensors = require(
        "safetensors.torch", distribution="safetensors", purpose="saving the digits weights"
    )
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors.save(state))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, report and save."""
    parser = argparse.ArgumentParser(description="Train the embedded digits model.")
    parser.add_argument(
        "output", nargs="?", type=Path, default=WEIGHTS, help="default: %(default)s"
    )
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s")
    options = parser.parse_args(arguments)
    net = train(options.epochs)
    save(net, options.output)
    size = options.output.stat().st_size
    print(f"held-out top-1 {held_out_top1(net):.2f} %, {size:,} bytes, {options.output}")


if __name__ == "__main__":
    main()
