#!/usr/bin/env bash
# A DiT of 10 million parameters on the 50,000 training photographs of CIFAR-10, with a VAE of its own. For one GPU.
#
#     bash recipes/cifar10.sh DATA OUTPUT [OPTIONS of train.py that both networks take]
#
# DATA has a folder per class; OUTPUT/dit becomes the pipeline folder. The same command goes on where it was stopped.
# Not run to its end yet: 100 steps of each on a CPU (--steps 100 --device cpu --mixed-precision no) work.
set -euo pipefail
data=$(realpath -e "${1:?DATA, a folder per class}")
output=$(realpath -m "${2:?OUTPUT}")
shift 2
cd "$(dirname "$0")/.."

if [ ! -e "$output/vae/config.json" ]; then
    python train.py vae --data "$data" --output "$output/vae" --steps 40000 --batch-size 128 --learning-rate 1e-3 \
        --warmup-steps 500 --decay cosine --beta2 0.99 --ema-decay 0.999 --save-every 2000 --resume "$@"
fi
python train.py --data "$data" --vae "$output/vae" --output "$output/dit" --width 256 --depth 8 --heads 8 --patch 1 \
    --flip --steps 200000 --batch-size 256 --learning-rate 5e-4 --warmup-steps 1000 --decay cosine --beta2 0.99 \
    --min-snr 5 --ema-decay 0.9995 --mixed-precision bf16 --save-dtype float16 --save-every 5000 --sample-every 10000 \
    --resume "$@"
