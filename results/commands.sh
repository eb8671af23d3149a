#!/bin/sh
# This folder's files, made anew from the repository's root: days on two CPU cores. MNIST must be in
# $MULTIMODAL_DATA (or data/), for the blocks that name them FashionMNIST, SVHN and CelebA too. Of SVHN
# and CelebA a part was at hand: with all of them the numbers will differ. Each block can be run alone.
# The results were made by these commands one by one, not by this script in one go.
set -e
export CUDA_VISIBLE_DEVICES=  # all but the last block on a CPU

# run NAME SCRIPT OPTION... trains in runs/NAME, emptied first; keeps the results as results/NAME.json
run() {
    name=$1 script=$2
    shift 2
    rm -rf "runs/$name"
    python "$script.py" "$@" --runs-dir "runs/$name"
    cp "runs/$name"/*/results.json "results/$name.json"
}

# run_with "OPTION..." NAME SCRIPT OPTION... does the same, the first options being the evaluation's.
run_with() {
    evaluation=$1 name=$2 script=$3
    shift 3
    rm -rf "runs/$name"
    python "$script.py" "$@" --no-eval --runs-dir "runs/$name"
    python evaluate.py $evaluation "runs/$name"/*
    cp "runs/$name"/*/results.json "results/$name.json"
}

# The same, of log p(X) only what all modalities given propose, which takes a fraction of the time.
run_full() {
    run_with "--proposals full" "$@"
}

for seed in 0 1 2 3 4; do
    for script in mvae mmvae mopoe svae vaevae; do
        run "polydigits__${script}__$seed" "$script" --seed "$seed"
    done
