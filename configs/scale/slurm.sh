#!/bin/sh
# sbatch configs/scale/slurm.sh: planned, not run. One process a node; jax finds the others through Slurm.
#SBATCH --job-name=aif
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -eu
export CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
CONFIG=${1:-configs/scale/qwen-14b-8xh100.yaml}
srun aif run "$CONFIG" --processes auto --resume --out "runs/$(basename "$CONFIG" .yaml)"
