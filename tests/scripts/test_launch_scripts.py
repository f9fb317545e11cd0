"""The SLURM scripts: clean by shellcheck, and on a real SLURM of two nodes; and what nodes that cannot meet say."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "scripts" / "launch"
SLURM = ("slurmctld", "slurmd", "sbatch", "scontrol")
CONF = """
ClusterName=helix
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
NodeName=hx1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=hx2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=hx1,hx2 Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def running(lines: list[list[str]], env: dict[str, str], folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes with their output in files, ended in the end."""
    with contextlib.ExitStack() as stack:
        started = []
        for number, line in enumerate(lines):
            output = stack.enter_context((folder / f"{number}.log").open("wb"))
            started.append(subprocess.Popen(line, env=env, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT))
        try:
            yield started
        finally:
            for each in started:
                each.terminate()
            for each in started:
                each.wait(30)


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.3)


def diagnosis(text: str) -> dict[str, Any]:
    """What the doctor's JSON line says; torchrun's own words may follow it."""
    return json.loads(next(line for line in text.splitlines() if line.startswith('{"ranks"')))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a SLURM of two nodes on this host."""
    if missing := [name for name in SLURM if shutil.which(name) is None]:
        pytest.skip(f"{missing[0]} is not installed (Debian: slurm-wlm)")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons need root")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, ports=free_ports(3)))
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    env |= {"SLURM_CONF": str(conf), "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}

    def idle() -> bool:
        said = subprocess.run(["sinfo", "-h", "-o", "%T %D"], env=env, capture_output=True, text=True, check=False)
        return said.stdout.split() == ["idle", "2"]

    lines = [["slurmctld", "-D"], ["slurmd", "-D", "-N", "hx1"], ["slurmd", "-D", "-N", "hx2"]]
    with running(lines, env, folder):
        wait_until(idle, 60)
        yield env


@pytest.mark.parametrize("script", sorted(LAUNCH.iterdir()), ids=lambda file: file.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    checker = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([str(checker), str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("script", "flags"), [("torchrun.sbatch", []), ("srun.sbatch", ["--ntasks-per-node=2"])])
def test_two_nodes_of_a_real_slurm_meet(slurm, tmp_path, script: str, flags: list[str]) -> None:
    output = tmp_path / "out"
    line = ["sbatch", "--parsable", "--nodes=2", *flags, f"--output={output}", str(LAUNCH / script), "scripts.doctor"]
    env = slurm | {"RANKS_PER_NODE": "2"}
    job = subprocess.run(line, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout.strip()

    def ended() -> bool:
        said = subprocess.run(["scontrol", "show", "job", job], env=env, capture_output=True, text=True, check=True)
        return "JobState=COMPLETED" in said.stdout or "JobState=FAILED" in said.stdout

    wait_until(ended, 120)
    text = output.read_text()
    result = diagnosis(text)
    assert [(each["rank"], each["node"], each["local_rank"]) for each in result["ranks"]] == [
        (0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1),
    ], text  # fmt: skip
    assert [each["where"] for each in result["links"]] == ["inside a node", "between nodes"]


@pytest.mark.slow
def test_a_command_in_a_batch_shell_waits_for_nobody(slurm, tmp_path) -> None:
    script, output = tmp_path / "job", tmp_path / "out"
    script.write_text("#!/bin/bash\nexec python -m scripts.doctor\n")
    line = ["sbatch", "--wait", "--nodes=2", "--ntasks-per-node=2", f"--output={output}", str(script)]
    subprocess.run(line, env=slurm, cwd=ROOT, timeout=120, check=True)
    assert len(diagnosis(output.read_text())["ranks"]) == 1


# --- two nodes that are network namespaces ----------------------------------------------------------------------------

OWN = ["10.77.0.1", "10.77.0.2"]
ALONE = "10.1.1.1"  # the first node's own; of all addresses it sorts first, so that its rank is 0


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """Two namespaces with an interface each, of 10.77.0.1 and 10.77.0.2, between which a wire runs."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    names, ip = [f"hx{os.getpid()}a", f"hx{os.getpid()}b"], ["ip"]
    if subprocess.run([*ip, "netns", "add", names[0]], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces are not allowed here")
    try:
        subprocess.run([*ip, "netns", "add", names[1]], check=True)
        wire = ["type", "veth", "peer", "name", "wire1", "netns", names[1]]
        subprocess.run([*ip, "link", "add", "wire0", "netns", names[0], *wire], check=True)
        for number, name in enumerate(names):
            inside = [*ip, "-n", name]
            subprocess.run([*inside, "addr", "add", f"{OWN[number]}/24", "dev", f"wire{number}"], check=True)
            for device in ("lo", f"wire{number}"):
                subprocess.run([*inside, "link", "set", device, "up"], check=True)
        subprocess.run([*ip, "-n", names[0], "addr", "add", f"{ALONE}/32", "dev", "lo"], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run([*ip, "netns", "del", name], check=False)


def two_agents(nodes: list[str], folder: Path, envs: list[dict[str, str]], addresses: list[str]) -> list[str]:
    """Run the doctor under a torchrun in each namespace, a rank each; what both said."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    lines = []
    for number, (name, own, address) in enumerate(zip(nodes, envs, addresses, strict=True)):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", "doctor"]
        rendezvous += ["--rdzv-conf", f"is_host={number == 0},read_timeout=30"]
        command = [*launch, *rendezvous, "--local-addr", address, "-m", "scripts.doctor", "timeout_s=12", "repeats=1"]
        lines.append(["ip", "netns", "exec", name, "env", *(f"{k}={v}" for k, v in own.items()), *command])
    with running(lines, env, folder) as started:
        for each in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.wait(40)
    return [(folder / f"{number}.log").read_text() for number in range(2)]


@pytest.mark.slow
def test_two_namespaces_meet(nodes, tmp_path) -> None:
    interfaces = [{"GLOO_SOCKET_IFNAME": f"wire{number}"} for number in range(2)]
    said = "".join(two_agents(nodes, tmp_path, interfaces, OWN))
    result = diagnosis(said)
    assert [each["node"] for each in result["ranks"]] == [0, 1], said
    assert result["wrong"] == []


@pytest.mark.slow
def test_an_interface_that_is_not_there_is_named(nodes, tmp_path) -> None:
    interfaces = [{"GLOO_SOCKET_IFNAME": "ib7"}, {"GLOO_SOCKET_IFNAME": "wire1"}]
    said = "".join(two_agents(nodes, tmp_path, interfaces, OWN))
    lines = [line for line in said.splitlines() if "GLOO_SOCKET_IFNAME = ib7 must be one of this host's" in line]
    assert len(lines) == 1 and "wire0" in lines[0], said


@pytest.mark.slow
def test_a_head_address_that_one_node_alone_reaches_is_named(nodes, tmp_path) -> None:
    interfaces = [{"GLOO_SOCKET_IFNAME": f"wire{number}"} for number in range(2)]
    said = "".join(two_agents(nodes, tmp_path, interfaces, [ALONE, OWN[1]]))
    lines = [line for line in said.splitlines() if f"cannot reach MASTER_ADDR={ALONE}" in line]
    assert len(lines) == 1 and "--local-addr ADDRESS" in lines[0], said
