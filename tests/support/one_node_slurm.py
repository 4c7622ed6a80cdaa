"""A real Slurm of one node on the loopback address, from the distribution's packages; no GRES, no accounting."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo")


def missing_programs() -> list[str]:
    """What the distribution's slurmctld, slurmd, slurm-client and munge would bring."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


@contextmanager
def one_node_slurm(folder: Path, num_cpus: int = 2, memory_mb: int = 4000) -> Iterator[dict[str, str]]:
    """Start munged, slurmctld and slurmd; yields the environment in which ``sbatch`` finds them."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    controller, node = _free_port(), _free_port()
    host = socket.gethostname()
    munge = folder / "munge.socket"
    (folder / "slurm.conf").write_text(
        f"ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={controller}\nSlurmdPort={node}\n"
        f"AuthType=auth/munge\nAuthInfo=socket={munge}\nCredType=cred/munge\nSlurmUser=root\nSlurmdUser=root\n"
        f"StateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool\nSlurmctldPidFile={folder}/ctld.pid\n"
        f"SlurmdPidFile={folder}/d.pid\nProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nMpiDefault=none\n"
        "SelectType=select/cons_tres\nSelectTypeParameters=CR_CPU\nReturnToService=2\nSwitchType=switch/none\n"
        f"SlurmctldLogFile={folder}/ctld.log\nSlurmdLogFile={folder}/d.log\nSchedulerParameters=sched_interval=1\n"
        f"NodeName={host} NodeAddr=127.0.0.1 CPUs={num_cpus} RealMemory={memory_mb} State=UNKNOWN\n"
        "PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
    )
    (folder / "state").mkdir(exist_ok=True)
    (folder / "spool").mkdir(exist_ok=True)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    where = [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    commands = (
        ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}", *where],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D"],
    )
    with ExitStack() as stack:
        for command in commands:
            stack.enter_context(_running(command, environment, folder))
        _wait_until_idle(environment, folder)
        try:
            yield environment
        finally:  # jobs outlive the daemons
            everyone = ["scancel", "--user=root"]
            subprocess.run(everyone, env={**os.environ, **environment}, check=False, capture_output=True)


@contextmanager
def _running(command: list[str], environment: dict[str, str], folder: Path) -> Iterator[None]:
    with (folder / f"{command[0]}.out").open("w") as output:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=output)
        try:
            time.sleep(0.5)
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended: {(folder / f'{command[0]}.out').read_text()[-800:]}")
            yield
        finally:
            process.terminate()
            process.wait(20)


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    state = ""
    for _ in range(60):
        done = subprocess.run(
            ["sinfo", "-h", "-o", "%t"], env={**os.environ, **environment}, check=False, capture_output=True, text=True
        )
        state = (done.stdout + done.stderr).strip()
        if state == "idle":
            return
        time.sleep(0.5)
    raise RuntimeError(f"the node is {state!r}: {(folder / 'd.log').read_text()[-800:]}")


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
