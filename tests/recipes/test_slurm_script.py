"""sbatch scripts: as they are (scripts/*.sh), as bash reads them, and what arrives of the environment.

A script that is to change is deleted and made anew by this test, to be read before it is committed.
"""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from recipes import sending, slurm_script
from recipes.executors import Slurm, slurm
from recipes.slurm_script import SlurmJob

SCRIPTS = Path(__file__).parent / "scripts"
# What shellcheck says about lines of nemo-run's own template, by the beginning of the line.
TEMPLATE = ("nodes=(", "nodes_array=", "head_node")
# A value may hold quotes that look wrong, and a $ in single quotes.
OF_VALUES = "SC1078,SC1079,SC2016"


def job(executor: Slurm, devices: int = 8, **changes: object) -> SlurmJob:
    made = SlurmJob(
        name="tiny",
        stamp="20260101-120000",
        executor=executor,
        devices=devices,
        run=PurePosixPath("/home/me/runs/tiny"),
        start=PurePosixPath("/home/me"),
        local_python="/opt/venv/bin/python",
    )
    return replace(made, **changes)  # pyright: ignore[reportArgumentType]


IN_CONTAINER = slurm(
    "research",
    nodes=2,
    container="registry.example#team/pytorch:25.11-py3",
    mounts=["/home/me", "/data/my corpus:/data"],
    srun=["--no-container-remap-root", "--comment=a b"],
)
JOBS = {
    "single_node": job(slurm("research", partition="main", time="04:00:00", sbatch={"mail-type": "END,FAIL"})),
    "two_nodes": job(
        slurm("research", nodes=2, cpus=4, qos="high", setup=["module load cuda/13.0"]),
        env=({"GREETING": 'it\'s "$HOME" `pwd`\n/nemo_run/x', "NCCL_DEBUG": "WARN"},),
    ),
    "container": job(IN_CONTAINER),
    "array": job(
        slurm("research", gpu_request="gres", parallel_jobs=4),
        devices=1,
        env=({"RUN": "a"}, {"RUN": "b"}, {"RUN": "c"}),
    ),
    "chain": job(slurm("research", nodes=2, gpu_request="none", requeues=3), devices=2, repeats=2),
    "profiled": job(slurm(), prefix=("nsys", "profile", "--output=runs/tiny/nsys/%h-%p"), folders=("nsys",)),
}


@pytest.mark.parametrize("name", JOBS)
def test_scripts_are_as_they_were_read_and_found_right(name: str) -> None:
    script = sending.script(JOBS[name], JOBS[name].tasks[-1])
    kept = SCRIPTS / f"{name}.sh"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(script)
    assert script == kept.read_text()


@pytest.mark.parametrize("name", JOBS)
def test_bash_and_shellcheck_find_nothing_wrong_in_a_script(name: str) -> None:
    path = SCRIPTS / f"{name}.sh"
    subprocess.run(["bash", "-n", path], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-f", "gcc", "-e", OF_VALUES, path], capture_output=True, text=True)
    lines = path.read_text().splitlines()
    found = [line for line in done.stdout.splitlines() if not lines[int(line.split(":")[1]) - 1].startswith(TEMPLATE)]
    assert found == []


def sourced(setup: str, then: str, tmp_path: Path) -> bytes:
    """What bash prints that runs a job's own lines, with Slurm's variables set, and then `then`."""
    (tmp_path / "setup.sh").write_text(f"{setup}\ntrap - EXIT\n{then}\n")
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "PATH": "/usr/bin:/bin"}
    return subprocess.run(["bash", tmp_path / "setup.sh"], env=environment, capture_output=True, check=True).stdout


@examples(deadline=None, max_examples=60)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
@example("a'b\"c $HOME `id` $(id) \\ \n\t /nemo_run/nemo_run {{ x }} ${head_node_ip_var} $$ !!")
def test_values_of_the_environment_arrive_unchanged(value: str) -> None:
    script = sending.script(job(slurm(), env=({"lower_Case": value, "AFTER": "yes"},)), "tiny")
    exports = script[script.index("export lower_Case=") : script.index("export HYBRID_JOB=")]
    done = subprocess.run(
        ["bash", "-c", f'{exports}\nprintf "%s|%s" "$lower_Case" "$AFTER"'], capture_output=True, check=True, env={}
    )
    assert done.stdout.decode() == f"{value}|yes"


def test_runs_of_a_sweep_have_their_own_variables() -> None:
    env = ({"SAME": "x", "OWN": "1 a"}, {"SAME": "x", "OWN": "2 b"})
    script = slurm_script.setup(job(slurm(), devices=1, env=env), "tiny")
    exports = [line for line in script.splitlines() if "SAME" in line or "OWN" in line]
    for number, expected in ((1, "x|1 a"), (2, "x|2 b")):
        text = "\n".join([f"SLURM_ARRAY_TASK_ID={number}", *exports, 'echo "$SAME|$OWN"'])
        assert subprocess.run(["bash", "-c", text], capture_output=True, text=True).stdout.strip() == expected


