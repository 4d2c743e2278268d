"""A Slurm cluster of several nodes on this one machine, for tests of `--executor slurm`.

It needs Slurm and MUNGE (`apt install slurm-wlm munge`) and root; its configuration, keys, logs and
state are in a folder of its own. Memory that a job asked for is enforced, and each node claims to
have one GPU. As a script it prints what the
environment needs and keeps the cluster until it is interrupted:

    python tests/robustness/slurm.py /tmp/cluster
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
NODES = ("n1", "n2")
INSTALLED = Path("/etc/slurm/slurm.conf")
"""A link to the configuration while the cluster runs: Snakemake's jobs lose SLURM_CONF."""
SYSTEM = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))
CONFIGURATION = """
ClusterName=cdelta
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=60
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
ReturnToService=1
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SlurmctldTimeout=300
SlurmdTimeout=300
KillWait=2
MinJobAge=86400
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
GresTypes=gpu
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
SACCT = """#!/bin/sh
# Nothing is accounted here, and sacct would wait forever. Snakemake's plugin asks it, though told
# to ask squeue, whenever `scontrol show config` takes more than ten seconds; and after a round
# without an answer it forgets its jobs and waits for nothing. The last word is the jobs' name.
while [ $# -gt 1 ]; do shift; done
exec squeue --states=all --noheader --format='%i|%T' --name "$1"
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 "
NODE += "RealMemory=20000 Gres=gpu:1"


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    if lacking := [name for name in PROGRAMS if not shutil.which(name, path=SYSTEM)]:
        return f"Slurm is not installed ({', '.join(lacking)}): apt install slurm-wlm munge"
    if INSTALLED.exists():
        return f"this machine belongs to a cluster ({INSTALLED})"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


@dataclass
class Cluster:
    """A running cluster: the environment in which its commands work."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        options = {"env": self.environment, "text": True, "check": True, "capture_output": True}
        return subprocess.run(command, **options).stdout

    def jobs(self, state: str = "R") -> list[dict[str, str]]:
        """Jobs in this state: number, node, rule, memory, resources and log."""
        fields = ("JobID", "NodeList", "Comment", "MinMemory", "tres-per-job", "STDOUT")
        wanted = ",".join(f"{field}:400|" for field in fields)
        lines = self.run("squeue", "--noheader", "--states", state, "--Format", wanted)
        return [
            dict(zip(fields, (part.strip() for part in line.split("|")), strict=False))
            for line in lines.splitlines()
        ]

    def cancel(self, job: str) -> None:
        """Kill a job."""
        self.run("scancel", job)

    def set_node(self, name: str, state: str) -> None:
        """Take a node ``down``, or ``resume`` it."""
        self.run("scontrol", "update", f"nodename={name}", f"state={state}", "reason=test")


@contextmanager
def cluster(folder: Path, nodes: tuple[str, ...] = NODES) -> Iterator[Cluster]:
    """Start the daemons, wait until every node is idle, and stop all of it at the end."""
    write_configuration(folder, nodes)
    path = os.pathsep.join((str(folder / "bin"), SYSTEM))
    environment = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    here, processes = Cluster(folder, environment), []
    munge = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "seed-file")]
    munge.append(f"--key-file={folder}/munge.key")
    daemons = [["munged", "-F", "--force", *munge], ["slurmctld", "-D"]]
    try:
        for command in [*daemons, *(["slurmd", "-D", "-N", name] for name in nodes)]:
            processes.append(start(command, here))
            wait_for(lambda: (folder / "munge.socket").exists())
        wait_for(lambda: here.run("sinfo", "-N", "-h", "-o", "%T").split() == ["idle"] * len(nodes))
        yield here
    finally:
        stop(here, processes)


def write_configuration(folder: Path, nodes: tuple[str, ...]) -> None:
    """Slurm's files and MUNGE's key."""
    host = socket.gethostname()
    for name in ("bin", "state", *nodes):
        (folder / name).mkdir(parents=True)
    port, *ports = free_ports(1 + len(nodes))
    lines = [
        NODE.format(name=name, host=host, port=own) for name, own in zip(nodes, ports, strict=True)
    ]
    text = CONFIGURATION.format(host=host, port=port, folder=folder, nodes="\n".join(lines))
    (folder / "slurm.conf").write_text(text)
    INSTALLED.unlink(missing_ok=True)
    INSTALLED.symlink_to(folder / "slurm.conf")
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (folder / "bin" / "sacct").write_text(SACCT)
    (folder / "bin" / "sacct").chmod(0o755)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def start(command: list[str], here: Cluster) -> subprocess.Popen:
    """One daemon in the foreground, with its messages in a file."""
    number = len(list(here.folder.glob("*.log")))
    log = (here.folder / f"{number}-{command[0]}.log").open("w")
    where = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL, "env": here.environment}
    ends_with_us = ["setpriv", "--pdeathsig", "TERM"]
    return subprocess.Popen([*ends_with_us, *command], **where)


def stop(here: Cluster, processes: list[subprocess.Popen]) -> None:
    """Cancel every job, then end the daemons, the last one first."""
    with contextlib.suppress(subprocess.CalledProcessError, AssertionError):
        here.run("scancel", "--partition=all")
        wait_for(lambda: not here.run("squeue", "-h"), 30)
    for process in reversed(processes):
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
    INSTALLED.unlink(missing_ok=True)


def wait_for(condition, seconds: float = 60) -> None:
    """Poll until `condition()`; a command of Slurm's that fails counts as not yet."""
    deadline = time.time() + seconds
    while True:
        with contextlib.suppress(subprocess.CalledProcessError):
            if condition():
                return
        assert time.time() < deadline, "waited too long"
        time.sleep(0.2)


def main() -> int:
    """Keep a cluster until Ctrl-C."""
    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    with cluster(Path(sys.argv[1]).absolute()) as here:
        print(f"export SLURM_CONF={here.folder}/slurm.conf", flush=True)
        signal.sigwait([signal.SIGINT, signal.SIGTERM])
    return 0


if __name__ == "__main__":
    sys.exit(main())
