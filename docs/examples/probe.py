"""Somebody else's project: a head of its own on a frozen pre-Buffer, trained by its own Trainer.

python docs/examples/probe.py ASSET [--epochs 20]

The task is made up on the spot: in which corner of a picture is the bright square?
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from neo_components import PreBuffer
from neo_components.model.attach import image_features


def pictures(count: int, seed: int, side: int = 64) -> TensorDataset:
    """Noise with a bright square in one of four corners, and which corner it is."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 4, (count,), generator=generator)
    images = 0.3 * torch.randn(count, 3, side, side, generator=generator)
    for image, place in zip(images, corner.tolist(), strict=True):
        row, column = (place // 2) * side // 2, (place % 2) * side // 2
        image[:, row : row + side // 2, column : column + side // 2] += 2
    return TensorDataset(images, corner)


class Corner(lightning.LightningModule):
    """A linear head on the visual tokens of a pre-Buffer, which stays as it is."""

    def __init__(self, asset: str, tokens: int) -> None:
        super().__init__()
        self.eyes = PreBuffer.from_pretrained(asset).eval().requires_grad_(False)
        self.head = nn.Linear(tokens * self.eyes.hparams.hidden_size, 4)

    def forward(self, images: Tensor) -> Tensor:
        seen = torch.stack([tokens.flatten() for tokens in image_features(self.eyes, images)])
        return self.head(nn.functional.layer_norm(seen, seen.shape[-1:]))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.head.parameters(), lr=3e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("asset")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    lightning.seed_everything(0)
    h = PreBuffer.from_pretrained(options.asset).patch_embedding.hparams
    model = Corner(options.asset, tokens=(64 // (h.patch_size * h.fold)) ** 2)
    trainer = lightning.Trainer(max_epochs=options.epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, DataLoader(pictures(128, seed=1), batch_size=16, shuffle=True))
    [scores] = trainer.test(model, DataLoader(pictures(64, seed=2), batch_size=64))
    print(f"accuracy {scores['accuracy']:.3f}, by chance 0.250")


if __name__ == "__main__":
    main()