def test_two_jobs_on_a_node_meet_at_different_ports_and_none_that_is_taken(tmp_path: Path) -> None:
    import socket

    two = job(slurm(nodes=2), run=PurePosixPath(tmp_path))
    setup = slurm_script.setup(two, "tiny")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 10007))  # of job 7
        taken.listen()
        assert sourced(setup, "echo MASTER_PORT=$MASTER_PORT", tmp_path).endswith(b"MASTER_PORT=10008\n")
    other = setup.replace("unset ", "SLURM_JOB_ID=8; unset ", 1)
    assert sourced(other, "echo MASTER_PORT=$MASTER_PORT", tmp_path).endswith(b"MASTER_PORT=10008\n")


@pytest.mark.parametrize(
    ("codes", "of_srun", "expected"),
    [
        (["0", "0"], 0, 0),
        (["2", "143"], 143, 2),  # srun ended the other node when one had failed
        (["143", "143"], 143, 143),
        (["138", "0"], 138, 138),
        (["143"], 143, 1),  # a node that said nothing was killed
        ([], 137, 137),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_failed(
    codes: list[str], of_srun: int, expected: int, tmp_path: Path
) -> None:
    two = job(slurm(nodes=2), run=PurePosixPath(tmp_path))
    ranks = Path(two.folder("tiny")) / "ranks-7"
    ranks.mkdir(parents=True)
    Path(two.logs).mkdir()
    for number, code in enumerate(codes):
        (ranks / f"node{number}.said").write_text(code + "\n")
    # What the nodes say comes after the job's lines have cleared what an earlier start has left.
    then = f'for f in "$job"/ranks-7/*.said; do [ -e "$f" ] && mv "$f" "${{f%.said}}.code"; done; exit {of_srun}'
    (tmp_path / "job.sh").write_text(f"{slurm_script.setup(two, 'tiny')}\n{then}\n")
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", tmp_path / "job.sh"], env=environment, capture_output=True)
    assert done.returncode == expected
    assert (Path(two.logs) / "exit_7").read_text().split()[0] == str(expected)


def test_a_folder_outside_is_found_by_its_name_in_the_container() -> None:
    inside = slurm_script.inside
    assert inside(PurePosixPath("/home/me/x"), IN_CONTAINER) == PurePosixPath("/home/me/x")
    assert inside(PurePosixPath("/data/my corpus/a"), IN_CONTAINER) == PurePosixPath("/data/a")
    assert inside(PurePosixPath("/scratch"), IN_CONTAINER) is None
    assert inside(PurePosixPath("/scratch"), slurm()) == PurePosixPath("/scratch")


class TestDefectsOfNemoRun:
    """Each fails when the script is made the way nemo-run makes it (see facts in `sending` and `slurm_script`)."""

    def test_the_account_is_not_in_the_name(self) -> None:
        assert "#SBATCH --job-name=tiny\n" in sending.script(JOBS["single_node"], "tiny")

    def test_arguments_of_srun_are_quoted(self) -> None:
        (line,) = [line for line in sending.script(JOBS["container"], "tiny").splitlines() if line.startswith("srun ")]
        assert "'--comment=a b'" in line
        assert "'/data/my corpus:/data'" in line

    def test_the_interpreter_is_named_by_its_path(self) -> None:
        (line,) = [line for line in sending.script(JOBS["two_nodes"], "tiny").splitlines() if line.startswith("srun ")]
        assert " /opt/venv/bin/python -u -m recipes.torchrun " in line

    def test_variables_keep_their_names(self) -> None:
        script = sending.script(job(slurm(), env=({"no_proxy": "localhost"},)), "tiny")
        assert "export no_proxy=localhost\n" in script

    def test_variables_are_not_shown_in_the_log(self) -> None:
        script = sending.script(job(slurm(), env=({"TOKEN": "secret"},)), "tiny")
        assert script.index("set +vx") < script.index("export TOKEN=")

    def test_no_account_is_needed(self) -> None:
        assert "--account" not in sending.script(job(slurm()), "tiny")

    def test_a_path_that_holds_nemo_runs_own_name_stays(self) -> None:
        script = sending.script(job(slurm(python="/opt/nemo_run/bin/python")), "tiny")
        (line,) = [line for line in script.splitlines() if line.startswith("srun ")]
        words = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout
        assert "/opt/nemo_run/bin/python" in words.splitlines()
