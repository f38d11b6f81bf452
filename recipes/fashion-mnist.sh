#!/usr/bin/env bash
# The small model that ships in model_data/fashion-mnist-32: its VAE, then its DiT. Three hours on two CPU cores.
#
#     bash recipes/fashion-mnist.sh [DATA] [OUTPUT]
#
# DATA is the folder of the four Fashion-MNIST files (default: where Debian's dataset-fashion-mnist puts them); OUTPUT/dit
# becomes the pipeline folder. The same command goes on where it was stopped.
set -euo pipefail
data=$(realpath -e "${1:-/usr/share/datasets/fashion-mnist}")
output=$(realpath -m "${2:-runs/fashion-mnist}")
cd "$(dirname "$0")/.."

if [ ! -e "$output/vae/config.json" ]; then
    python train.py vae --data "$data" --output "$output/vae" --steps 4000 --batch-size 64 --learning-rate 1.5e-3 \
        --warmup-steps 100 --decay cosine --beta2 0.99 --ema-decay 0.999 --save-every 500 --device cpu --resume
fi
dit() {  # trained for $1 steps
    python train.py --data "$data" --vae "$output/vae" --output "$output/dit" --width 256 --depth 5 --heads 8 --patch 2 \
        --steps "$1" --batch-size 128 --learning-rate 1e-3 --warmup-steps 300 --decay cosine --beta2 0.99 --min-snr 5 \
        --ema-decay 0.999 --compile --save-dtype float16 --save-every 250 --sample-every 1000 --device cpu --resume
}
# Two cycles of the learning rate: down a cosine to nothing, then from the middle of one that is twice as long.
if [ ! -e "$output/dit/model_index.json" ]; then
    dit 6500
fi
dit 13000
