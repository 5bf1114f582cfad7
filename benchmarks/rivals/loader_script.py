"""The script that an astronomer writes: FITS cubes, asinh, resized to 224 px, timm in float32, vectors in a .npy file.

Run by end_to_end.py. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import timm
import torch
from astropy.io import fits
from safetensors.torch import load_file
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset


class Cubes(Dataset):
    def __init__(self, folder: Path, size: int) -> None:
        self.files, self.size = sorted(folder.glob("*.fits")), size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, at: int) -> torch.Tensor:
        pixels = torch.from_numpy(fits.getdata(self.files[at]).astype(np.float32))
        channels = torch.asinh(torch.nan_to_num(pixels) / 0.02) / 4
        return interpolate(channels[None], size=(self.size, self.size), mode="bilinear", antialias=True)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--architecture", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    network = timm.create_model(options.architecture, pretrained=False, num_classes=0)
    network.load_state_dict(load_file(options.work / "backbone.safetensors"))
    network.eval()
    vectors, ends = [], []
    loader = DataLoader(
        Cubes(options.work / "cubes", options.size), batch_size=options.batch, num_workers=options.workers
    )
    with torch.inference_mode():
        for batch in loader:
            vectors.append(network(batch).numpy())
            ends.append((len(batch), time.time()))
    np.save(options.out / "vectors.npy", np.concatenate(vectors))
    print(json.dumps({"images": sum(count for count, _ in ends), "ends": ends}))


if __name__ == "__main__":
    main()
