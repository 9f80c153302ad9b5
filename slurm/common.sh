# What the job scripts of this folder share. Sourced by them on the first node of the allocation.
#
# A training process tells this script what became of it by files in $POA_JOB_DIR, not by exit codes: srun returns the
# highest code of all tasks, and --kill-on-bad-exit turns healthy ones into 137.
#   end.ATTEMPT    how the run ended: `done`; `stopped` (saved after a signal; `stay` if run.requeue is off); `try again`;
#                  `give up`, where the next attempt would end alike. A run that crashed or was killed says nothing.
#   progress       the last step saved by this job

say() { printf '%(%FT%T)T job %s attempt %s: %s\n' -1 "$POA_JOB" "$POA_ATTEMPT" "$*"; }

# The name by which Slurm's commands know this job; SLURM_JOB_ID of the last task of an array would mean all of them.
POA_JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
POA_JOB=${POA_JOB:-$SLURM_JOB_ID}
export POA_ATTEMPT=${SLURM_RESTART_COUNT:-0}
export POA_JOB_DIR=${POA_JOBS:-$SLURM_SUBMIT_DIR/runs/.jobs}/$POA_JOB

# What torch.compile and Triton make: on a disk of each node, which is still there when the job comes back to it. A cache
# that several nodes share over a network file system has broken many a run.
POA_CACHE=${POA_CACHE:-/var/tmp/poa-$UID}

# slurm/site.sh may set these, and POA_CACHE
POA_PYTHON=(python3) # e.g. (/path/to/venv/bin/python)
POA_CONTAINER=()     # e.g. (apptainer exec --nv image.sif), or options of srun: (--container-image=image.sqsh)
if [ -e "$POA_SLURM/site.sh" ]; then source "$POA_SLURM/site.sh"; fi

job_field() { scontrol -o show job "$POA_JOB" 2>/dev/null | sed -n "s/.*\b$1=\([^ ]*\).*/\1/p"; }

# First host of the allocation, where rank 0 runs; its address if the name does not resolve.
master_address() {
    local host
    host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    if ! getent ahosts "$host" >/dev/null; then
        host=$(scontrol -o show node "$host" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    fi
    echo "$host"
}

# A port below the ephemeral range, so that no outgoing connection can take it, at a place of the job's own, so that
# two jobs that start together on a shared node do not race for one; the first there that nothing listens on.
free_port() {
    local port=$((20000 + (SLURM_JOB_ID * 13 + POA_ATTEMPT) % 10000))
    while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    echo "$port"
}

# CPUs of a task. Where they are asked for per GPU (--cpus-per-gpu), Slurm does not say it per task.
cpus_per_task() {
    local gpus=${SLURM_GPUS_PER_TASK:-1} # TYPE:NUMBER or NUMBER; unset: one task per GPU
    echo "${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_PER_GPU:-1} * ${gpus##*:}))}"
}

# What a task does before it becomes Python. USR1 is ignored until Python has its handler. On every node the cache has to be
# a directory of the user's own: what lies in it is run.
POA_TASK='
trap "" USR1
mkdir -p -m 700 "$POA_CACHE" 2>/dev/null
if [ -d "$POA_CACHE" ] && [ -O "$POA_CACHE" ] && [ ! -L "$POA_CACHE" ] && [ -w "$POA_CACHE" ]; then
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$POA_CACHE/inductor}
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$POA_CACHE/triton}
else
    echo "warning: $POA_CACHE is no directory of this user on $(hostname): set POA_CACHE in slurm/site.sh" >&2
fi
exec "$@"'

# run_tasks COMMAND [ARG ...]: `poa COMMAND`, one task per rank. -P: no module of the directory that the job was submitted
# from stands in for one of ours; the checkout is named instead.
run_tasks() {
    export POA_CACHE
    srun --kill-on-bad-exit=1 --cpus-per-task="$(cpus_per_task)" --label \
        "${POA_CONTAINER[@]}" bash -c "$POA_TASK" task "${POA_PYTHON[@]}" -P -m pipeline "$@"
}

prepare() {
    MASTER_ADDR=$(master_address) MASTER_PORT=$(free_port)
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(cpus_per_task)}
    export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS PYTHONUNBUFFERED=1
    export PYTHONPATH=${POA_SLURM%/*}${PYTHONPATH:+:$PYTHONPATH}
    mkdir -p "$POA_JOB_DIR" || exit 1
}

# train_and_requeue [ARG ...]: train; requeue the job if it stopped well or got further than the attempt before.
train_and_requeue() {
    local terminated=0 before after code why
    prepare
    rm -f "$POA_JOB_DIR/end.$POA_ATTEMPT" # of an earlier job with this number
    trap 'terminated=1' TERM # scancel, requeue, preemption, time limit: outlive it to see what became of the ranks
    before=$(cat "$POA_JOB_DIR/progress" 2>/dev/null || echo 0)
    say "$SLURM_NTASKS tasks on $SLURM_JOB_NODELIST, rendezvous at $MASTER_ADDR:$MASTER_PORT"

    run_tasks train "$@"
    code=$?
    after=$(cat "$POA_JOB_DIR/progress" 2>/dev/null || echo 0)
    case $(cat "$POA_JOB_DIR/end.$POA_ATTEMPT" 2>/dev/null) in
        done) say "done"; exit 0 ;;
        stopped) why="stopped on a signal at step $after" ;;
        stay) say "stopped on a signal at step $after; run.requeue is off"; exit 75 ;;
        "give up") say "gave up at step $after: another attempt would end alike, see the error above"; exit $((code ? code : 1)) ;;
        *)
            if [ "$after" -le "$before" ]; then
                say "failed (exit code $code) without a new checkpoint: not trying again, see the error above"
                exit $((code ? code : 1))
            fi
            why="failed (exit code $code) after saving step $after"
            ;;
    esac
    requeue "$why"
}

# requeue WHY: unless Slurm ends the job. Requeueing would then bring a cancelled one back to life, and preempted ones
# Slurm requeues by itself. Only a time limit, which sends the same signal, is ours to mend. (When a job ends cannot be
# known beforehand: limits are changed.) The signal may also come while we ask, and end scontrol.
requeue() {
    local attempt answer said=
    if [ "$POA_ATTEMPT" -ge "${POA_MAX_REQUEUES:-1000}" ]; then say "$1; too many requeues"; exit 1; fi
    for attempt in {1..60}; do # a controller that restarts may be away for minutes
        if [ "$terminated" = 1 ]; then
            case $(job_field Reason) in
                TimeLimit) ;;
                "") say "$1; no answer from Slurm"; sleep 5; continue ;; # so nothing is known
                *) say "$1; ended by Slurm"; exit 1 ;;
            esac
        fi
        if [ "$(job_field Restarts)" -gt "$POA_ATTEMPT" ] 2>/dev/null; then say "a later attempt is running"; exit 1; fi
        if [ -z "$said" ]; then say "$1; requeueing"; said=1; fi
        answer=$(scontrol requeue "$POA_JOB" 2>&1) && break
        say "requeue: ${answer:-interrupted}"
        case $answer in *disabled*) exit 75 ;; *pending*) break ;; esac # --no-requeue; already requeued
        sleep 5
    done
    sleep 300 # Slurm ends this script; if it ended by itself the job would count as finished
    exit 1
}
