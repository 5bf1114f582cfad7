"""Zoobot's side of end_to_end.py; run by it under a Python that has `zoobot[pytorch]`.

Its documented way to representations, `ZoobotEncoder` and `predict_on_catalog.predict`, from JPEG to CSV. As released
(2.9.0 with galaxy-datasets 0.0.25) that fails: the data come as a dict that `ZoobotEncoder` does not unpack. The two
lines of `predict_step` are all that is changed. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
from galaxy_datasets.transforms import get_galaxy_transform, minimal_view_config
from safetensors.torch import load_file
from zoobot.pytorch.predictions import predict_on_catalog
from zoobot.pytorch.training import representations


class Encoder(representations.ZoobotEncoder):
    ends: list[tuple[int, float]] = []  # noqa: RUF012

    def predict_step(self, batch: dict[str, Any], at: int) -> torch.Tensor:
        result: torch.Tensor = self(batch["image"])
        self.ends.append((len(result), time.time()))
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--architecture", required=True)
    parser.add_argument("--size", type=int, required=True, help="224, which is what its transforms make")
    parser.add_argument("--batch", type=int, help="its default unless given")
    parser.add_argument("--workers", type=int, help="its default unless given")
    options = parser.parse_args()
    network = timm.create_model(options.architecture, pretrained=False, num_classes=0)
    network.load_state_dict(load_file(options.work / "backbone.safetensors"))
    given = {"batch_size": options.batch, "num_workers": options.workers}
    predictions = predict_on_catalog.predict(
        pd.read_csv(options.work / "pictures.csv"),
        Encoder(encoder=network),
        save_loc=str(options.out / "vectors.csv"),
        label_cols=[f"feat_{at}" for at in range(network.num_features)],
        inference_transform=get_galaxy_transform(minimal_view_config()),
        datamodule_kwargs={name: value for name, value in given.items() if value is not None},
        trainer_kwargs={"devices": 1, "accelerator": "cpu", "logger": False},
    )
    versions = {package: version(package) for package in ("zoobot", "galaxy-datasets", "torch", "timm", "lightning")}
    print(json.dumps({"images": len(predictions), "ends": Encoder.ends, "versions": versions}))


if __name__ == "__main__":
    main()
