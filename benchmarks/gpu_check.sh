#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call: the tests marked `gpu`; training in bf16, in fp16 and compiled,
# which must wait for its data for less than 5% of its time; engines in fp16 and bf16, exported, proved and measured
# beside torch and torch.compile; and TensorRT for the GPU that is there, where TensorRT is installed. What it finds goes to gpu-check.md as Markdown; the exit
# status says whether all of it passed. Run it from the repository's root in an environment with galembed[dev], on an
# otherwise idle machine; its arguments are pytest's. OUT=file and WORK=folder change where things go.
set -uo pipefail
out=${OUT:-gpu-check.md}
work=${WORK:-$(mktemp -d)}
mkdir -p "$work"
failed=0

gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader) || exit 1
versions=$(python -c '
import lightning, timm, torch
print(f"torch {torch.__version__}, timm {timm.__version__}, lightning {lightning.__version__}, CUDA {torch.version.cuda}")
assert torch.cuda.is_available(), "torch sees no GPU"') || exit 1

python -m pytest -m gpu -p no:cacheprovider "$@" | tee "$work/pytest.txt"
[ "${PIPESTATUS[0]}" -eq 0 ] || failed=1

python benchmarks/training_speed.py --work "$work" --images 4500 --batch 128 --epochs 5 --steps 30 --rounds 2 \
    --workers "$(nproc)" --most-wait 0.05 --out "$work/training.md" \
    --ours precision=bf16,channels_last=true \
    --ours precision=fp16,channels_last=true \
    --ours precision=bf16,channels_last=true,compile=true || failed=1

python -m galembed simulate "$work/cutouts" --bricks 0 --cutouts 6500 --workers "$(nproc)" || failed=1
for precision in fp32 fp16 bf16; do
    python -m galembed export "${BACKBONE:-builtin}" --precision "$precision" --verify "$work/cutouts/cutouts" --quiet \
        > "$work/export-$precision.txt" 2>&1 || failed=1
done
# TensorRT for RTX has no Hopper cards: a refusal is a result.
python -m galembed export "${BACKBONE:-builtin}" --trt > "$work/export-trt.txt" 2>&1
python -m galembed bench "${BACKBONE:-builtin}" --batch 32,256,auto --out "$work/bench" || failed=1

{
    printf '`benchmarks/gpu_check.sh` on %s: %s.\n\n' "$(date -I)" "$([ "$failed" -eq 0 ] && echo passed || echo FAILED)"
    printf 'GPU, driver, memory: %s; %s.\n\n' "$gpu" "$versions"
    printf 'Tests marked `gpu`: %s.\n\n' "$(tail -n 1 "$work/pytest.txt" | tr -d '=' | xargs)"
    cat "$work/training.md" || printf 'Training gave no table.\n'
    printf '\n```\n' && cat "$work"/export-*.txt && printf '```\n\n'
    cat "$work/bench/bench.md" || printf 'The engines gave no table.\n'
} > "$out"
echo "written to $out"
exit "$failed"
