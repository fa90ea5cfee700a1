"""The image and the manifests: their schema, the flags that Triton knows, and what must not be lost from them."""

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "k8s"
DEPLOYED = "1.33"


def documents() -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with the extra 'k8s'")
    return list(yaml.safe_load_all((FOLDER / "triton.yaml").read_text()))


def entrypoint() -> str:
    (line,) = re.findall(r"^ENTRYPOINT (.*)$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    shell, option, script, name = json.loads(line)
    assert (shell, option, name) == ("/bin/sh", "-c", "triton")
    return str(script)


def test_every_manifest_fits_its_schema() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="it comes with the extra 'k8s'")
    for each in documents():
        validate.validate(each, DEPLOYED, strict=True)


def test_the_gpu_patch_leaves_a_deployment_that_fits_its_schema() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with the extra 'k8s'")
    validate = pytest.importorskip("kubernetes_validate", reason="it comes with the extra 'k8s'")
    patch = yaml.safe_load((FOLDER / "triton-gpu.yaml").read_text())["spec"]["template"]["spec"]
    deployment = documents()[0]
    pod = deployment["spec"]["template"]["spec"]
    (changes,) = patch.pop("containers")
    (container,) = pod["containers"]
    assert container["name"] == changes["name"]
    pod |= patch
    container |= changes
    validate.validate(deployment, DEPLOYED, strict=True)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_pod_is_closed_and_its_probes_ask_for_the_model() -> None:
    (pod,) = [each["spec"]["template"]["spec"] for each in documents() if each["kind"] == "Deployment"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/v2/models/ranker/ready"
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/models"]["readOnly"] is True
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    stop_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    (triton_s,) = re.findall(r"--exit-timeout-secs=(\d+)", entrypoint())
    assert pod["terminationGracePeriodSeconds"] > stop_s + int(triton_s)


def test_every_flag_is_one_that_triton_knows() -> None:
    wheel = distribution("nvidia-pytriton")
    server = str(wheel.locate_file("pytriton/tritonserver/bin/tritonserver"))
    libraries = str(wheel.locate_file("nvidia_pytriton.libs"))
    environment = {"LD_LIBRARY_PATH": libraries}
    told = subprocess.run([server, "--help"], env=environment, capture_output=True, text=True, check=False)
    known = set(re.findall(r"^\s+(--[a-z-]+)", told.stdout + told.stderr, re.MULTILINE))
    text = entrypoint() + (FOLDER / "triton.yaml").read_text()
    used = set(re.findall(r"(?<![\w-])(--[a-z-]+)=", text))
    assert "--grpc-restricted-protocol" in used
    assert used <= known, used - known


def test_the_image_has_what_a_bundle_imports(exported: Path) -> None:
    """The backend itself brings `triton_python_backend_utils`; torch is the release that compiles native code here."""
    found: set[str] = set()
    for path in exported.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.partition(".")[0] for name in names}
    found -= {*sys.stdlib_module_names, "triton_python_backend_utils"}
    installed = " ".join(re.findall(r"pip install [^\n]*", (FOLDER / "Dockerfile").read_text()))
    assert found == {"numpy", "pyarrow", "safetensors", "torch"}
    assert all(re.search(rf"\b{name}\b", installed) for name in found), installed
    (release,) = re.findall(r"ARG TORCH=(\S+)", (FOLDER / "Dockerfile").read_text())
    assert f"torch=={release}" in (FOLDER.parents[1] / "requirements" / "torch.txt").read_text().splitlines()


def test_every_instruction_of_the_dockerfile_is_one() -> None:
    """Joined lines begin with an instruction; a base image or a package of any version would change by itself."""
    text = re.sub(r"^\s*#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    assert {word for word, _ in lines} <= {"ARG", "FROM", "RUN", "USER", "ENV", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT"}
    assert [word for word, _ in lines[:2]] == ["ARG", "FROM"]
    assert [word for word, _ in lines].count("ENTRYPOINT") == 1
    declared = {rest.partition("=")[0] for word, rest in lines if word == "ARG"}
    used = {name for word, rest in lines if word in ("FROM", "RUN") for name in re.findall(r"\$\{(\w+)\}", rest)}
    assert used == declared, "a name that is not declared is empty"
    scripts = [rest for word, rest in lines if word == "RUN"] + [entrypoint()]
    for script in scripts:
        subprocess.run(["sh", "-n", "-c", script], check=True)


def test_the_image_runs_as_nobody_and_holds_no_key() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert text.rindex("USER 10001:10001") > text.rindex("RUN ")
    release = re.search(r"ARG TRITON=(\d+)\.(\d+)-py3", text)
    assert release is not None
    assert (int(release[1]), int(release[2])) >= (26, 5)
    assert entrypoint().startswith("exec tritonserver ")
    assert entrypoint().count("admin=${ADMIN_KEY:?}") == 2
