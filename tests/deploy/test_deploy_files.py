"""What `deploy/` holds agrees with the program: options, paths, ports, limits. Files of another program's format are read by it where it is here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import typer
import yaml

from kvtiers.cli import serve_cmd
from kvtiers.config import CacheConfig, Machine, PathSpace, fit, parse_size
from kvtiers.config.presets import DISK_PATHS
from kvtiers.http.app import OPEN_PATHS, make_app
from kvtiers.http.server import read_token
from kvtiers.integrations.vllm.settings import read_settings
from kvtiers.integrations.vllm.versions import check_role
from kvtiers.model.errors import ConfigError
from kvtiers.runtime.cache import TieredCache
from kvtiers.testing.cache_oracle import SMALL_LAYOUT
from kvtiers.testing.chaos import namespace, small_config
from kvtiers.testing.operated import OperatedCache

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "systemd" / "kvtiers.service"
MANIFEST = ROOT / "deploy" / "kubernetes" / "kvtiers.yaml"
ENGINE = ROOT / "deploy" / "kubernetes" / "vllm.yaml"
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

MIB, GIB = 1 << 20, 1 << 30
OF_ITSELF = 512 * MIB
"""More than the service has beside its arena when it starts: 70 MiB were measured (RssAnon and RssFile, with HTTP, idle)."""


def serve_options(words: list[str], tmp_path: Path) -> dict[str, Any]:
    """What `kvtiers serve` makes of the words behind `kvtiers`. Fails for an option it doesn't have."""
    assert words[0] == "serve"
    (tmp_path / "config.yaml").write_text("storage: {}\n")
    given = [
        str(tmp_path / "config.yaml") if word == "/etc/kvtiers/kvtiers.yaml" else word for word in words[1:]
    ]
    params: dict[str, Any] = typer.main.get_command(serve_cmd.app).make_context("serve", given).params
    return params


# --- systemd ------------------------------------------------------------------------------------------------------------


