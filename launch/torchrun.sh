#!/usr/bin/env bash
# Pretrain (or evaluate) on this node, or on NNODES nodes when the same line is run on each of them.
#
#   launch/torchrun.sh --config configs/vit_b16.yaml [--section.key value ...]
#
#   COMMAND=finetune launch/torchrun.sh runs/vit_b16 --config configs/finetune_vit_b16.yaml [...]
#
# Everything after the script's name goes to `python -m mae_dist pretrain`. These variables say what runs and where:
#   COMMAND      pretrain, knn, linear or finetune    default: pretrain
#   NPROC        processes on this node    default: one a visible GPU; 1 where there is none
#   NNODES       nodes in all, or MIN:MAX  default: 1
#   NODE_RANK    this node, 0..NNODES-1    needed when NNODES > 1; not for MIN:MAX
#   MASTER_ADDR  host name of node 0       needed when NNODES is not 1
#   MASTER_PORT  a free port on node 0     default: 29500
#   PYTHON       the interpreter           default: python
#   MAX_RESTARTS after lost processes      default: 0; 10 for MIN:MAX
# Two nodes:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a launch/torchrun.sh --config configs/vit_b16.yaml   # on node-a
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node-a launch/torchrun.sh --config configs/vit_b16.yaml   # on the other
# Elastic: NNODES=MIN:MAX goes on with the nodes that are left, as long as the one at MASTER_ADDR, where they meet, is one
# of them; a node that comes (back) is taken in. Each number of processes has to divide train.global_batch_size.
# To stop and keep the work: SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGQUIT, or SIGHUP (a closed terminal; none of it under
# nohup) to this process. The same line again resumes.
# Exit status: 0 complete, 2 a mistake of the user's, 3 the training diverged (again would be no better), 128 + n stopped
# by signal n and saved; all else: the same line again may well go on.

set -euo pipefail

fail() {
  echo "launch/torchrun.sh: error: $1" >&2
  exit 2
}

whole() { # whole NAME LOWEST HIGHEST: the variable NAME holds a whole number in that range
  if ! [[ ${!1} =~ ^(0|[1-9][0-9]{0,5})$ ]] || (( ${!1} < $2 || ${!1} > $3 )); then
    fail "$1=${!1} is not a whole number from $2 to $3"
  fi
}

visible_gpus() { # nvidia-smi does not know about CUDA_VISIBLE_DEVICES, CUDA does
  local ids=${CUDA_VISIBLE_DEVICES-unset}
  if [[ $ids == unset ]]; then
    { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU ' || true
  elif [[ -z $ids || $ids == -1 ]]; then
    echo 0
  else
    awk -F, '{ print NF }' <<<"$ids"
  fi
}

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
  sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2 # the comment above
  exit 2
fi

PYTHON=${PYTHON:-python}
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("mae_dist")))' 2>/dev/null ||
  fail "'$PYTHON' cannot import torch and mae_dist: activate the environment they are installed in, or write PYTHON=/path/to/venv/bin/python launch/torchrun.sh ..."

gpus=$(visible_gpus)
NPROC=${NPROC:-$(( gpus > 0 ? gpus : 1 ))}
NNODES=${NNODES:-1}
MASTER_PORT=${MASTER_PORT:-29500}
whole NPROC 1 1024
whole MASTER_PORT 1 65535
if [[ $NNODES == *:* ]]; then
  MIN=${NNODES%%:*}
  whole MIN 1 100000
  export MAX=${NNODES#*:} # only for `whole`
  whole MAX "$MIN" 100000
else
  whole NNODES 1 100000
fi

if [[ $NNODES == 1 ]]; then
  # A free port on this machine, by number: in many containers the machine's own name does not resolve.
  rendezvous=(--standalone --local-addr=127.0.0.1)
  NODE_RANK=0 MASTER_ADDR=''
elif [[ $NNODES == *:* ]]; then
  # c10d: rank 0 may be on any node, which is nobody's concern: what it writes is in the run's directory, which they share.
  [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$NNODES needs MASTER_ADDR, the host name of the node where all meet"
  rendezvous=(--rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="${RDZV_ID:-mae_dist}")
  NODE_RANK=any MAX_RESTARTS=${MAX_RESTARTS:-10}
  if [[ -n ${LOCAL_ADDR:-} ]]; then rendezvous+=(--local-addr="$LOCAL_ADDR"); fi # where this node's name does not resolve
else
  # Static: node NODE_RANK has the ranks from NODE_RANK*NPROC on, so rank 0 is on MASTER_ADDR. (c10d ignores both.)
  example="NNODES=$NNODES NODE_RANK=0 MASTER_ADDR=$(hostname) launch/torchrun.sh $*"
  [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$NNODES needs MASTER_ADDR, the host name of node 0; write on node 0: $example"
  [[ -n ${NODE_RANK:-} ]] || fail "NNODES=$NNODES needs NODE_RANK, 0 on $MASTER_ADDR and 1..$((NNODES - 1)) on the others; write on node 0: $example"
  whole NODE_RANK 0 $((NNODES - 1))
  rendezvous=(--node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT")
fi

# A node's cores, shared out (torchrun would give each process one).
threads=$(( $(nproc) / NPROC ))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( threads > 0 ? threads : 1 ))}
# Warnings and errors only: what NVIDIA calls the least a production run should log.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Less GPU memory lost to fragmentation.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# When NCCL gives up, what each rank was waiting for is in /tmp/nccl_trace_rank_*.
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1} TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
# After a stop signal the processes have this long to write a checkpoint (seconds; torch 2.11 gives them 30 whatever this says).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

echo "launch/torchrun.sh: node ${NODE_RANK:-0} of $NNODES${MASTER_ADDR:+ (node 0 is $MASTER_ADDR:$MASTER_PORT)}, processes here: $NPROC, visible GPUs: $gpus" >&2
# exec: a signal sent to this process reaches torchrun, which passes it on.
exec "$PYTHON" -m mae_dist.launch --nnodes="$NNODES" --nproc-per-node="$NPROC" "${rendezvous[@]}" \
  --max-restarts="${MAX_RESTARTS:-0}" \
  -m mae_dist "${COMMAND:-pretrain}" "$@"
