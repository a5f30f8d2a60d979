"""A sweep on Slurm, started on a node that may submit jobs:

    python nbs/clusters/slurm.py all --preset paper --out /shared/sweeps

Everything after the file's name goes to `whatmatters sweep`. What it submits ends with it."""
import sys
from dask_jobqueue import SLURMCluster
from whatmatters.core.cli import main


def workers():
    "What one job is: one process with one GPU. Replace queue, account and sizes by your own."
    return SLURMCluster(
        cores=1, processes=1,                   # of dask: one run at a time
        job_cpu=8, memory="64GB",               # of Slurm: cores and memory for this run
        job_extra_directives=["--gres=gpu:1"],  # Slurm shows the process this GPU only; without it, a job of cores alone
        job_script_prologue=["export OMP_NUM_THREADS=8"],
        queue="gpu", account="project", walltime="12:00:00",  # longer than the longest run: one that is cut off starts again
        death_timeout=60,                       # seconds after which a job ends whose scheduler is gone
        interface=None,                         # the network that the nodes share, such as "ib0"
        scheduler_options={"dashboard": False, "dashboard_address": ":0"},
    )


if __name__ == "__main__":
    with workers() as cluster:
        cluster.scale(jobs=16)  # or cluster.adapt(maximum_jobs=16), which gives back what waits
        raise SystemExit(main(["sweep", *sys.argv[1:], "--scheduler", cluster.scheduler_address]))
