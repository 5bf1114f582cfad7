#!/usr/bin/env bash
# The five systems of "Scaling Laws for Galaxy Images" (arXiv:2404.02973), on what a machine of two cores can do in an
# hour: the laws on simulated galaxies of 48 pixels, the downstream tasks on real ones. docs/paper.md has the commands
# for the full data. Killed, the same call goes on where it was.
#
#   benchmarks/paper.sh ../shared/data paper/
#
# With galembed on PATH (or GALEMBED=...) and the Python that it is installed in (PYTHON=...).
set -euo pipefail
data=${1:?the folder of the real data}
out=${2:?a folder to work in}
galembed=${GALEMBED:-galembed}
here=$(dirname "$0")
mkdir -p "$out"
export OMP_NUM_THREADS=1 # small networks gain nothing from a second thread; two lanes side by side use both cores

step() { # NAME SIGN COMMAND...: run a command unless its sign is there, and note its seconds
    local name=$1 sign=$2 begun=$SECONDS
    shift 2
    [ -e "$sign" ] && return
    echo "== $name: $*"
    "$@" > "$out/$name.log" 2>&1 || { echo "== $name failed; see $out/$name.log" && return 1; }
    echo "$name $((SECONDS - begun)) s" | tee -a "$out/seconds.txt"
}

laws() {
    # 1. Loss against labelled galaxies.
    step data "$out/data/plot.png" \
        "$galembed" study data "$out/survey" --out "$out/data" --arch test_convnext,test_resnet \
        --sizes 125,250,500,1000,2000 --seeds 3 --size 48 --epochs 20 --patience 5 --batch 32 --learning-rate 2e-3
    # 2. Loss against parameters, with all the galaxies and with a quarter.
    step size "$out/size/plot.png" \
        "$galembed" study size "$out/survey" --out "$out/size" --arch test_efficientnet,test_convnext,test_resnet \
        --galaxies 2000 --seeds 2 --size 48 --epochs 12 --batch 32 --learning-rate 2e-3
    # 5. The backbone that is given to others.
    step released "$out/released/backbone.json" \
        "$galembed" train "$out/survey" --out "$out/released" --arch test_convnext --size 48 --epochs 20 --batch 32 \
        --learning-rate 2e-3
    step export "$out/released/engines/onnx-fp32.json" "$galembed" export "$out/released"
}

tasks() {
    # What tasks are learnt from: random weights, simulated galaxies, then real volunteers' votes, and ImageNet.
    step real "$out/real/backbone.json" \
        "$galembed" train "$data/images/gz2_votes_1000/gz2_votes_1000_open.parquet" --out "$out/real" --init builtin \
        --votes "$data/votes/gz2_votes_1000_open.parquet" --questions gz2 --crop 0.5 \
        --epochs 20 --batch 32 --learning-rate 2e-4 --layer-decay 0.75 --patience 5
    step tasks "$out/tasks/tasks.toml" "${PYTHON:-python}" "$here/paper_tasks.py" "$data" "$out/tasks"
    local starts=(--init scratch --init simulated=builtin --init "simulated then votes=$out/real"
        --init imagenet=timm:convnext_atto.d2_in1k)
    # 3. Downstream tasks, linear and end to end.
    step linear "$out/linear/plot.png" \
        "$galembed" study downstream --out "$out/linear" --tasks "$out/tasks/tasks.toml" "${starts[@]}" \
        --mode linear --folds 5 --seeds 3
    step downstream "$out/downstream/plot.png" \
        "$galembed" study downstream --out "$out/downstream" --tasks "$out/tasks/tasks.toml" "${starts[@]}" \
        --mode linear --mode end-to-end --size 64 --folds 3 --seeds 1 --epochs 5 --patience 3
    # 4. Label efficiency.
    step labels "$out/labels/plot.png" \
        "$galembed" study labels --out "$out/labels" --tasks "$out/tasks/tasks.toml" "${starts[@]}" \
        --mode linear --folds 3 --seeds 2
    step labels-end-to-end "$out/labels-end-to-end/plot.png" \
        "$galembed" study labels --out "$out/labels-end-to-end" --tasks "$out/tasks/gz2_spiral_odd.toml" "${starts[@]}" \
        --mode linear --mode end-to-end --divisors 1,4,16,64 --size 64 --folds 3 --epochs 6 --patience 3
}

step simulate "$out/survey/votes.parquet" \
    "$galembed" simulate "$out/survey" --bricks 0 --cutouts 4000 --seed 40 --workers 2
laws &
first=$!
tasks &
second=$!
failed=0
wait "$first" || failed=1
wait "$second" || failed=1
exit "$failed"
