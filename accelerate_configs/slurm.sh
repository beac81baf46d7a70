#!/bin/bash
# One dataset from a Slurm cluster: the job goes on after every time limit and preemption until it is done. Submit it in
# the folder of batch_generate.py, with your environment active and batch_generate.py's flags at the end:
#
#     sbatch accelerate_configs/slurm.sh --vae_path ... --output_dir dataset

# To edit; `sbatch --nodes=4 accelerate_configs/slurm.sh ...` says the same for once.
#SBATCH --nodes=2              # machines; the output folder is on a file system that all of them see
#SBATCH --gpus-per-node=8      # GPUs of each, a process for each; remove this line where there are none
#SBATCH --cpus-per-task=32     # cores of each; where there are no GPUs, a process for each
#SBATCH --time=04:00:00        # of one turn, not of the whole job: short turns come sooner
##SBATCH --partition=gpu       # where, if your cluster wants to know; with one # less, the line counts
##SBATCH --account=project     # who pays, likewise

# To keep.
#SBATCH --job-name=userdiff    # in squeue
#SBATCH --ntasks-per-node=1    # one launcher on each machine, which starts the processes there
#SBATCH --signal=TERM@120      # sent to them two minutes ahead of the limit, as at a preemption: they end in order
#SBATCH --requeue              # after a preemption or the loss of a machine, Slurm itself queues the job again
#SBATCH --open-mode=append     # the next turn goes on in the same log
#SBATCH --output=slurm-%j.out  # the log; %j is the job's number

set -u                                                                # what Slurm did not set is an error
echo "Turn $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST" # heads its part of the log

flags=()                                                              # those of batch_generate.py, in this turn
output_dir=generated_images                                           # its default
previous=                                                             # the flag before
for flag in "$@"; do                                                  # of what stood after slurm.sh
    [[ $previous == --output_dir ]] && output_dir=$flag               # `--output_dir DIR`
    [[ $flag == --output_dir=* ]] && output_dir=${flag#*=}            # `--output_dir=DIR`
    [[ $flag == --overwrite && ${SLURM_RESTART_COUNT:-0} -gt 0 ]] || flags+=("$flag") # start again once, not every turn
    previous=$flag                                                    # on to the next
done

last_run() {                                                          # when it began, how it ended, what it made
    grep -E '"(started|state|published)":' "$output_dir/run.json" 2>/dev/null | tail -n 3 # of the last in the history
}

kind=${SLURM_GPUS_ON_NODE:+multi_node}                                # of configuration: empty without GPUs
processes=${SLURM_GPUS_ON_NODE:-$SLURM_CPUS_PER_TASK}                 # on each machine
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)    # the machine on which the processes meet

# shellcheck disable=SC2016                                           # SLURM_NODEID is another on each machine
launch=(                                                              # accelerate on all machines at once
    srun --cpus-per-task="$SLURM_CPUS_PER_TASK"                       # it may not know, and take a single core
    --kill-on-bad-exit=0 --wait=0                                     # if one machine fails, the others end in order
    bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' bash # 0, 1, ...; "$@" is all that follows
    --config_file "accelerate_configs/${kind:-cpu}.yaml"              # what is not said here
    --num_machines "$SLURM_JOB_NUM_NODES"                             # as many as Slurm gave
    --num_processes "$((SLURM_JOB_NUM_NODES * processes))"            # of all machines together
    --num_cpu_threads_per_process 1                                   # of every process, whatever the machine
    --main_process_ip "$first"                                        # a name will do
    --main_process_port "$((20000 + SLURM_JOB_ID % 10000))"           # another for the next job on that machine
    batch_generate.py "${flags[@]}"                                   # the job
)

before=$(last_run)                                                    # an earlier run may have been stopped, too
"${launch[@]}"                                                        # until the images are there or the signal comes
status=$?                                                             # 0, or 1 for all else
after=$(last_run)                                                     # as before, if the job was refused

# Again, if this turn was stopped and made images; else a typo, a failure or too short a turn would come back for ever.
if [[ $after != "$before" && $after == *'"stopped by signal'* && $after != *'"published": 0,'* ]]; then
    scontrol requeue "$SLURM_JOB_ID"                                  # ends this turn; the next goes on from here
fi
exit "$status"                                                        # what sacct shows
