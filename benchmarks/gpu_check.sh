#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call. Run it from the repository's root in an environment with galembed.
set -euo pipefail
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
python -c 'import torch, timm; print("torch", torch.__version__, "timm", timm.__version__, "CUDA", torch.version.cuda)'
python -m pytest -m gpu -p no:cacheprovider "$@"
