"What a sweep must survive, each on a real cluster of processes on this machine."
import collections
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
import nbformat
import psutil
import pytest
import yaml
from whatmatters.core import experiments, ledger
from whatmatters.core.cli import _parser, main
from whatmatters.core.sweeps import cluster, plans, sweep

BIN = Path(sys.executable).parent
PARAMETERS = """number: int = 0  # what is squared
sleep: float = 0.  # seconds that it takes
letters: int = 0  # that it prints
bad: list[int] = []  # numbers that fail
deadly: list[int] = []  # numbers that kill the process that they run in
log: str = ""  # file that gets a line at the start and at the end
"""
BODY = """import os, time
def note(what):
    with open(log, "a") as file: file.write(f"{what} {number} {os.getpid()} {time.time()}\\n")
note("start")
time.sleep(sleep)
if number in bad: raise ValueError(f"number: got {number}; want another")
if number in deadly: os.kill(os.getpid(), 9)
print(number ** 2, "x" * letters)
note("end")"""


class Lab:
    "A folder with a toy experiment, whose runs keep a log."
    def __init__(self, place):
        self.place, self.out, self.log, self.mark = place, place/"out", place/"log", uuid.uuid4().hex
        new = nbformat.v4
        nbformat.write(new.new_notebook(cells=[new.new_markdown_cell("# A toy"), new.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new.new_code_cell(BODY)]), place/"toy.ipynb")

    def plans(self, numbers, **given): return plans(str(self.place/"toy.ipynb"), {"number": list(numbers)}, given={"log": str(self.log), **given}, out=self.out)

    def arguments(self, numbers, *options, **given):
        grid = self.place/"grid.yaml"
        grid.write_text(f"number: {list(numbers)}\n")
        given = [word for k, v in {"log": self.log, **given}.items() for word in ("-p", k, str(v))]
        return ["sweep", str(self.place/"toy.ipynb"), "--grid", str(grid), "--out", str(self.out), *given, *options]

    def start(self, *arguments, **options):
        "The command as a process of its own; all that it starts carries a mark."
        (self.place/"scratch").mkdir(exist_ok=True)
        environment = {**os.environ, "LAB": self.mark, "TMPDIR": str(self.place/"scratch")}
        return subprocess.Popen([BIN/"whatmatters", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **options)  # a shell's background jobs, and what they start, would ignore it

    def alive(self):
        "Names of the processes that carry the mark."
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("LAB") == self.mark and process.status() != psutil.STATUS_ZOMBIE: found.append(" ".join(process.cmdline()))
            except (psutil.Error, OSError): continue
        return found

    def lines(self): return [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []
    def starts(self): return collections.Counter(int(n) for what, n, *_ in self.lines() if what == "start")
    def ends(self): return collections.Counter(int(n) for what, n, *_ in self.lines() if what == "end")

    def running(self):
        "Numbers that have started and not ended, with the process that they are in."
        last = {int(number): (what, int(pid)) for what, number, pid, _ in self.lines()}
        return {number: pid for number, (what, pid) in last.items() if what == "start" and psutil.pid_exists(pid)}

    def finished(self):
        "Numbers of the notebooks that carry a finished name; each must be whole."
        found = [p for p in self.out.glob("*/*.ipynb") if not p.name.endswith((".partial.ipynb", ".failed.ipynb"))]
        return sorted(experiments.record_of(p)["parameters"]["number"] for p in found)


@pytest.fixture
def lab(tmp_path): return Lab(tmp_path)


@pytest.fixture(scope="module")
def two():
    "A client of two workers."
    with cluster(workers=2) as client: yield client


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "this did not come in time"
        time.sleep(.05)
    return found


def ended(process, seconds=60):
    out, err = process.communicate(timeout=seconds)
    assert "Traceback" not in err + out, err + out
    return process.returncode, out, err


# a worker is lost
@pytest.mark.parametrize("engine", ["warm", "kernel"])
def test_the_run_of_a_killed_worker_is_repeated_and_no_other(engine, lab, two):
    killed = []
    def kill():
        "Once a run is finished and a worker is at another."
        number, pid = until(lambda: lab.finished() and max(lab.running().items(), default=None))
        worker = pid if engine == "warm" else psutil.Process(pid).ppid()
        os.kill(worker, signal.SIGKILL)
        killed.append((number, pid))
    thread = threading.Thread(target=kill)
    thread.start()
    runs = lab.plans(range(4), sleep=1.)
    found = sweep(runs, two, engine)
    thread.join()
    (number, pid), = killed
    assert len(found.ran) == 4 and not found.failed and lab.finished() == [0, 1, 2, 3]
    assert lab.starts() == {n: 2 if n == number else 1 for n in range(4)}
    assert all(lab.ends()[n] == 1 or engine == "kernel" and n == number for n in range(4)) # an orphaned kernel lives for a second, but writes no notebook
    assert not list(lab.out.glob("*/*.partial.ipynb")) and not psutil.pid_exists(pid) # an orphaned kernel ends too


def test_a_run_that_kills_its_worker_each_time_fails_alone(lab, two):
    found = sweep(lab.plans(range(7), deadly=[2]), two, "warm")
    (planned, why), = found.failed
    assert planned.parameters["number"] == 2 and why == f"{planned.final.stem} failed: the worker was lost each time that it was tried; out of memory?"
    assert lab.finished() == [0, 1, 3, 4, 5, 6] and lab.starts()[2] > 1 and not lab.ends()[2] and lab.ends() == {n: 1 for n in (0, 1, 3, 4, 5, 6)}
    found = sweep(lab.plans(range(7), deadly=[2])[2:3], two, "kernel") # where it is the kernel that dies, the worker lives
    assert found.failed[0][1].startswith("toy failed: DeadKernelError: Kernel died")


# a full disk
@pytest.fixture
def disk(tmp_path):
    "A disk of 96 kB."
    place = tmp_path/"out"
    place.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", place], capture_output=True).returncode: pytest.skip("mounting is not permitted")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_fails_what_it_cannot_hold_and_keeps_the_rest(disk, lab, two):
    runs = lab.plans(range(5), letters=20_000)
    first = sweep(runs, two, "warm")
    assert first.ran and first.failed and sorted(p.parameters["number"] for p in first.ran) == lab.finished()
    assert all("No space left on device" in why for _, why in first.failed)
    before = {p: p.read_bytes() for p in disk.glob("*/*.ipynb") if experiments.record_of(p)}
    subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
    second = sweep(runs, two, "warm")
    assert len(second.ran) == len(first.failed) and not second.failed and lab.finished() == [0, 1, 2, 3, 4] and all(p.read_bytes() == b for p, b in before.items())
    assert sorted(p.name.split(".", 1)[1] for p in disk.glob("*/*")) == ["ipynb"] * 5 # what was half written is gone


def test_a_report_that_does_not_fit_leaves_the_old_one(disk, lab, two, capsys):
    sweep(lab.plans([0]), two, "warm")
    page = ledger.report(disk)
    before = page.read_bytes()
    with pytest.raises(OSError), open(disk/"filler", "wb", buffering=0) as file:
        while True: file.write(b"x" * 4096)
    assert main(["report", str(disk)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"whatmatters: {disk}") and err.endswith(": No space left on device\n") and err.count("\n") == 1
    assert page.read_bytes() == before and not list(disk.glob(".*"))


# the scheduler is lost
def test_a_scheduler_that_goes_away_and_the_same_command_goes_on(lab):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    environment, quiet = {**os.environ, "LAB": lab.mark}, {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = lambda name, *a: subprocess.Popen([sys.executable, "-m", f"distributed.cli.dask_{name}", "--no-dashboard", *a], env=environment, **quiet)
    scheduler = command("scheduler", "--host", "127.0.0.1", "--port", address.rsplit(":")[-1])
    worker = command("worker", address, "--nthreads", "1", "--death-timeout", "5", "--local-directory", str(lab.place))
    try:
        process = lab.start(*lab.arguments(range(4), "--warm", "--scheduler", address, sleep=1.))
        until(lambda: sum(lab.ends().values()) == 1 and lab.running(), 90)
        scheduler.kill()
        code, out, err = ended(process)
        assert code == 1 and err == "whatmatters: the scheduler went away: 1 of 4 runs are finished; the same command goes on with the others\n"
        worker.wait(60)
        until(lambda: not lab.alive())
    finally:
        for p in (scheduler, worker): p.kill(), p.wait()
    kept = lab.finished() # one, or two where the worker could end what it was at
    assert 1 <= len(kept) <= 2
    code, out, err = ended(lab.start(*lab.arguments(range(4), "--warm", "--workers", "1", sleep=1.)), 90)
    assert code == 0 and f"{4 - len(kept)} executed, {len(kept)} finished before, 0 failed" in out and err == "" and lab.finished() == [0, 1, 2, 3]
    assert all(n == 1 for number, n in lab.ends().items())


def test_workers_that_do_not_start_again_end_the_sweep(lab, monkeypatch):
    monkeypatch.setattr("whatmatters.core.sweeps.PATIENCE", 5)
    with cluster(workers=1) as client:
        def stop():
            until(lab.running)
            client.cluster.sync(client.cluster.workers[0].close, timeout=1)
        thread = threading.Thread(target=stop)
        thread.start()
        with pytest.raises(experiments.RunFailed, match="^no worker starts any more: 0 of 1 runs are finished; the same command goes on with the others$"): sweep(lab.plans([0], sleep=20.), client, "warm")
        thread.join()
    assert not lab.finished()


# two at once
def test_two_sweeps_on_one_folder_execute_each_run_once(lab):
    processes = [lab.start(*lab.arguments(range(6), "--warm", "--workers", "1", sleep=.7)) for _ in range(2)]
    for process in processes:
        code, out, err = ended(process, 120)
        assert code == 0 and err == "" and "0 failed" in out and " 6/6 " in out
    assert lab.starts() == lab.ends() == {n: 1 for n in range(6)} and lab.finished() == list(range(6))


# the sweep itself is told to end, or dies
def test_interrupted_ended_and_killed_sweeps_leave_no_process_and_go_on(lab):
    arguments = lambda *options: lab.arguments(range(8), "--workers", "2", *options, sleep=1.)
    done = []
    for options, send in ((["--warm"], lambda p: os.killpg(p.pid, signal.SIGINT)), (["--warm"], lambda p: p.terminate()), ([], lambda p: p.kill())): # the last with kernels
        process = lab.start(*arguments(*options))
        until(lambda: (not options or len(lab.finished()) > len(done)) and lab.running(), 120)
        send(process)
        code, out, err = ended(process)
        until(lambda: not lab.alive(), 20)
        before, done = done, lab.finished()
        assert set(before) <= set(done)
        if code == -signal.SIGKILL: continue
        said, rest = err.removeprefix("whatmatters: interrupted: ").split(" ", 1)
        assert code == 130 and rest == "of 8 runs are finished; the same command goes on with the others\n" and len(before) <= int(said) <= len(done) # some more may end while it ends
        assert not list((lab.place/"scratch").iterdir())
    before = {p: p.stat().st_mtime_ns for p in lab.out.glob("*/*.ipynb") if not p.name.endswith(".partial.ipynb")}
    assert len(before) == len(done) < 8
    code, out, err = ended(lab.start(*arguments("--warm")), 120)
    assert code == 0 and f"{8 - len(done)} executed, {len(done)} finished before, 0 failed" in out and err == "" and lab.finished() == list(range(8))
    assert all(p.stat().st_mtime_ns == t for p, t in before.items()) and not list(lab.out.glob("*/*.partial.ipynb"))


def test_an_interrupt_while_the_cluster_starts_is_one_line(lab):
    process = lab.start(*lab.arguments(range(2), "--workers", "2"))
    until(lambda: len(lab.alive()) >= 3) # the first worker is there, and imports
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = ended(process)
    assert code == 130 and err.startswith("whatmatters: interrupted") and err.count("\n") == 1 and not lab.starts()
    until(lambda: not lab.alive(), 20)
    assert not list((lab.place/"scratch").iterdir())


# what fails
def test_a_failed_run_is_reported_and_repeated_and_stops_no_other(lab, two, capsys):
    arguments = lab.arguments(range(4), "--warm", "--scheduler", two.scheduler.address, bad="[1]")
    for executed, before in ((3, 0), (0, 3)):
        assert main(arguments) == 1
        out, err = capsys.readouterr()
        last = out.splitlines()
        assert f"{executed} executed, {before} finished before, 1 failed" in out and last[-2].startswith("  number 1: toy failed: number: got 1; want another; what it did so far is in ") and last[-1].startswith("report: ") and not err
    assert lab.starts() == {0: 1, 1: 2, 2: 1, 3: 1}
    assert main([*arguments, "--force"]) == 1 and "3 executed, 0 finished before, 1 failed" in capsys.readouterr().out
    assert lab.starts() == {0: 2, 1: 3, 2: 2, 3: 2} and lab.finished() == [0, 2, 3]


def test_a_run_that_exits_fails_and_its_worker_lives(lab, two):
    path, workers = lab.place/"toy.ipynb", set(two.scheduler_info()["workers"])
    notebook = nbformat.read(path, 4)
    notebook.cells[-1].source += "\nimport sys; sys.exit(number)"
    nbformat.write(notebook, path)
    for engine in ("warm", "kernel"):
        found = sweep(lab.plans(range(2)), two, engine)
        assert sorted(why.split("; ")[0] for _, why in found.failed) == ["toy failed: SystemExit: 1", "toy failed: it ended before its last cell"]
        assert set(two.scheduler_info()["workers"]) == workers and len(list(lab.out.glob("*/*.failed.ipynb"))) == len(list(lab.out.glob("*/*"))) == 2


def test_a_notebook_that_is_changed_between_two_sweeps_on_one_cluster(lab, two):
    sweep(lab.plans(range(4), sleep=.3), two, "warm") # both workers
    notebook = nbformat.read(lab.place/"toy.ipynb", 4)
    notebook.cells[-1].source += "\nnumber"
    nbformat.write(notebook, lab.place/"toy.ipynb")
    found = sweep(lab.plans(range(4), sleep=.3), two, "warm")
    assert len(found.ran) == 4 and not found.failed


def test_a_run_may_start_processes(two):
    assert two.submit(spawned).result() == 0


def spawned():
    import multiprocessing
    child = multiprocessing.get_context("spawn").Process(target=abs, args=(1,))
    child.start()
    child.join()
    return child.exitcode


# bad input
BAD = {"a parameter that is none": (["-p", "nmber", "1"], "nmber: did you mean number"), "an empty list": ("number: []", "grid: number: got []"), "a word for a number": ("number: [few]", "number: got 'few' (str); want int"),
       "another parameter": ("nummer: [1]", "nummer: did you mean number"), "no mapping": ("- 1", "grid: got [1]"), "no file": (None, "grid.yaml (No such file or directory)"), "given twice": (["-p", "number", "1"], "number, which is given too"),
       "no workers": (["--workers", "0"], "workers: got 0; want a whole number >= 1"), "too many gpus": (["--gpus", "99"], "gpus: got 99; want"), "fewer gpus than none": (["--gpus", "-1"], "gpus: got -1; want"),
       "no scheduler there": (["--scheduler", "tcp://127.0.0.1:1"], "tcp://127.0.0.1:1, which does not answer"), "no address": (["--scheduler", "over there"], "over there, which does not answer"), "no port": (["--scheduler", "tcp://localhost:abc"], "tcp://localhost:abc, which does not answer"),
       "twice": ("number: [1]\nnumber: [2]", "grid: got number twice"),
       "an unknown preset": (["--preset", "smokey"], "preset: got 'smokey'")}

@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_before_anything_starts(what, lab, capsys, monkeypatch):
    if what == "no scheduler there": monkeypatch.setattr(cluster.__wrapped__, "__defaults__", (None, 0, None, 1.)) # it waits for less long
    bad, message = BAD[what]
    arguments = lab.arguments([0], *(bad if isinstance(bad, list) else ()))
    if bad is None: (lab.place/"grid.yaml").unlink()
    if isinstance(bad, str): (lab.place/"grid.yaml").write_text(bad)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("whatmatters: ") and err.count("\n") == 1 and not out and not lab.out.exists()


def test_workers_and_gpus_exclude_each_other(lab, capsys):
    with pytest.raises(SystemExit, match="2"): main(lab.arguments([0], "--workers", "1", "--gpus", "1"))
    assert "not allowed with" in capsys.readouterr().err


def test_an_output_folder_that_is_a_file(lab, two, capsys):
    lab.out.write_text("")
    assert main(lab.arguments([0], "--scheduler", two.scheduler.address)) == 2
    assert capsys.readouterr().err == f"whatmatters: out: got {lab.out} (File exists); want a folder that can be written\n"


def test_workers_that_cannot_do_the_work_are_named_before_anything_starts(lab, capsys):
    "One that does not see the folder, and one whose package is another."
    other = lab.place/"other"
    other.mkdir()
    shutil.copytree(experiments.PACKAGE, other/"whatmatters", symlinks=True, ignore=shutil.ignore_patterns("experiments", "__pycache__"))
    (other/"whatmatters"/"more.py").write_text("")
    with cluster(workers=1) as client:
        command = [sys.executable, "-m", "distributed.cli.dask_worker", client.scheduler.address, "--nthreads", "1", "--no-dashboard", "--death-timeout", "5", "--local-directory"]
        for before, environment, message in ((["unshare", "--mount", "sh", "-c", f'mount -t tmpfs tmpfs {lab.place} && exec "$@"', "sh"], {}, f"out: got {lab.out}, which the worker"),
                                             ([], {"PYTHONPATH": str(other)}, "which has another version of whatmatters; want the same on all")):
            if before and subprocess.run([*before, "true"], capture_output=True).returncode: continue # not permitted here
            worker = subprocess.Popen([*before, *command, str(lab.place)], env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                client.wait_for_workers(2, timeout=60)
                assert main(lab.arguments([0], "--scheduler", client.scheduler.address)) == 2
                out, err = capsys.readouterr()
                assert message in err and err.count("\n") == 1 and not list(lab.out.glob("*")) and not lab.starts()
            finally:
                worker.terminate()
                worker.wait()
            until(lambda: len(client.scheduler_info()["workers"]) == 1)


# how many at a time, and where
def test_one_worker_for_each_gpu(monkeypatch):
    import torch
    from whatmatters.core.sweeps import _devices
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert _devices(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,9")
    with cluster(gpus=2) as client: seen = client.run(lambda: (os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()))
    assert sorted(device for device, _ in seen.values()) == ["4", "7"] and len({pid for _, pid in seen.values()} | {os.getpid()}) == 3


def test_dask_knows_few_runs_at_a_time_and_forgets_them(lab, two):
    runs, most = [p._replace(code="another") for p in lab.plans(range(300))], []
    found = sweep(runs, two, "warm", tell=lambda *_: most.append(len(two.futures)))
    assert len(found.failed) == len(most) == 300 and 1 < max(most) <= 64
    assert all("another version of the package" in why for _, why in found.failed) and not lab.starts()
    until(lambda: not two.futures and not two.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))


@pytest.mark.parametrize("preset", [None, "smoke", "paper"])
def test_all_experiments_can_be_planned(preset, tmp_path):
    runs = plans("all", preset=preset, out=tmp_path)
    assert [p.notebook.stem for p in runs] == experiments.names() and len({p.final for p in runs}) == len(runs) and not list(tmp_path.iterdir())


# past one machine
CLUSTERS = Path(__file__).parent.parent/"nbs"/"clusters"

@pytest.mark.parametrize("name, has", [("slurm", ["#SBATCH --gres=gpu:1", "#SBATCH --cpus-per-task=8", "#SBATCH --mem=60G"]), ("pbs", ["#PBS -l select=1:ncpus=8:mem=32gb", "#PBS -j oe"])])
def test_a_job_of_a_batch_system_is_one_worker_with_one_run_that_ends_with_its_scheduler(name, has):
    pytest.importorskip("dask_jobqueue")
    with runpy.run_path(str(CLUSTERS/f"{name}.py"))["workers"]() as machine: script = machine.job_script()
    assert all(line in script for line in [*has, "export OMP_NUM_THREADS=8"])
    assert all(option in script for option in ("-m distributed.cli.dask_worker tcp://", "--nthreads 1", "--nanny", "--death-timeout 60")) and "--nworkers" not in script


def test_the_cluster_on_kubernetes_is_what_the_operator_takes():
    volume, machine, job = yaml.safe_load_all((CLUSTERS/"kubernetes.yaml").read_text())
    assert (machine["apiVersion"], machine["kind"]) == ("kubernetes.dask.org/v1", "DaskCluster") and set(machine["spec"]) == {"worker", "scheduler"}
    assert set(machine["spec"]["worker"]) == {"replicas", "spec"} and set(machine["spec"]["scheduler"]) == {"spec", "service"}
    worker, = machine["spec"]["worker"]["spec"]["containers"]
    scheduler, = machine["spec"]["scheduler"]["spec"]["containers"]
    (sweeping,), service = job["spec"]["template"]["spec"]["containers"], machine["spec"]["scheduler"]["service"]
    assert worker["args"] == ["dask-worker", "--name", "$(DASK_WORKER_NAME)", "--nthreads", "1", "--death-timeout", "60", "--no-dashboard"] and scheduler["args"] == ["dask-scheduler"]
    assert worker["image"] == scheduler["image"] == sweeping["image"] and service["selector"] == {"dask.org/cluster-name": machine["metadata"]["name"], "dask.org/component": "scheduler"}
    assert {p["targetPort"] for p in service["ports"]} == {p["name"] for p in scheduler["ports"]}
    for pod, container in ((machine["spec"]["worker"]["spec"], worker), (job["spec"]["template"]["spec"], sweeping)): # one volume, at one place
        assert container["volumeMounts"] == [{"name": "sweeps", "mountPath": "/sweeps"}] and pod["volumes"] == [{"name": "sweeps", "persistentVolumeClaim": {"claimName": volume["metadata"]["name"]}}]
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
    options = _parser().parse_args(sweeping["args"][1:])
    assert options.out.startswith("/sweeps/") and options.scheduler == f"tcp://{machine['metadata']['name']}-scheduler:{service['ports'][0]['port']}"


def test_the_example_grid_can_be_planned(tmp_path):
    assert len(plans("roar", CLUSTERS/"grid.yaml", "smoke", out=tmp_path)) == 6
