"""A small convolutional classifier: its accuracy judges samples by label, its features give the Frechet distance."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


class Classifier(nn.Module):
    """Three convolutional blocks; `features` are 128 numbers an image. Images are (B, channels, H, W) in [-1, 1]."""

    def __init__(self, in_channels: int = 1, num_classes: int = 10):
        super().__init__()
        self.body = nn.Sequential(_block(in_channels, 32), _block(32, 64), _block(64, 128))
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(128, num_classes)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(images)))


def train_classifier(images: Tensor, labels: Tensor, epochs: int, device: torch.device, seed: int = 0) -> Classifier:
    """Train on uint8 images (N, C, H, W) with horizontal flips and small shifts; one-cycle schedule."""
    torch.manual_seed(seed)
    model = Classifier(images.shape[1], int(labels.max()) + 1).to(device)
    images, labels = images.to(device), labels.to(device)
    batch = 256
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), device=device)
        for rows in order[: len(order) // batch * batch].split(batch):
            x = images[rows].float() / 127.5 - 1
            if torch.rand(()) < 0.5:
                x = x.flip(-1)
            dy, dx = torch.randint(0, 5, (2,)).tolist()
            x = F.pad(x, (2, 2, 2, 2), value=-1)[..., dy : dy + images.shape[-2], dx : dx + images.shape[-1]]
            loss = F.cross_entropy(model(x), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def evaluate(model: Classifier, images: Tensor, batch: int = 1000) -> tuple[Tensor, Tensor]:
    """(predicted classes, features) of images in [-1, 1]."""
    features = torch.cat([model.features(x) for x in images.split(batch)])
    return model.head(features).argmax(1), features


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2) of two sets of features (Heusel et al. 2017), in float64."""
    a, b = a.double().cpu(), b.double().cpu()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