def directives(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture
def unit() -> dict[str, list[str]]:
    return directives(UNIT.read_text())


def test_the_unit_starts_a_command_with_options_it_has(unit: dict[str, list[str]], tmp_path: Path) -> None:
    (line,) = unit["ExecStart"]
    program, *words = shlex.split(line)
    assert Path(program).name in PYPROJECT["project"]["scripts"]
    options = serve_options(words, tmp_path)
    (runtime,) = unit["RuntimeDirectory"]
    assert options["socket"] == Path("/run") / runtime / "node.sock"
    with pytest.raises(Exception, match="No such option"):
        serve_options([*words, "--no-such-option"], tmp_path)


def test_the_unit_keeps_what_the_service_insists_on(unit: dict[str, list[str]]) -> None:
    assert unit["RuntimeDirectoryMode"] == ["0700"], "others may not enter the socket's directory"
    assert unit["RuntimeDirectoryPreserve"] == ["yes"], "the lock file names the memory of the service before"
    assert unit["KillSignal"] == ["SIGTERM"]
    assert unit["LimitMEMLOCK"] == ["infinity"]
    assert unit["Restart"] == ["on-failure"]
    assert unit["User"] == ["kvtiers"]
    breaks_it = {"PrivateUsers", "ProcSubset", "PrivatePIDs", "PrivateNetwork", "MemoryMax"}
    assert not breaks_it & set(unit)
    assert unit["ProtectProc"] == ["invisible"]


def test_the_unit_gives_it_time_to_write_out_what_was_accepted(unit: dict[str, list[str]]) -> None:
    (seconds,) = unit["TimeoutStopSec"]
    assert int(seconds) > CacheConfig().async_.close_timeout_s + 10, "and some to tell its clients"


def test_the_units_cache_directory_is_where_presets_put_the_disk_tier(unit: dict[str, list[str]]) -> None:
    assert f"/var/cache/{unit['CacheDirectory'][0]}" == DISK_PATHS[0]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_takes_the_unit(tmp_path: Path, unit: dict[str, list[str]]) -> None:
    program = shlex.split(unit["ExecStart"][0])[0]
    here = tmp_path / UNIT.name
    here.write_text(UNIT.read_text().replace(program, str(Path(sys.executable).with_name("kvtiers"))))
    done = verified(here)
    assert (done.returncode, done.stderr.strip()) == (0, ""), "a warning is printed, and ends with 0"
    here.write_text(here.read_text().replace("ProtectHome=yes", "ProtctHome=yes"))
    assert "ProtctHome" in verified(here).stderr, "it does look at the names"


def verified(file: Path) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


# --- Kubernetes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest() -> Mapping[str, Any]:
    """Its documents by kind."""
    documents = list(yaml.safe_load_all(MANIFEST.read_text()))
    assert all(isinstance(one, dict) and one["apiVersion"] and one["metadata"]["name"] for one in documents)
    by_kind = {one["kind"]: one for one in documents}
    assert len(by_kind) == len(documents)
    return by_kind


@pytest.fixture(scope="module")
def pod(manifest: Mapping[str, Any]) -> dict[str, Any]:
    template: dict[str, Any] = manifest["DaemonSet"]["spec"]["template"]
    return template


@pytest.fixture(scope="module")
def config(manifest: Mapping[str, Any]) -> CacheConfig:
    return CacheConfig.from_text(manifest["ConfigMap"]["data"]["kvtiers.yaml"], environ={})


def container(pod: Mapping[str, Any]) -> dict[str, Any]:
    (one,) = pod["spec"]["containers"]
    return cast("dict[str, Any]", one)


def mounts(one: Mapping[str, Any]) -> dict[str, str]:
    return {mount["mountPath"]: mount["name"] for mount in one["volumeMounts"]}


def test_the_manifests_parts_belong_together(manifest: Mapping[str, Any], pod: Mapping[str, Any]) -> None:
    assert set(manifest) == {"Namespace", "ConfigMap", "Secret", "DaemonSet"}
    namespace = manifest["Namespace"]["metadata"]["name"]
    assert {one["metadata"].get("namespace") for kind, one in manifest.items() if kind != "Namespace"} == {
        namespace
    }
    assert manifest["DaemonSet"]["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert volumes["config"]["configMap"]["name"] == manifest["ConfigMap"]["metadata"]["name"]
    assert volumes["secret"]["secret"]["secretName"] == manifest["Secret"]["metadata"]["name"]
    used = {name for one in all_containers(pod) for name in mounts(one).values()}
    assert used == set(volumes)
    assert len({one["image"] for one in all_containers(pod)}) == 1


def all_containers(pod: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield from pod["spec"]["initContainers"]
    yield from pod["spec"]["containers"]


def test_the_manifest_runs_serve_with_options_it_has(pod: Mapping[str, Any], tmp_path: Path) -> None:
    one = container(pod)
    options = serve_options(one["args"], tmp_path)
    assert mounts(one)[str(options["socket"].parent)] == "run"
    assert mounts(one)["/etc/kvtiers"] == "config"


def test_probes_ask_for_paths_that_exist_and_want_no_token(
    pod: Mapping[str, Any], config: CacheConfig, tmp_path: Path
) -> None:
    one = container(pod)
    with TieredCache(small_config(tmp_path / "cache"), SMALL_LAYOUT, namespace()) as cache:
        served = set(make_app(OperatedCache(cache)).openapi()["paths"])
    probes = {kind: one[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert {probe["path"] for probe in probes.values()} <= served & OPEN_PATHS
    assert (probes["readiness"]["path"], probes["liveness"]["path"]) == ("/readyz", "/healthz")
    (port,) = one["ports"]
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    annotations = pod["metadata"]["annotations"]
    assert (
        port["containerPort"] == config.observability.metrics_port == int(annotations["prometheus.io/port"])
    )
    assert annotations["prometheus.io/path"] in served


def test_the_service_listens_for_the_kubelet_with_a_token_of_its_own(
    pod: Mapping[str, Any], config: CacheConfig
) -> None:
    assert config.observability.http_host == "0.0.0.0"
    assert config.observability.token_file
    token = Path(config.observability.token_file)
    assert mounts(container(pod))[str(token.parent)] == "token"
    (owner,) = pod["spec"]["initContainers"]
    script = owner["command"][-1]
    uid = container(pod)["securityContext"]["runAsUser"]
    assert f"install -m 0400 -o {uid} -g {uid} /run/secret/token {token}\n" in script
    for path in ("/run/kvtiers", *config.storage.disk.path):
        assert re.search(rf"^install -d -m 0700 -o {uid} -g {uid} .*{path}\b", script, re.MULTILINE)
        assert mounts(owner)[path] == mounts(container(pod))[path]


def test_the_init_container_makes_what_the_service_accepts(pod: Mapping[str, Any], tmp_path: Path) -> None:
    """Its script, run here as this user in another root."""
    uid = container(pod)["securityContext"]["runAsUser"]
    script: str = pod["spec"]["initContainers"][0]["command"][-1]
    script = script.replace(f"-o {uid} -g {uid}", f"-o {os.getuid()} -g {os.getgid()}").replace(
        " /", f" {tmp_path}/"
    )
    for folder in ("run/kvtiers", "run/secret", "run/kvtiers-token", "var/cache"):
        (tmp_path / folder).mkdir(parents=True, mode=0o755)
    (tmp_path / "run/secret/token").write_text("c0ffee\n")
    for _ in range(2):  # a pod that is made again finds what the one before left
        subprocess.run(["sh", "-ec", script], check=True, timeout=30)
    assert read_token(tmp_path / "run/kvtiers-token/token") == "c0ffee"
    assert (tmp_path / "run/kvtiers").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "var/cache/lmcache").stat().st_mode & 0o777 == 0o700


def test_the_placeholder_is_no_token(manifest: Mapping[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.touch(mode=0o600)
    file.write_text(manifest["Secret"]["stringData"]["token"])
    with pytest.raises(ConfigError, match="one line with a token without spaces"):
        read_token(file)


def test_the_memory_limit_covers_the_arena(pod: Mapping[str, Any], config: CacheConfig) -> None:
    resources = container(pod)["resources"]
    limit = parse_size(resources["limits"]["memory"])
    assert parse_size(resources["requests"]["memory"]) == limit, (
        "an arena is taken as a whole, so it is asked for as a whole"
    )
    disk = PathSpace(Path("/var/cache/lmcache"), device=1, total=GIB << 10, free=GIB << 10)
    machine = Machine(memory_total=64 * GIB, memory_available=limit - OF_ITSELF, paths=(disk,))
    assert fit(config, machine).cpu_bytes < limit - OF_ITSELF - config.storage.disk.max_queue_bytes


def test_engines_can_be_seen_and_are_served(pod: Mapping[str, Any]) -> None:
    spec = pod["spec"]
    assert spec["hostPID"] is True, "a client's pid is 0 in a namespace that does not contain it"
    assert spec.get("hostUsers", True), "uids are compared"
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["run"]["hostPath"]["path"] == "/run/kvtiers"
    security = container(pod)["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["readOnlyRootFilesystem"] is True
    assert security["capabilities"] == {"drop": ["ALL"]}


def test_the_pod_has_time_to_write_out_what_was_accepted(pod: Mapping[str, Any], config: CacheConfig) -> None:
    assert pod["spec"]["terminationGracePeriodSeconds"] > config.async_.close_timeout_s + 10


def test_the_engines_fragment_in_the_documentation_fits_the_manifest(pod: Mapping[str, Any]) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    engine = yaml.safe_load(text)["spec"]
    (one,), (volume,) = engine["containers"], engine["volumes"]
    service = container(pod)["securityContext"]
    assert one["securityContext"] == {key: service[key] for key in ("runAsUser", "runAsGroup")}
    assert volume["hostPath"]["path"] == "/run/kvtiers" == one["volumeMounts"][0]["mountPath"]


# --- an engine's manifest -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> dict[str, Any]:
    """The Deployment of vLLM."""
    deployment, service = yaml.safe_load_all(ENGINE.read_text())
    template: dict[str, Any] = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert deployment["metadata"]["namespace"] == service["metadata"]["namespace"]
    ports = {port["name"] for port in container(template)["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    return template


def test_the_engine_finds_the_services_socket(
    engine: Mapping[str, Any], pod: Mapping[str, Any], tmp_path: Path
) -> None:
    (told,) = [arg for arg in container(engine)["args"] if arg.startswith("--kv-transfer-config=")]
    transfer = json.loads(told.partition("=")[2])
    settings = read_settings(transfer["kv_connector_extra_config"])
    serve = serve_options(container(pod)["args"], tmp_path)
    assert settings.socket == Path(serve["socket"])
    check_role(transfer["kv_role"])
    assert transfer["kv_load_failure_policy"] == "recompute"
    assert transfer["kv_connector_module_path"] == "kvtiers.integrations.vllm"
    names = mounts(container(engine))
    volumes = {volume["name"]: volume for volume in engine["spec"]["volumes"]}
    assert set(names.values()) == set(volumes)
    theirs = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert volumes[names["/run/kvtiers"]]["hostPath"] == theirs["run"]["hostPath"]


def test_the_engine_is_one_that_the_service_accepts(
    engine: Mapping[str, Any], pod: Mapping[str, Any], manifest: Mapping[str, Any]
) -> None:
    ours, theirs = container(engine)["securityContext"], container(pod)["securityContext"]
    for key in ("runAsUser", "runAsGroup", "capabilities"):
        assert ours[key] == theirs[key]
    assert engine["spec"].get("hostUsers", True)
    assert (
        manifest["Namespace"]["metadata"]["name"]
        == next(yaml.safe_load_all(ENGINE.read_text()))["metadata"]["namespace"]
    )


def test_the_engine_listens_elsewhere_than_the_service(
    engine: Mapping[str, Any], config: CacheConfig
) -> None:
    one = container(engine)
    (port,) = [int(arg.partition("=")[2]) for arg in one["args"] if arg.startswith("--port=")]
    assert [each["containerPort"] for each in one["ports"]] == [port]
    assert port != config.observability.metrics_port


def test_the_guide_shows_the_engines_manifest_as_it_is() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "vllm.md").read_text(), re.DOTALL)
    assert ENGINE.read_text() in blocks


# --- Docker -------------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: name and the rest, continued lines joined, comments gone."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def test_the_image_runs_a_command_with_options_it_has(tmp_path: Path) -> None:
    last = dict(instructions())  # the last of each name is what the image has
    (program,) = yaml.safe_load(last["ENTRYPOINT"])
    assert program in PYPROJECT["project"]["scripts"]
    serve_options(yaml.safe_load(last["CMD"]), tmp_path)
    assert last["EXPOSE"] == str(CacheConfig().observability.metrics_port)


def test_the_image_is_not_root_and_is_of_the_user_the_manifest_runs_as(pod: Mapping[str, Any]) -> None:
    security = container(pod)["securityContext"]
    names = [name for name, _ in instructions()]
    assert dict(instructions())["USER"] == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert names.index("USER") > len(names) - 1 - names[::-1].index("RUN"), "nothing is made after it as root"


def test_the_image_installs_an_extra_there_is_from_files_there_are() -> None:
    text = DOCKERFILE.read_text()
    extras = set(re.findall(r"'\.\[([\w,]+)\]'", text))
    assert extras == {"serve"}
    serve = PYPROJECT["project"]["optional-dependencies"]["serve"]
    needed = {re.split(r"[><=;\[ ]", one)[0] for one in serve}
    assert needed == {"fastapi", "httpx", "uvicorn"}
    copied = [
        word
        for name, rest in instructions()
        if name == "COPY" and not rest.startswith("--from")
        for word in rest.split()[:-1]
    ]
    assert {"pyproject.toml", "src"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    allowed = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().split()
    assert {f"!{name}" for name in copied} <= set(allowed)
    project = PYPROJECT["project"]
    assert {project["readme"], *project["license-files"]} <= set(copied), (
        "the package is not built without them"
    )


def test_the_image_says_whether_it_was_built() -> None:
    assert 'kvtiers.dockerfile="not built' in dict(instructions())["LABEL"]
