#!/usr/bin/env bash
# A first test on a GPU: the paper's network and recipe on CIFAR-10, half of U animals, by PU and by
# ordinary training; then the headline command with three seeds. Goes on after an interruption.
#     results/on_gpu.sh
#     STEPS=2 BATCH=4 N=4 results/on_gpu.sh    # a trial on a CPU
set -euo pipefail
cd "$(dirname "$0")/.."
steps=${STEPS:-2000} batch=${BATCH:-128} n=${N:-5000}

python bench.py --model paper --image_size 32 --channels 3 --batch_size "$batch"
train() {    # folder, and flags of train.py
    python train.py --max_steps "$steps" --batch_size "$batch" --out_dir "out/on_gpu/$1" --resume \
        "${@:2}"
    python evaluate.py --ckpt "out/on_gpu/$1/ckpt.pt" --n "$n"
}
for algorithm in pu unsupervised; do
    train "cifar10-$algorithm" --dataset cifar10 --prior 0.5 --recipe paper --algorithm $algorithm
done
steps=${STEPS:-4000}
for seed in 0 1 2; do
    train "mnist-$seed" --dataset mnist --prior 0.5 --seed $seed
done
