"""How much accuracy does DPPNet cost ResNet-20 on CIFAR-10, with 5,000 training images?

    python -m tests.benchmarks.train_dppnet FOLDER

Converts the trained network, prunes until the unions of masks hold 40 % of the positions,
fine-tunes, and writes checkpoint, ONNX and figures to the folder; called again, it goes on where it
was stopped. The images are few, and the network knows them by heart. So they are cropped, flipped
and mixed in pairs, and what is learned is what the network as it was says of them, its softened
probabilities. The data lie beside the repository.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.networks import SHARED
from topiarist.pruning.dppnet.convert import convert
from topiarist.pruning.dppnet.export import export_onnx
from topiarist.pruning.dppnet.flops import count_flops
from topiarist.pruning.dppnet.layer import dpp_layers
from topiarist.pruning.dppnet.stages import Stage, TrainSettings
from topiarist.pruning.dppnet.training import EpochReport, train

BATCH = 128
SOFTENING = 2.0  # of the teacher's scores


class Block(nn.Module):
    """Two convolutions; a shortcut without weights takes every second pixel, and adds zeros."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.added = stride, (out - into) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[N, I, H, W] -> [N, O, H', W']."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        around = (0, 0, 0, 0, self.added, self.added)
        return functional.relu(y + functional.pad(x[:, :, :: self.stride, :: self.stride], around))


class ResNet20(nn.Module):
    """The network of `cifar10_resnet20.npz`, by the names in that file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 32, 32] -> [N, 10]."""
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))


def trained() -> ResNet20:
    """With its weights."""
    network = ResNet20()
    with np.load(SHARED / "cifar10_resnet20.npz") as file:
        state = {name: torch.from_numpy(file[name]) for name in file.files}
    network.load_state_dict(state, strict=False)  # batch norms count their steps; the file doesn't
    return network.eval()


def images(name: str) -> tuple[Tensor, Tensor]:
    """Scaled images [N, 3, 32, 32] and classes [N] of a file."""
    with np.load(SHARED / name) as file:
        pixels, classes = file["images"], file["labels"]
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    scaled = (torch.from_numpy(pixels) / 255 - mean) / deviation
    return scaled.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(classes).long()


@dataclass(frozen=True)
class Distillation:
    """Batches of changed images with the teacher's probabilities, drawn anew in every epoch."""

    pixels: Tensor
    teacher: nn.Module

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self.pixels)).split(BATCH):
            batch = _mixed(_cropped(self.pixels[chosen]))
            with torch.no_grad():
                scores = self.teacher(batch)
            yield batch, functional.softmax(scores / SOFTENING, dim=1)


def _cropped(batch: Tensor) -> Tensor:
    """Padded by four pixels, cropped and flipped, each image in its own way."""
    size = batch.shape[2]
    padded = functional.pad(batch, (4, 4, 4, 4))
    corner = torch.randint(0, 9, (len(batch), 2))
    rows = corner[:, :1] + torch.arange(size)
    cols = corner[:, 1:] + torch.arange(size)
    cols = torch.where(torch.rand(len(batch), 1) < 0.5, cols.flip(1), cols)
    each = torch.arange(len(batch))[:, None, None]
    return padded.permute(0, 2, 3, 1)[each, rows[:, :, None], cols[:, None]].permute(0, 3, 1, 2)


def _mixed(batch: Tensor) -> Tensor:
    """Every second image is blended with another one."""
    share = torch.rand(len(batch), 1, 1, 1)
    share[::2] = 1.0
    return (share * batch + (1 - share) * batch[torch.randperm(len(batch))]).contiguous()


def accuracy(network: nn.Module) -> float:
    """In percent, on the 500 test images."""
    pixels, classes = images("cifar10_test500.npz")
    training = network.training
    with torch.no_grad():
        right = network.eval()(pixels).argmax(dim=1) == classes
    network.train(training)
    return 100 * right.double().mean().item()


def settings(epochs: tuple[int, int, int], penalty: float, kept: float) -> TrainSettings:
    """At rates that a trained network bears; pruning is gentle first."""
    prune = [
        Stage("prune", "learned", epochs[1], 0.02, 0.01, "cosine", rate * penalty, until_kept=until)
        for rate, until in ((1, 0.75), (2, 0.53), (4, kept))
    ]
    return TrainSettings(
        (
            Stage("experts", "none", epochs[0], 0.02, 0.02),
            Stage("approach", "learned", 12, 0.02, 0.02, "cosine", 1e-3, until_kept=0.95),
            *prune,
            Stage("fine-tune", "frozen", epochs[2], 0.02, 1e-5),
        )
    )


def main() -> None:
    """Train, export, say what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--epochs", type=int, nargs=3, default=(1, 40, 28), help="of experts, pruning, tuning"
    )
    parser.add_argument("--penalty", type=float, default=2e-4, help="of thresholds")
    parser.add_argument("--kept", type=float, default=0.4, help="share of the positions")
    parser.add_argument("--threads", type=int, default=1)
    opts = parser.parse_args()
    opts.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(opts.threads)
    console, teacher = Console(), trained()
    student = trained()
    with torch.no_grad():  # its scores are then those that it learns
        student.linear.weight /= SOFTENING
        student.linear.bias /= SOFTENING
    torch.manual_seed(0)
    network = convert(student)
    batches = Distillation(images("cifar10_train5000.npz")[0], teacher)
    began, epochs = time.process_time(), []

    def progress(report: EpochReport) -> None:
        unions = "".join(str(int(layer.union().sum())) for layer in dpp_layers(network).values())
        console.print(
            f"{report.stage} {report.epoch + 1}: loss {report.loss:.3f}, kept {report.kept:.3f} "
            f"({unions}), test {report.score:.1f}, {time.process_time() - began:.0f} s"
        )
        epochs.append(asdict(report))

    plan = settings(tuple(opts.epochs), opts.penalty, opts.kept)
    checkpoint = opts.folder / "dpp.pt"
    train(network, batches, plan, checkpoint=checkpoint, evaluate=accuracy, progress=progress)
    image = torch.zeros(1, 3, 32, 32)
    export_onnx(network, image, opts.folder / "dpp.onnx")
    report = count_flops(network, image)
    found = {
        "dense_accuracy": accuracy(teacher),
        "accuracy": accuracy(network),
        "multiply_adds_saved": report.reduction,
        "overhead_share": report.overhead / report.dense,
        "unions": [layer.union for layer in report.layers if layer.union is not None],
        "cpu_seconds": time.process_time() - began,
        "epochs": epochs,
    }
    (opts.folder / "figures.json").write_text(json.dumps(found, indent=1))
    console.print({name: value for name, value in found.items() if name != "epochs"})


if __name__ == "__main__":
    main()
