"""What starts a run on a cluster: scripts that parse, with commands, recipes and keys that exist."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from vlm.commands import parser
from vlm.recipe import load_recipe

FOLDER = Path(__file__).parents[1] / "tools/launch"
RECIPE = next((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sh"])
def test_a_script_parses_and_its_command_and_keys_exist(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert subprocess.run(["bash", "-n", FOLDER / name]).returncode == 0
    assert (FOLDER / name).stat().st_mode & 0o111
    assert parser().parse_args(["run", str(RECIPE)]).command == re.search(r"-m vlm (\w+)", text)[1]  # type: ignore[index]
    keys = dict(re.findall(r"(run\.\w+)=\"?\$\{?(\w+)", text))
    assert keys.keys() == {"run.devices", "run.nodes", "run.parallel"}
    default = re.search(r"PARALLEL:-(\w+)", text)[1]  # type: ignore[index]
    recipe = load_recipe(RECIPE, ["run.devices=2", "run.nodes=2", f"run.parallel={default}"])
    assert recipe.run.world == 4


def test_the_slurm_script_asks_for_a_task_per_gpu_and_for_a_signal() -> None:
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", (FOLDER / "slurm.sh").read_text(), re.M))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert asked["signal"].startswith("B:TERM@") and "requeue" in asked


def test_the_kubernetes_job_starts_a_recipe_that_exists() -> None:
    job = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    command, args = container["command"], container["args"]
    assert command[command.index("--nproc-per-node") + 1] == str(gpus) and f"run.devices={gpus}" in args
    arguments = parser().parse_args([*command[command.index("vlm") + 1 :], *args])
    assert load_recipe(Path(__file__).parents[1] / arguments.recipe, args[1:]).run.world == gpus
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
