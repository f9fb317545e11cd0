"""What a SLURM step says of a task: torchrun's words, and when they do not count."""

import pytest

from parallel.slurm import environment, tasks_per_node

STEP = {
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "1", "SLURM_STEP_NODELIST": "n[3-5]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.9.9.9",
}  # fmt: skip


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A scontrol that says what the test wants of the step's first node."""

    def says(node: str) -> None:
        file = tmp_path / "scontrol"
        answers = f'[ "$2" = hostnames ] && printf "n3\\nn4\\nn5\\n" || echo "{node}"'
        file.write_text(
            f'#!/bin/sh\n[ "$*" = "show hostnames n[3-5]" ] || [ "$*" = "show node n3" ] || exit 1\n{answers}\n'
        )
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return says


def test_a_task_is_a_rank_and_the_first_nodes_address_is_where_ranks_meet(scontrol) -> None:
    scontrol("NodeName=n3 NodeAddr=10.0.0.3 NodeHostName=n3")
    found = environment(STEP)
    port = found.pop("MASTER_PORT")
    assert found == {
        "RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.3",
    }  # fmt: skip
    assert port == environment(STEP)["MASTER_PORT"] != environment(STEP | {"SLURM_STEP_ID": "2"})["MASTER_PORT"]


def test_an_address_that_is_set_stays_and_asks_nobody(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = environment(STEP | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("head", "1234")


@pytest.mark.parametrize(
    "env",
    [{}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, STEP | {"SLURM_STEP_NUM_TASKS": "1"},
     STEP | {"RANK": "0", "WORLD_SIZE": "8"}],
)  # fmt: skip
def test_slurm_does_not_count_in_a_batch_shell_nor_under_torchrun(env) -> None:
    assert environment(env) == {}


def test_what_is_missing_is_named(scontrol, monkeypatch) -> None:
    scontrol("Node n3 not found")
    with pytest.raises(ValueError, match=r"scontrol names no address \(NodeAddr\) of the first node of n\[3-5\]"):
        environment(STEP)
    with pytest.raises(ValueError, match="show hostnames n9: ; set MASTER_ADDR"):
        environment(STEP | {"SLURM_STEP_NODELIST": "n9"})
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="scontrol is not found.*or set MASTER_ADDR"):
        environment(STEP)
    with pytest.raises(ValueError, match="SLURM_LOCALID is not set in a SLURM step of 5 tasks"):
        environment({name: value for name, value in STEP.items() if name != "SLURM_LOCALID"})


def test_tasks_of_each_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("8") == [8]
