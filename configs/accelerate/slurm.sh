#!/usr/bin/env bash
# Train on several nodes under Slurm: one task per node, which starts one process per GPU.
#
#   sbatch --nodes 2 configs/accelerate/slurm.sh --config configs/train/bge-large-zh.yaml --output_dir outputs/large
#
# Submit from the root of the repository, which every node must see, as well as .venv, model, data and output_dir.
# What follows the script's name goes to train.py. Options in the sbatch line beat those below.
# Two minutes before its time is up training saves, and the job puts itself into the queue again; so does Slurm after a
# lost node or a preemption. Started again, it goes on from the last checkpoint, until it is done.

#SBATCH --job-name=bge-core
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%j.out
# --signal: this script is told two minutes before the time is up (and, where Slurm is set up so, before a preemption).

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

# Told, it tells the tasks of the step: most clusters (proctrack/cgroup) pass a signal on to them and not to what they
# have started. So each task tells the processes of its launcher, which save and exit with 75. The launcher itself ignores
# USR1; on TERM it would kill what has not saved within 30 seconds. It does not pass the 75 on, so `told` decides.
told=""
trap 'told=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

# In single quotes: SLURM_NODEID must be that of the node where the line runs, not of the one where this script does.
srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
    (
        trap "" USR1
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
    ) &
    launcher=$! code=0
    trap "pkill -USR1 -P $launcher" USR1
    wait "$launcher" || code=$?
    while kill -0 "$launcher" 2>/dev/null; do  # a signal ends `wait` early
        code=0
        wait "$launcher" || code=$?
    done
    exit "$code"
' train --resume_from_checkpoint latest "$@" &
step=$! code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do
    code=0
    wait "$step" || code=$?
done
if [ "$told" ] && [ "$code" -ne 0 ]; then
    echo "stopped before the time was up; job $SLURM_JOB_ID goes into the queue again" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