done
python evaluate.py results/polydigits__*.json --figure results/polydigits_by_inputs.png
python evaluate.py runs/polydigits__mvae__0/* runs/polydigits__mmvae__0/* runs/polydigits__mopoe__0/* \
    runs/polydigits__svae__0/* runs/polydigits__vaevae__0/* --side-by-side results/polydigits_from_m1.png \
    --given m1
for seed in 0 1 2; do
    run "polydigits-amp__mopoe__$seed" mopoe --seed "$seed" --amp
    run "polydigits-batch__mopoe__$seed" mopoe --seed "$seed" --batch-size 256 --lr 4e-3
done
for beta in 0.5 2.5 5 10 20; do
    run "polydigits-beta__mopoe__0__$beta" mopoe --beta "$beta"
done
python evaluate.py results/polydigits__mopoe__0.json results/polydigits-beta__*.json --against beta \
    --figure results/polydigits_over_beta.png
for seed in 0 1 2; do
    run "polydigits-singletons__mopoe__$seed" mopoe --seed "$seed" --subsets singletons
done
run polydigits-cost__mopoe__0 mopoe --epochs 80
run polydigits-cost__mvae__0 mvae --epochs 56
run polydigits-cost__svae__0 svae --epochs 3
run polydigits-singletons-150__mopoe__0 mopoe --subsets singletons --epochs 150
run polydigits-components__mmvae__0 mmvae --kl components
run polydigits-stratified__vaevae__0 vaevae --expectation stratified --epochs 30 --batch-size 64 --lr 2e-3
run polydigits-stratified__svae__0 svae --expectation stratified --epochs 15 --batch-size 64 --lr 2e-3

for script in mopoe mvae mmvae; do
    run "polymnist__${script}__0" "$script" --dataset polymnist --beta 2.5 --amp --epochs 20
done
run polymnist__vaevae__0 vaevae --dataset polymnist --beta 2.5 --joint poe --expectation stratified \
    --amp --epochs 20
run polymnist__svae__0 svae --dataset polymnist --beta 2.5 --expectation stratified --amp --epochs 20
python evaluate.py runs/polymnist__svae__0/* runs/polymnist__vaevae__0/* \
    --side-by-side results/polymnist_from_m1_svae_vaevae.png --given m1
python evaluate.py runs/polymnist__mopoe__0/* runs/polymnist__mvae__0/* runs/polymnist__mmvae__0/* \
    --side-by-side results/polymnist_from_m1.png --given m1

for beta in 0.5 1 5 10 20; do
    run_full "polymnist-beta__mopoe__0__$beta" mopoe --dataset polymnist --beta "$beta" --amp --epochs 20
done
python evaluate.py results/polymnist__mopoe__0.json results/polymnist-beta__*.json --against beta \
    --figure results/polymnist_over_beta.png

run_full polymnist-seed__mopoe__1 mopoe --dataset polymnist --beta 2.5 --seed 1 --amp --epochs 20
run_full polymnist-batch__mopoe__0 mopoe --dataset polymnist --beta 2.5 --batch-size 1024 --lr 2e-3 \
    --amp --epochs 20
# These two were made as --resume of the one before, which on a CPU comes to the same.
run_full polymnist-batch-50__mopoe__0 mopoe --dataset polymnist --beta 2.5 --batch-size 1024 --lr 2e-3 \
    --amp --epochs 50
run_full polymnist-batch-80__mopoe__0 mopoe --dataset polymnist --beta 2.5 --batch-size 1024 --lr 2e-3 \
    --amp --epochs 80
run polymnist-singletons__mopoe__0 mopoe --dataset polymnist --beta 2.5 --subsets singletons --amp \
    --epochs 20
# Backgrounds that are five mosaics of 64 faces each.
rm -rf runs/faces
mkdir -p runs/faces
python - << 'END'
import os
from pathlib import Path

from PIL import Image

folder = Path(os.environ.get("MULTIMODAL_DATA", "data"), "celeba", "img_align_celeba")
files = sorted(folder.glob("*.jpg"))[: 5 * 64]
for first in range(0, len(files), 64):
    mosaic = Image.new("RGB", (512, 512))
    for i, file in enumerate(files[first : first + 64]):
        mosaic.paste(Image.open(file).resize((64, 64)), (64 * (i % 8), 64 * (i // 8)))
    mosaic.save(f"runs/faces/{first:03}.png")
END
run_with "--importance-samples 1" polymnist-faces__mopoe__0 mopoe --dataset polymnist --beta 2.5 --amp \
    --epochs 20 --backgrounds runs/faces

for share in 1 0.1 0.01 0.001; do
    for script in mvae mmvae mopoe svae vaevae; do
        run "mnist-split__${script}__0__$share" "$script" --dataset mnist-split \
            --supervision "$share" --epochs 6 --amp
    done
done
python evaluate.py results/mnist-split__*.json --against supervision \
    --figure results/mnist-split_by_supervision.png
run mnist-split-streams__mopoe__0 mopoe --dataset mnist-split --supervision 0.99999 --epochs 6
run mnist-split-elbo-is__mmvae__0 mmvae --dataset mnist-split --objective elbo-is --K 1 \
    --distribution laplace --scales free --amsgrad --latent-dim 20 --lr 1e-3 --batch-size 256 --epochs 6
run mnist-split-tight__mmvae__0 mmvae --dataset mnist-split --distribution laplace --scales sum \
    --learn-prior --amsgrad --objective iwae-tight --K 10 --epochs 6 --amp

for script in mvae mmvae mopoe svae vaevae; do
    run "mnist-split-3__${script}__0" "$script" --dataset mnist-split-3 --epochs 6 --amp
done

for seed in 0 1 2; do
    for script in mvae mmvae mopoe; do
        run "mnist-svhn-text__${script}__$seed" "$script" --dataset mnist-svhn-text --seed "$seed" \
            --epochs 10 --amp
    done
done
for script in mvae mopoe; do
    run "mnist-svhn-text-40__${script}__0" "$script" --dataset mnist-svhn-text --epochs 40 --amp
done
run_with "--importance-samples 12" mnist-svhn-text-12__mopoe__0 mopoe --dataset mnist-svhn-text \
    --epochs 40 --amp
for seed in 0 1 2; do
    run "mnist-svhn-text__vaevae__$seed" vaevae --dataset mnist-svhn-text --seed "$seed" --joint poe \
        --expectation stratified --epochs 10 --amp
    run "mnist-svhn-text__svae__$seed" svae --dataset mnist-svhn-text --seed "$seed" \
        --expectation stratified --epochs 10 --amp
done
table_7="--dataset mnist-svhn-text --beta 2.5 --epochs 10 --amp"
run mnist-svhn-text-objective__mopoe__0__stratified mopoe $table_7
run mnist-svhn-text-objective__mopoe__0__all mopoe $table_7 --expectation all
run mnist-svhn-text-objective__mopoe__0__mixture mopoe $table_7 --kl mixture
for objective in elbo elbo-is iwae dreg dreg-mixture iwae-tight dreg-tight; do
    case $objective in elbo*) K=1 ;; *) K=10 ;; esac
    run "mnist-svhn__mmvae__0__$objective" mmvae --dataset mnist-svhn --objective "$objective" \
        --K "$K" --pairings 4 --epochs 8 --amp
done
compared="--objective elbo --K 1 --distribution normal --scales free --no-learn-prior --no-amsgrad"
pairs="--dataset mnist-svhn --pairings 4 --batch-size 128 --beta 1"
for script in mvae mmvae mopoe svae vaevae; do
    case $script in
        mmvae) options=$compared ;;
        svae) options="--lr 1e-3" ;;
        *) options= ;;
    esac
    for share in 1 0.1 0.01 0.001; do
        run "mnist-svhn-shares__${script}__0__$share" "$script" $pairs --epochs 6 \
            --supervision "$share" $options
    done
    run "mnist-svhn-30__${script}__0" "$script" $pairs --epochs 30 $options
done
python evaluate.py results/mnist-svhn-shares__*.json --against supervision \
    --figure results/mnist-svhn_by_supervision.png
for given in mnist svhn; do
    python evaluate.py runs/mnist-svhn-30__mvae__0/* runs/mnist-svhn-30__mmvae__0/* \
        runs/mnist-svhn-30__mopoe__0/* runs/mnist-svhn-30__svae__0/* runs/mnist-svhn-30__vaevae__0/* \
        --side-by-side "results/mnist-svhn_from_$given.png" --given "$given"
done
for seed in 0 1 2; do
    for annealed in 0 8; do
        run "binary-mnist-label__mvae__${seed}__$annealed" mvae --dataset binary-mnist-label \
            --epochs 12 --anneal-epochs "$annealed" --seed "$seed" --amp
    done
done
run binary-mnist-label-weight-1__mvae__0__0 mvae --dataset binary-mnist-label --epochs 12 \
    --anneal-epochs 0 --weights label=1
for seed in 0 1 2; do
    for weight in 1 2 3; do
        run "binary-mnist-label-weight-${weight}__mvae__${seed}__8" mvae --dataset binary-mnist-label \
            --epochs 12 --anneal-epochs 8 --seed "$seed" --weights "label=$weight"
    done
done
run binary-mnist-label-weight-10__mvae__0__8 mvae --dataset binary-mnist-label --epochs 12 \
    --anneal-epochs 8 --weights label=10
run binary-mnist-label-weight-3-100__mvae__0 mvae --dataset binary-mnist-label --epochs 100 \
    --anneal-epochs 60 --weights label=3
for share in 1 0.1 0.01; do
    run "fashion-label__mvae__0__$share" mvae --dataset fashion-label --epochs 4 --anneal-epochs 0 \
        --supervision "$share"
    run "fashion-label-weight__mvae__0__$share" mvae --dataset fashion-label --epochs 4 \
        --anneal-epochs 0 --supervision "$share" --weights label=1
    run "fashion-label-weight-2__mvae__0__$share" mvae --dataset fashion-label --epochs 4 \
        --anneal-epochs 0 --supervision "$share" --weights label=2
done
run multimnist__mvae__0 mvae --dataset multimnist --epochs 5 --anneal-epochs 0
for share in 0.1 0.01; do
    run "multimnist__mvae__0__$share" mvae --dataset multimnist --epochs 5 --anneal-epochs 0 \
        --supervision "$share"
done
run celeba-attr__mvae__0 mvae --dataset celeba-attr --epochs 20 --anneal-epochs 4
run celeba-attr-weight__mvae__0 mvae --dataset celeba-attr --epochs 20 --anneal-epochs 4 \
    --weights attributes=1
run celeba-attr-weight-2__mvae__0 mvae --dataset celeba-attr --epochs 20 --anneal-epochs 4 \
    --weights attributes=2
run celeba19__mvae__0 mvae --dataset celeba19 --epochs 20 --anneal-epochs 4
for script in mopoe mvae mmvae; do
    run_full "celeba-text__${script}__0" "$script" --dataset celeba-text --amp --batch-size 64 --epochs 10
done
python evaluate.py runs/celeba-text__mvae__0/* runs/celeba-text__mmvae__0/* runs/celeba-text__mopoe__0/* \
    --side-by-side results/celeba-text_from_image.png --given image
run_with "--importance-samples 1000" binary-mnist-label-340__mvae__0 mvae --dataset binary-mnist-label \
    --amp --epochs 340
run_with "--importance-samples 1000" mnist-label__mvae__0 mvae --dataset mnist-label --amp --epochs 100 \
    --anneal-epochs 40

# The peer is there after `pip install multivae==1.0.3`, which may change other packages' versions.
python benchmarks/throughput.py --methods mopoe mvae mmvae-k1 svae svae-stratified vaevae vaevae-poe \
    vaevae-poe-stratified --modes float32 bf16 --windows 7 --seconds 2 --json results/throughput_epyc.json
# K = 10 in both precisions, and the peer, do not fit into 24 GB together.
python benchmarks/throughput.py --methods mmvae-k10 --modes float32 --windows 7 --seconds 2 \
    --json results/throughput_k10_epyc.json
python benchmarks/throughput.py --methods mmvae-k10 --modes bf16 --windows 7 --seconds 2 \
    --json results/throughput_k10_bf16_epyc.json
python benchmarks/evaluation.py --modes bf16 --json results/evaluation_cpu.json
# throughput_xeon.json and throughput_k10_xeon.json, of another machine and older code, say their commands, but
# for --json.

# On a GPU, the first two with nothing beside them:
unset CUDA_VISIBLE_DEVICES
nvidia-smi > /dev/null || exit 0
python benchmarks/throughput.py --methods mopoe mvae mmvae --modes float32 "float32 compiled" "bf16 compiled" \
    --windows 3 --seconds 0.4 --json results/throughput_h200.json
long=polymnist-300__mopoe__0
rm -rf "runs/$long" runs/nothing-cached
python benchmarks/whole_run.py mopoe --dataset polymnist --beta 2.5 --amp --cache-dir runs/nothing-cached \
    --runs-dir "runs/$long" --json results/whole_run_h200.json
cp "runs/$long"/*/results.json "results/$long.json"
cp "runs/$long"/*/metrics.csv "results/$long.csv"
cp "runs/$long"/*/samples/from_m1.png results/polymnist-300_from_m1.png
# By the same classifiers, trained on this machine.
cache="--cache-dir runs/nothing-cached"
run polymnist-h200__mopoe__0 mopoe --dataset polymnist --beta 2.5 --amp --epochs 20 $cache
for seed in 0 1 2; do
    export NVIDIA_TF32_OVERRIDE=0
    run "polydigits-h200-exact__mopoe__$seed" mopoe --seed "$seed" $cache
    unset NVIDIA_TF32_OVERRIDE
    run "polydigits-h200-tf32__mopoe__$seed" mopoe --seed "$seed" $cache
    run "polydigits-h200-amp__mopoe__$seed" mopoe --seed "$seed" --amp $cache
done
