#!/usr/bin/env bash
# Train on several nodes under Slurm: one task per node, which starts one process per GPU.
#
#   sbatch --nodes 2 configs/accelerate/slurm.sh --config configs/train/bge-large-zh.yaml --output_dir outputs/large
#
# Submit from the root of the repository, which every node must see, as well as .venv, model, data and output_dir.
# What follows the script's name goes to train.py. Options in the sbatch line beat those below.
# Sent again after a time limit or a lost node, the same line goes on from the last checkpoint.

#SBATCH --job-name=bge-core
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%j.out
# --signal: training is told two minutes before its time is up, saves and stops.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run this with sbatch, not with bash}"
export PATH="$PWD/.venv/bin:$PATH"

GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
MASTER_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))  # two jobs that share a node get different ones
export GPUS_PER_NODE MASTER_IP MASTER_PORT
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}  # compute nodes seldom reach a hub: download the model beforehand
# export NCCL_SOCKET_IFNAME=ib0  # if NCCL picks the wrong network interface; see `ip -brief address`
# export NCCL_DEBUG=INFO         # if the nodes do not find each other

echo "nodes $SLURM_JOB_NODELIST, $GPUS_PER_NODE GPUs each, machine 0 is $MASTER_IP:$MASTER_PORT" >&2

# In single quotes: SLURM_NODEID must be that of the node where the line runs, not of the one where this script does.
srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
    exec accelerate launch \
        --multi_gpu \
        --num_machines "$SLURM_NNODES" \
        --num_processes "$((SLURM_NNODES * GPUS_PER_NODE))" \
        --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MASTER_IP" \
        --main_process_port "$MASTER_PORT" \
        --rdzv_backend static \
        --same_network \
        --mixed_precision no \
        --dynamo_backend no \
        train.py "$@"
' train --resume_from_checkpoint latest "$@"
