"""Which rank a process is, as srun, mpirun and others say it; the two first environments are real ones, cut."""

import pytest

from vogue.cli import main
from vogue.run import launch
from vogue.settings import ConfigError

# srun --nodes=2 --ntasks-per-node=2 of SLURM 22.05, its last task.
SRUN = {
    **{"SLURM_JOB_ID": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"},
    **{"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
    **{"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_JOB_NODELIST": "node[1-2]"},
}
# mpirun -n 2 of Open MPI 4.1.
MPIRUN = {
    **{"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_NAMESPACE": "1266679809"},
    **{"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
ELSEWHERE = {"OMPI_COMM_WORLD_SIZE": "4"}  # of which 2 are here


@pytest.fixture
def joined(monkeypatch):
    """A function: torch.distributed's names as `join` leaves them in this environment."""

    def run(given):
        environment = dict(given)
        monkeypatch.setattr("os.environ", environment)
        launch.join()
        return {name: environment.get(name) for name in launch.NAMES}

    return run


def names(rank, ranks, local_rank, local_ranks, address, port):
    return dict(
        zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), (rank, ranks, local_rank, local_ranks))
    ) | {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def test_a_task_of_srun_is_a_rank_that_finds_the_first_node(joined):
    found = joined(SRUN)
    assert found == names("3", "4", "1", "2", "node1", found["MASTER_PORT"])
    assert 20_000 <= int(found["MASTER_PORT"]) < 30_000


def test_all_tasks_of_a_step_have_one_port_and_those_of_another_step_most_likely_another(joined):
    port = joined(SRUN)["MASTER_PORT"]
    assert joined(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})["MASTER_PORT"] == port
    assert joined(SRUN | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] != port


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[3,5]-ib", "gpu3-ib"),
        ("rack[2-3]node[10-11]", "rack2node10"),
        ("a1.b.c,a2", "a1.b.c"),
    ],
)
def test_the_first_name_of_slurms_list_of_hosts(joined, hosts, first):
    assert joined(SRUN | {"SLURM_STEP_NODELIST": hosts})["MASTER_ADDR"] == first


@pytest.mark.parametrize(("counts", "node", "here"), [("4", 0, "4"), ("3,2(x2),1", 2, "2"), ("3,2(x2),1", 3, "1")])
def test_the_number_of_ranks_of_a_node(joined, counts, node, here):
    given = {"SLURM_STEP_TASKS_PER_NODE": counts, "SLURM_NODEID": str(node), "SLURM_STEP_NUM_TASKS": "8"}
    assert joined(SRUN | given)["LOCAL_WORLD_SIZE"] == here


def test_a_task_of_mpirun_on_one_machine_meets_the_others_there(joined):
    found = joined(MPIRUN)
    assert found == names("1", "2", "1", "2", "127.0.0.1", found["MASTER_PORT"])


@pytest.mark.parametrize("given", [MPIRUN | ELSEWHERE, HYDRA], ids=["Open MPI", "MPICH"])
def test_mpirun_on_several_machines_must_be_told_where_the_first_rank_is(joined, given):
    with pytest.raises(ConfigError, match=r"on several machines, .*: mpirun -x MASTER_ADDR=HOST"):
        joined(given)
    assert joined(given | {"MASTER_ADDR": "here"})["MASTER_ADDR"] == "here"
    # srun has started mpirun's own processes: its tasks aren't the run's.
    assert joined(SRUN | given) | {"MASTER_PORT": ""} == joined(given | {"MASTER_ADDR": "node1"}) | {"MASTER_PORT": ""}


def test_what_is_said_of_address_and_port_stands(joined):
    found = joined(SRUN | {"MASTER_ADDR": "ib0", "MASTER_PORT": "4000"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("ib0", "4000")


@pytest.mark.parametrize(("gpus", "local_rank"), [("3", "0"), ("0,1", "1"), ("", "1")])
def test_a_task_that_sees_one_gpu_alone_has_that_one(joined, gpus, local_rank):
    assert joined(SRUN | {"CUDA_VISIBLE_DEVICES": gpus})["LOCAL_RANK"] == local_rank


def test_what_torchrun_or_deepspeed_say_stands_also_under_srun(joined):
    given = names("7", "8", "3", "4", "head", "29500")
    assert joined(SRUN | given) == given


def test_a_single_task_is_the_only_rank(joined):
    alone = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    for given in ({}, SRUN | alone, {"SLURM_JOB_ID": "2", "SLURM_NTASKS": "1"}):
        assert set(joined(given).values()) == {None}


def test_half_of_what_a_launcher_says_is_refused(settings, monkeypatch, capsys):
    monkeypatch.setattr("os.environ", {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"})
    assert main(["train", *settings]) == 2
    assert "RANK=0 is set, but not LOCAL_RANK, MASTER_PORT: a launcher sets all of them" in capsys.readouterr().err


def test_a_process_beside_slurms_tasks_is_refused(settings, monkeypatch, capsys):
    monkeypatch.setattr("os.environ", {"SLURM_JOB_ID": "2", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"})
    assert main(["train", *settings]) == 2
    told = "SLURM has given this job 8 tasks, and this process is none of them: `srun vogue train …` starts a rank in"
    assert told in capsys.readouterr().err


def test_a_run_is_known_again_by_the_torchrun_that_began_it_and_by_no_other(monkeypatch, tmp_path):
    launch.leave_name(tmp_path)
    assert not list(tmp_path.iterdir())  # no torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # as it is where nobody chose one: its process says more
    assert not launch.has_begun(tmp_path)
    launch.leave_name(tmp_path)
    assert launch.has_begun(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.getppid", lambda: 1)
        assert not launch.has_begun(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert not launch.has_begun(tmp_path)
    launch.leave_name(tmp_path)
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert launch.has_begun(tmp_path)
