"""TLW in Lightning: the object is a part of the module, and steps its own optimiser."""

import argparse
import sys

import torch
from photographs import Crops
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tlw_basicsr import TLW, LPIPSDistance, SSIMDistance

sys.path.append(sys.path.pop(0))  # else this file would be imported, which has the package's name
import lightning


class Task(lightning.LightningModule):
    """A small SR network ×2 under TLW; ``state_dict()``, and so a checkpoint, holds both."""

    def __init__(self, distance: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2)
        )
        self.tlw = TLW.from_preset("economy", distance, weight_crop=32)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """L_θ, which Lightning minimises over the SR network's parameters."""
        lq, gt = batch
        loss = self.tlw(self.net(lq), gt)
        if batch_idx % 50 == 0:
            print(
                f"step {batch_idx}: loss {loss.item():.4f} ", *(f"{k} {v:.3f}" for k, v in self.tlw.summarize().items())
            )
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of the SR network alone."""
        return torch.optim.Adam(self.net.parameters(), 2e-3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--distance", choices=["ssim", "vgg"], default="ssim", help="vgg downloads torchvision's weights"
    )
    parser.add_argument("--resume", metavar="CKPT", help="Lightning's checkpoint to go on from")
    args = parser.parse_args()
    task = Task(SSIMDistance() if args.distance == "ssim" else LPIPSDistance("vgg"))
    trainer = lightning.Trainer(
        max_steps=args.steps, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(task, DataLoader(Crops(8 * args.steps), batch_size=8), ckpt_path=args.resume, weights_only=True)
    trainer.save_checkpoint("lightning.ckpt")
