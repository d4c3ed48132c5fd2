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
#   MASTER_PORT  a free port on node 0     default: 29500; any free one when NNODES is 1
#   PYTHON       the interpreter           default: python
#   MAX_RESTARTS after lost processes      default: 0; 10 for MIN:MAX
# Under Kubeflow its PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT say the same.
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

take() { # take NAME OTHER: the variable NAME from OTHER, where only that is set; what both say has to be the same
  if [[ -n ${!2:-} ]]; then
    if [[ -z ${!1:-} ]]; then
      printf -v "$1" %s "${!2}"
      taken+=" $2=${!2}"
    elif [[ ${!1} != "${!2}" ]]; then
      fail "$1=${!1} and $2=${!2} disagree: unset one of them"
    fi
    unset "$2" # or torchrun would read it beside what it is told below
  fi
}

visible_gpus() { # nvidia-smi does not know about CUDA_VISIBLE_DEVICES, CUDA does
  local ids=${CUDA_VISIBLE_DEVICES-unset}
  if [[ $ids == unset ]]; then
    { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU ' || true
  elif [[ -z $ids || $ids == -1 ]]; then
    echo 0
  else
    awk -F, '{ for (n = 0; n < NF && $(n + 1) !~ /^ *(-1)?$/; ++n); print n }' <<<"$ids" # CUDA stops there too
  fi
}

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
  sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2 # the comment above
  exit 2
fi

PYTHON=${PYTHON:-python}
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("mae_dist")))' 2>/dev/null ||
  fail "'$PYTHON' cannot import torch and mae_dist: activate the environment they are installed in, or write PYTHON=/path/to/venv/bin/python launch/torchrun.sh ..."

taken=''
if [[ ${PET_NPROC_PER_NODE:-} == auto || ${PET_NPROC_PER_NODE:-} == gpu ]]; then unset PET_NPROC_PER_NODE; fi
endpoint=${PET_RDZV_ENDPOINT:-}
if [[ -n $endpoint ]]; then
  export PET_RDZV_ENDPOINT_HOST=${endpoint%:*} PET_RDZV_ENDPOINT_PORT=29500 # torchrun's default
  if [[ $endpoint == *:* ]]; then PET_RDZV_ENDPOINT_PORT=${endpoint##*:}; fi
  unset PET_RDZV_ENDPOINT
fi
if [[ -n ${PET_RDZV_BACKEND:-} ]]; then
  [[ $PET_RDZV_BACKEND == static || $PET_RDZV_BACKEND == c10d ]] ||
    fail "PET_RDZV_BACKEND=$PET_RDZV_BACKEND is not known here: write static or c10d"
  # c10d numbers the nodes itself: what is elastic here.
  if [[ $PET_RDZV_BACKEND == c10d && ${PET_NNODES:-1} != 1 && ${PET_NNODES:-1} != *:* ]]; then PET_NNODES+=:$PET_NNODES; fi
  unset PET_RDZV_BACKEND
fi
for pair in NNODES:PET_NNODES NPROC:PET_NPROC_PER_NODE NODE_RANK:PET_NODE_RANK MASTER_ADDR:PET_MASTER_ADDR \
  MASTER_PORT:PET_MASTER_PORT \
  MASTER_ADDR:PET_RDZV_ENDPOINT_HOST MASTER_PORT:PET_RDZV_ENDPOINT_PORT MAX_RESTARTS:PET_MAX_RESTARTS RDZV_ID:PET_RDZV_ID; do
  take "${pair%:*}" "${pair#*:}"
done
if [[ -z ${NNODES:-} ]]; then # each would be a world of its own, and write into the same run
  for name in WORLD_SIZE SLURM_STEP_NUM_TASKS OMPI_COMM_WORLD_SIZE PMI_SIZE SKYPILOT_NUM_NODES; do
    [[ ${!name:-1} == 1 ]] || fail "$name=${!name} says that this is started ${!name} times, but NNODES is not set: write NNODES=N NODE_RANK=I MASTER_ADDR=HOST, as launch/slurm.sbatch does, or NNODES=1 for a run of its own"
  done
  for name in NODE_RANK MASTER_ADDR; do
    [[ -z ${!name:-} ]] || fail "$name=${!name} is set, but NNODES is not: write NNODES=N, or unset $name"
  done
fi

gpus=$(visible_gpus)
NPROC=${NPROC:-$(( gpus > 0 ? gpus : 1 ))}
NNODES=${NNODES:-1}
whole NPROC 1 1024
if [[ -n ${MASTER_PORT:-} ]]; then whole MASTER_PORT 1 65535; fi
if [[ -n ${MAX_RESTARTS:-} ]]; then whole MAX_RESTARTS 0 100000; fi
[[ ${COMMAND:=pretrain} =~ ^(pretrain|knn|linear|finetune)$ ]] ||
  fail "COMMAND=$COMMAND does not run on several processes: write pretrain, knn, linear or finetune"
[[ -z ${PET_STANDALONE:-} || $NNODES == 1 ]] || fail "PET_STANDALONE=$PET_STANDALONE and NNODES=$NNODES disagree: unset one of them"
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
  if [[ -n ${MASTER_PORT:-} ]]; then rendezvous=(--rdzv-endpoint="127.0.0.1:$MASTER_PORT" --local-addr=127.0.0.1); fi
  if [[ -n ${NODE_RANK:-} ]]; then whole NODE_RANK 0 0; fi
  NODE_RANK=0 MASTER_ADDR=''
elif [[ $NNODES == *:* ]]; then
  # c10d: rank 0 may be on any node, which is nobody's concern: what it writes is in the run's directory, which they share.
  [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$NNODES needs MASTER_ADDR, the host name of the node where all meet"
  rendezvous=(--rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:${MASTER_PORT:=29500}" --rdzv-id="${RDZV_ID:-mae_dist}")
  NODE_RANK=any MAX_RESTARTS=${MAX_RESTARTS:-10}
  if [[ -n ${LOCAL_ADDR:-} ]]; then rendezvous+=(--local-addr="$LOCAL_ADDR"); fi # where this node's name does not resolve
else
  # Static: node NODE_RANK has the ranks from NODE_RANK*NPROC on, so rank 0 is on MASTER_ADDR. (c10d ignores both.)
  example="NNODES=$NNODES NODE_RANK=0 MASTER_ADDR=$(hostname) launch/torchrun.sh ..."
  [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$NNODES needs MASTER_ADDR, the host name of node 0; write on node 0: $example"
  [[ -n ${NODE_RANK:-} ]] || fail "NNODES=$NNODES needs NODE_RANK, 0 on $MASTER_ADDR and 1..$((NNODES - 1)) on the others; write on node 0: $example"
  whole NODE_RANK 0 $((NNODES - 1))
  rendezvous=(--node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:=29500}")
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

echo "launch/torchrun.sh: node ${NODE_RANK:-0} of $NNODES${MASTER_ADDR:+ (node 0 is $MASTER_ADDR:$MASTER_PORT)}, processes here: $NPROC, visible GPUs: $gpus${taken:+; from$taken}" >&2
# exec: a signal sent to this process reaches torchrun, which passes it on.
exec "$PYTHON" -m mae_dist.launch --nnodes="$NNODES" --nproc-per-node="$NPROC" "${rendezvous[@]}" \
  --max-restarts="${MAX_RESTARTS:-0}" \
  -m mae_dist "$COMMAND" "$@"
