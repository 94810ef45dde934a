#!/bin/bash
# Several machines, started by hand or by a scheduler: run this on each of them, with the same arguments.
#
#   NODES=4 HEAD=10.0.0.1 RANK=0 examples/accelerate_configs/multi_node.sh examples/train_reg_dpo.py --config ...
#
# NODES  number of machines            HEAD  address of the first one, which the others must reach
# RANK   number of this machine, from 0
# GPUS   GPUs a machine (default 8)    PORT  free port of the first machine (default 29500)
# ENGINE a file of this folder without .yaml (default fsdp2); ddp, fsdp2, deepspeed_zero2, deepspeed_zero3, ...
# RESTARTS how often all processes are started again in place after one has died (default 0; with a signal that is to
#        end the job, such as that of multi_node.sbatch, leave it there)
set -euo pipefail
: "${NODES:?number of machines}" "${HEAD:?address of the first machine}" "${RANK:?number of this machine}"
GPUS=${GPUS:-8} PORT=${PORT:-29500} ENGINE=${ENGINE:-fsdp2} RESTARTS=${RESTARTS:-0}
configs=$(dirname "$(readlink -f "$0")")

# Restarted processes find each other only in a store of their own: the launcher's keeps addresses of the dead.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# accelerate starts torchrun with a c10d rendezvous at HEAD:PORT, and adds the settings of the engine.
exec accelerate launch --config_file "$configs/$ENGINE.yaml" \
  --num_machines "$NODES" --machine_rank "$RANK" --num_processes "$((NODES * GPUS))" \
  --rdzv_backend c10d --main_process_ip "$HEAD" --main_process_port "$PORT" --max_restarts "$RESTARTS" "$@"
