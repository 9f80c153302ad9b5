# What your cluster wants. Copy to slurm/site.sh (git ignores it) and edit.
#
# The job scripts source the copy on the compute node. Options of sbatch have to be known when you submit: source the
# copy in your login shell too, and sbatch reads the SBATCH_* variables.

export SBATCH_PARTITION=gpu
export SBATCH_ACCOUNT=my_project
# export SBATCH_GPUS_PER_NODE=h100:8

# How to start Python on a compute node: a virtual environment ...
POA_PYTHON=("${SLURM_SUBMIT_DIR:-$PWD}/.venv/bin/python")
# ... or a container (docs/cluster.md); it must see the checkout, the shards, the run directory and POA_CACHE.
# POA_CONTAINER=(apptainer exec --nv --bind /scratch poa.sif)
# POA_CONTAINER=(--container-image=/images/poa.sqsh --container-mounts=/scratch,/home)    # pyxis: options of srun
# POA_PYTHON=(/opt/poa/bin/python)

# A disk of each node for what torch.compile and Triton make; on /tmp, many sites remove it with the job.
# POA_CACHE=/local/$USER/poa

# module load cuda/13.0
# export NCCL_SOCKET_IFNAME=ib0
