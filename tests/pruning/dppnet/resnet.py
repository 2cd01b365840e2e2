"""ResNets for small images, with the names of torchvision's parts."""

from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, into, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = nn.Sequential()
        if stride > 1 or into != out:
            self.downsample.append(nn.Conv2d(into, out, 1, stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    def __init__(self, channels, middle):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, middle, 1, bias=False)
        self.conv2 = nn.Conv2d(middle, middle, 3, 1, 1, bias=False)
        self.conv3 = nn.Conv2d(middle, 2 * channels, 1, bias=False)
        self.downsample = nn.Conv2d(channels, 2 * channels, 1, bias=False)

    def forward(self, x):
        y = self.conv3(functional.relu(self.conv2(functional.relu(self.conv1(x)))))
        return functional.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """ResNet-20 has three blocks in each of three stages and widths of 16, 32, 64."""

    def __init__(self, blocks, widths, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layers = nn.Sequential()
        into = widths[0]
        for stage, out in enumerate(widths):
            for block in range(blocks):
                self.layers.append(Block(into, out, 2 if stage and not block else 1))
                into = out
        self.fc = nn.Linear(into, classes)

    def forward(self, x):
        x = self.layers(functional.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean(dim=(2, 3)))
