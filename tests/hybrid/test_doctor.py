"""What `hybrid doctor` finds on the machine that runs the tests."""

import json
import subprocess
import sys
from importlib import metadata

from hybrid import doctor, installing
from hybrid.doctor import Diagnosis, Finding
from hybrid.model import kernels


def test_it_finds_the_machine_the_packages_and_the_kernels() -> None:
    found = doctor.examine()
    assert found.healthy
    packages = {finding.name: finding for finding in found.sections["packages"]}
    assert packages["torch"].says == metadata.version("torch")
    assert packages["torch"].state == "ok" and "pytest" not in packages
    kinds = {finding.name: finding for finding in found.sections["kernels"]}
    assert {package.name for package in kernels.PACKAGES} <= set(kinds)
    assert kernels.choose("auto", kernels.machine()).reasons[0] in kinds["layers"].says
    assert {finding.name for finding in found.sections["clusters and containers"]} == {"sbatch", "docker"}
    assert json.loads(json.dumps(found.as_dict()))["healthy"] is True


def test_what_is_absent_is_marked_and_has_its_way_out() -> None:
    text = Diagnosis(
        {
            "packages": [Finding("torch", "missing", "is not installed", "pip install torch")],
            "kernels": [Finding("mamba-ssm", "optional", "is not installed: scans")],
        }
    ).text()
    assert text.splitlines() == [
        "packages",
        "! torch      is not installed",
        "             -> pip install torch",
        "",
        "kernels",
        "- mamba-ssm  is not installed: scans",
        "",
        "something that every run needs is missing (!); '-' is what this machine does without",
    ]


def test_a_package_of_another_version_is_said_with_the_line_that_mends_it() -> None:
    line = doctor.Requirement("numpy>=99")
    finding = doctor._requirement(line, "")
    assert finding.state == "missing"
    assert finding.says == f"is {metadata.version('numpy')}, not >=99"
    assert finding.way_out == installing.command("'numpy>=99'")
    assert doctor._requirement(doctor.Requirement("no-such-thing"), "data").state == "optional"


def test_the_command_prints_text_or_json() -> None:
    command = [sys.executable, "-m", "cli", "doctor"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["machine"] and not done.stderr
