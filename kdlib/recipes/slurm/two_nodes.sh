#!/bin/bash
# Training on two nodes under SLURM: 4 GPUs of each train with DDP, the other 4 serve the teacher to their own node
#
#   kdlib recipes copy slurm/two_nodes
#   kdlib recipes copy reasoning
#   sbatch two_nodes.sh reasoning.yaml
#
# Every node asks the teacher on itself, so that the run has the same options wherever SLURM puts it, and resumes there. Both
# nodes must see the directory it is submitted from, with rows and output_dir. A step has the rows of 8 processes: divide
# gradient_accumulation_steps by 8 to keep it as large as on one GPU.
#
# Stopped: ten minutes before its time limit the job gets SIGTERM. The run finishes its step, saves and ends, the job goes back
# into the queue, and the same command resumes. Preempted jobs are requeued by SLURM itself (PreemptMode=REQUEUE), and get the
# same signal where the cluster has PreemptParameters=send_user_signal and a GraceTime of some minutes; otherwise what was not
# saved is done again from the last checkpoint: set save_steps.
#
# Nodes without network: download on the login node (hf download MODEL) into an HF_HOME that the nodes see.
# Not run on a cluster of ours: read it before you submit it. Memory, account and partition are your cluster's.

#SBATCH --job-name=kdlib
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

CONFIG=${1:?usage: sbatch two_nodes.sh CONFIG.yaml}
TEACHER=Qwen/Qwen3-8B
URL=http://127.0.0.1:8000

export HF_HUB_OFFLINE=1 # nothing asks the Hub: models and data are in HF_HOME, or are paths
export OMP_NUM_THREADS=4
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${NODES%%$'\n'*}

STOPPED=
TRAINING=
stop() {
    STOPPED=yes
    if [ -n "$TRAINING" ]; then
        kill -TERM "$TRAINING" # srun passes it on to torchrun on both nodes, torchrun to its processes
    fi
}
trap stop TERM

# The teacher, once on each node; --overlap lets the steps share the job's GPUs.
srun --overlap env CUDA_VISIBLE_DEVICES=4,5,6,7 \
    vllm serve "$TEACHER" --host 127.0.0.1 --port 8000 --tensor-parallel-size 4 \
    --runner pooling --convert embed --pooler-config '{"task":"token_embed","use_activation":false}' &
SERVERS=$!

# Half an hour to load it, on both nodes. A server that ends before that ends the job.
srun --overlap curl --silent --fail --output /dev/null --retry 360 --retry-delay 5 --retry-all-errors "$URL/health" &
READY=$!
wait -n "$SERVERS" "$READY" || [ -n "$STOPPED" ]

# torchrun kills what has not ended 30 seconds after SIGTERM: too soon for a checkpoint, so it is given nine minutes.
# With FSDP2: accelerate launch --config_file fsdp2.yaml --num_machines 2 --machine_rank RANK --main_process_ip "$HEAD" ...,
# RANK being each task's SLURM_NODEID, and TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540 in the environment.
CODE=0
if [ -z "$STOPPED" ]; then
    srun --overlap env CUDA_VISIBLE_DEVICES=0,1,2,3 \
        torchrun --nnodes 2 --nproc-per-node 4 --max-restarts 0 --shutdown-timeout 540 \
        --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$HEAD:29500" \
        -m kdlib distill --config "$CONFIG" --teacher "$URL/v1" --disable_tqdm true &
    TRAINING=$!
    wait "$TRAINING" || CODE=$?
    if [ -n "$STOPPED" ]; then
        CODE=0
        wait "$TRAINING" || CODE=$? # the signal ended the first wait; the run ends when its checkpoint is written
    fi
fi

kill -TERM "$SERVERS" || true
wait "$SERVERS" || true

if [ -n "$STOPPED" ] && { [ -z "$TRAINING" ] || [ "$CODE" -ne 0 ]; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$CODE"
