"""TLW in a loop of one's own: a small SR network ×2 on photographs of scikit-image."""

import argparse

import torch
from photographs import Crops
from torch import nn
from torch.utils.data import DataLoader

from tlw_basicsr import TLW, LPIPSDistance, SSIMDistance

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--distance", choices=["ssim", "vgg"], default="ssim", help="vgg downloads torchvision's weights")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

net = nn.Sequential(nn.Conv2d(3, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2))
optimizer = torch.optim.Adam(net.to(device).parameters(), 2e-3)
distance = SSIMDistance() if args.distance == "ssim" else LPIPSDistance("vgg")
tlw = TLW.from_preset("economy", distance, weight_crop=32).to(device)

for step, (lq, gt) in enumerate(DataLoader(Crops(8 * args.steps), batch_size=8)):
    loss = tlw(net(lq.to(device)), gt.to(device))  # with the E step on the weighting network, when one is due
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0 or step == args.steps - 1:
        print(f"step {step}: loss {loss.item():.4f} ", *(f"{k} {v:.3f}" for k, v in tlw.summarize().items()))

torch.save({"params": net.state_dict()}, "net_g.pth")
torch.save(tlw.state_dict(), "tlw.pth")  # to go on: tlw.load_state_dict(torch.load("tlw.pth", weights_only=True))
