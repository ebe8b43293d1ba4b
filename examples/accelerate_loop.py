"""TLW in a loop of Hugging Face's accelerate, with gradient accumulation.

On several processes start it by ``accelerate launch examples/accelerate_loop.py``: TLW averages the weighting network's
gradients itself, so it is not given to ``prepare``.
"""

import argparse

import torch
from accelerate import Accelerator
from photographs import Crops
from torch import nn
from torch.utils.data import DataLoader

from tlw_basicsr import TLW, LPIPSDistance, SSIMDistance

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--distance", choices=["ssim", "vgg"], default="ssim", help="vgg downloads torchvision's weights")
parser.add_argument("--resume", action="store_true", help="go on from the folder checkpoint")
args = parser.parse_args()

accelerator = Accelerator(gradient_accumulation_steps=2)
net = nn.Sequential(nn.Conv2d(3, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2))
loader = DataLoader(Crops(4 * args.steps), batch_size=4)
net, optimizer, loader = accelerator.prepare(net, torch.optim.Adam(net.parameters(), 2e-3), loader)
distance = SSIMDistance() if args.distance == "ssim" else LPIPSDistance("vgg")
tlw = TLW.from_preset("economy", distance, weight_crop=32).to(accelerator.device)
accelerator.register_for_checkpointing(tlw)  # the weighting network, its optimiser and the position
if args.resume:
    accelerator.load_state("checkpoint")

for step, (lq, gt) in enumerate(loader):
    with accelerator.accumulate(net):
        loss = tlw(net(lq), gt)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if step % 50 == 0 or step == args.steps - 1:
        accelerator.print(
            f"step {step}: loss {loss.item():.4f} ", *(f"{k} {v:.3f}" for k, v in tlw.summarize().items())
        )

accelerator.save_state("checkpoint")
