"""What is under `deploy/`, the Dockerfile and compose.yaml: they hold what they must, and their own tools take them.

No container engine is needed. Tools that are not here (promtool, systemd-analyze, docker compose, kubectl) are skipped
with the name of the package that has them.
"""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from bench.chaos.ground import free_ports
from docs import generate
from kamiyo.settings import Settings
from tests.conftest import DEADLINE, ROOT, Served

DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").iterdir())
RULE_TESTS = sorted((DEPLOY / "prometheus").glob("*.test.yml"))
PROBED = "/api/v1/webhooks/live"


def run(*words: str, folder: Path = ROOT, variables: Mapping[str, str] | None = None) -> str:
    """What a program prints; fails with it when its exit status is not 0."""
    done = subprocess.run(
        words,
        cwd=folder,
        text=True,
        timeout=4 * DEADLINE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/nonexistent", **(variables or {})},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def tool(name: str, package: str) -> str:
    """A program, or a skip that says how to get it."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"not checked, because {name} is not here: apt-get install {package}")
    return found


def setting_names() -> set[str]:
    return {str(field.validation_alias) for field in Settings.model_fields.values()}


# ── Prometheus and Grafana ──────────────────────────────────────────────────────────────────────────────────────


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "kamiyo.rules.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_promtool_takes_the_configuration_and_the_rules_pass_their_unit_tests() -> None:
    promtool = tool("promtool", "prometheus")
    folder = DEPLOY / "prometheus"
    run(promtool, "check", "config", "prometheus.yml", folder=folder)
    for path in RULE_TESTS:
        assert "SUCCESS" in run(promtool, "test", "rules", path.name, folder=folder)


def test_every_alert_has_a_unit_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    tests = [test for path in RULE_TESTS for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]]
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == alerts
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == alerts


def test_every_alert_says_how_urgent_it_is_and_what_to_do() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
            assert rule["annotations"].keys() == {"summary", "description"}, rule["alert"]


def test_rules_refer_to_headings_that_exist() -> None:
    operations = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for rule in rules():
        text = rule.get("annotations", {}).get("description", "")
        for heading in re.findall(r'docs/operations\.md, "([^"]+)"', text):
            assert re.search(rf'^#+ "?{re.escape(heading)}"?$', operations, re.MULTILINE), heading


def expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana" / "kamiyo.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [*asked, *(rule["expr"] for rule in rules())]


def test_rules_and_dashboard_name_only_metrics_that_exist_and_the_dashboard_shows_all_of_them() -> None:
    metrics = generate.metrics()
    known = {*metrics, *(f"{name}_{part}" for name in metrics for part in ("bucket", "count", "sum"))}
    named = {name for expr in expressions() for name in re.findall(r"\bwebhook_[a-z_]+\b", expr)}
    assert named <= known
    families = {re.sub(r"_(bucket|count|sum)$", "", name) if name not in metrics else name for name in named}
    assert families == metrics.keys()


def test_the_dashboard_explains_each_panel_and_no_two_overlap() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "kamiyo.json").read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert panel["title"] and panel["description"] and panel["targets"], panel["id"]
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells


# ── Image ───────────────────────────────────────────────────────────────────────────────────────────────────────


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(words[0], " ".join(words[1].split())) for line in lines if (words := line.split(maxsplit=1))]


def test_the_image_is_built_in_two_stages_and_runs_as_a_numbered_user_that_is_not_root() -> None:
    found = instructions()
    stages = [number for number, (name, _) in enumerate(found) if name == "FROM"]
    assert len(stages) == 2 and found[stages[0]][1].endswith(" AS build")
    last = found[stages[1] :]
    [user] = [value for name, value in last if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    # The last stage takes the finished environment alone: no compiler, no cache, no source.
    assert [value for name, value in last if name in ("COPY", "ADD")] == ["--from=build /opt/kamiyo /opt/kamiyo"]
    assert ("ENTRYPOINT", '["kamiyo"]') in last  # no shell between SIGTERM and the server
    assert any(name == "HEALTHCHECK" and PROBED in value for name, value in last)
    assert any("--require-hashes" in value for name, value in found if name == "RUN")


def test_the_image_is_healthy_where_its_server_listens_and_nowhere_else(server: Served) -> None:
    [check] = [value for name, value in instructions() if name == "HEALTHCHECK"]
    python, *words = json.loads(check.partition("CMD ")[2])
    assert python == "python" and str(Settings.model_fields["port"].default) in words[-1]

    def healthy(port: int | None) -> bool:
        words_here = [sys.executable, *words]
        return (
            subprocess.run(words_here, env={"PORT": str(port)}, capture_output=True, timeout=DEADLINE).returncode == 0
        )

    [nobodys] = free_ports(1)
    assert healthy(urlsplit(server.url).port) and not healthy(nobodys)


def copied() -> list[str]:
    """What the Dockerfile copies out of the project."""
    copies = [value for name, value in instructions() if name == "COPY" and not value.startswith("--from")]
    return [source for value in copies for source in value.split()[:-1]]


def test_nothing_but_what_is_copied_is_sent_to_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines and allowed == set(copied())


def test_the_files_that_are_copied_are_enough_to_build_and_the_package_carries_them_all(tmp_path: Path) -> None:
    context, made = tmp_path / "context", tmp_path / "made"
    for name in copied():
        source, target = ROOT / name, context / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "wheel", "-q")
    run(*pip, "--no-deps", "--no-build-isolation", "--no-index", "-w", str(made), ".", folder=context)
    [wheel] = made.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(context)) for name in ("kamiyo", "api", "database") for path in files(context / name)
    }
    assert len(wanted) > 50 and sorted(wanted - inside) == [], "add them to package-data in pyproject.toml"


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and ".egg-info" not in str(path)]


# ── Compose ─────────────────────────────────────────────────────────────────────────────────────────────────────

COMPOSE_SECRETS = {"POSTGRES_PASSWORD": "p", "STRIPE_WEBHOOK_SECRET": "whsec_x", "ADMIN_API_KEY": "k"}


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("name", ["server", "worker"])
def test_a_compose_service_is_not_root_writes_nothing_but_tmp_and_waits_for_the_database(name: str) -> None:
    service = compose()["services"][name]
    assert service["user"] == "10001:10001" and service["read_only"] is True
    assert [entry.split(":")[0] for entry in service["tmpfs"]] == ["/tmp"]  # noqa: S108 - the pod's own - the container's
    assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"]
    assert service["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert service["environment"].keys() <= setting_names()
    grace = int(service["stop_grace_period"].removesuffix("s"))
    assert grace >= Settings.model_fields["shutdown_grace"].default + 10


def test_compose_opens_ports_on_this_machine_only_and_holds_no_secret() -> None:
    for name, service in compose()["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|KEY|URL", variable):
                assert "${" in value, variable


def test_docker_compose_takes_the_file_and_asks_for_what_is_missing(tmp_path: Path) -> None:
    # A file of its own for variables: the reader's .env must not decide what is tested.
    nothing = tmp_path / "empty.env"
    nothing.touch()
    words = (*compose_program(), "--env-file", str(nothing), "-f", str(ROOT / "compose.yaml"), "config")
    shown = yaml.safe_load(run(*words, variables=COMPOSE_SECRETS))
    assert {"postgres", "server", "worker"} <= shown["services"].keys()
    with pytest.raises(AssertionError, match="ADMIN_API_KEY"):
        run(*words, variables={**COMPOSE_SECRETS, "ADMIN_API_KEY": ""})


def compose_program() -> tuple[str, ...]:
    docker = shutil.which("docker")
    plugin = docker and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0
    return (docker, "compose") if docker and plugin else (tool("docker-compose", "docker-compose"),)


# ── systemd ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze", "systemd")
    names = []
    for unit in UNITS:
        # systemd looks whether the program is there; here it is not, so another stands in for it.
        text = unit.read_text(encoding="utf-8").replace("/srv/kamiyo/.venv/bin/kamiyo", sys.executable)
        name = unit.name.replace("@.", "@9100.")
        (tmp_path / name).write_text(text, encoding="utf-8")
        names.append(f"./{name}")
    # It speaks of units that it leaves out a line of, even when its exit status is 0.
    said = run(analyze, "verify", *names, folder=tmp_path)
    assert not [line for line in said.splitlines() if "kamiyo" in line], said


@pytest.mark.parametrize("unit", [path for path in UNITS if path.suffix == ".service"], ids=lambda path: path.name)
def test_a_unit_is_not_root_and_writes_nothing_but_its_own_tmp(unit: Path) -> None:
    lines = set(unit.read_text(encoding="utf-8").splitlines())
    assert {"User=kamiyo", "ProtectSystem=strict", "PrivateTmp=true", "NoNewPrivileges=true"} <= lines
    assert {"CapabilityBoundingSet=", "UMask=0077"} <= lines
    [start] = [line for line in lines if line.startswith("ExecStart=")]
    words = re.sub("%i", "9100", start).split()[1:]
    command = generate.commands()[words[0]]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options
    if "Type=oneshot" not in lines:
        assert {"Restart=always", "TimeoutStopSec=30"} <= lines


# ── Kubernetes ──────────────────────────────────────────────────────────────────────────────────────────────────


def objects() -> list[dict[str, Any]]:
    folder = DEPLOY / "kubernetes"
    names = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    texts = [(folder / name).read_text(encoding="utf-8") for name in names]
    return [one for text in texts for one in yaml.safe_load_all(text)]


def kind(name: str) -> list[dict[str, Any]]:
    return [one for one in objects() if one["kind"] == name]


_CONTAINER = {"name", "image", "args", "env", "envFrom", "ports", "startupProbe", "readinessProbe", "livenessProbe"}
_CONTAINER |= {"lifecycle", "resources", "securityContext", "volumeMounts"}
_POD = {"serviceAccountName", "enableServiceLinks", "automountServiceAccountToken", "terminationGracePeriodSeconds"}
_POD |= {"securityContext", "topologySpreadConstraints", "containers", "volumes"}
_PROBE = {"httpGet", "periodSeconds", "timeoutSeconds", "failureThreshold"}


@pytest.mark.parametrize("deployment", kind("Deployment"), ids=lambda one: str(one["metadata"]["name"]))
def test_a_deployment_is_locked_up_probed_and_spelled_right(deployment: dict[str, Any]) -> None:
    assert deployment["apiVersion"] == "apps/v1" and deployment["spec"]["replicas"] >= 2
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    # The API server drops a key it does not know, and with it what the key was to protect.
    assert pod.keys() <= _POD and container.keys() <= _CONTAINER
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    ports = {port["name"] for port in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe].keys() <= _PROBE
        assert container[probe]["httpGet"]["port"] in ports
        assert container[probe]["httpGet"]["path"] in (PROBED, "/metrics")
    assert pod["terminationGracePeriodSeconds"] >= Settings.model_fields["shutdown_grace"].default + 10
    assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"tmp": "/tmp"} and [volume["name"] for volume in pod["volumes"]] == ["tmp"]  # noqa: S108 - the pod's own


def test_selectors_find_what_they_are_for_and_every_deployment_has_a_disruption_budget() -> None:
    pods = {one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"] for one in kind("Deployment")}
    for deployment in kind("Deployment"):
        selector = deployment["spec"]["selector"]["matchLabels"]
        assert [name for name, labels in pods.items() if selector.items() <= labels.items()] == [
            deployment["metadata"]["name"]
        ]
    budgets = {one["metadata"]["name"]: one["spec"] for one in kind("PodDisruptionBudget")}
    assert budgets.keys() == pods.keys()
    for name, budget in budgets.items():
        assert budget["selector"]["matchLabels"].items() <= pods[name].items()
        replicas = next(one["spec"]["replicas"] for one in kind("Deployment") if one["metadata"]["name"] == name)
        assert 1 <= budget["minAvailable"] < replicas  # or no node could ever be drained
    [service] = kind("Service")
    [ingress] = kind("Ingress")
    assert service["spec"]["selector"].items() <= pods["kamiyo-server"].items()
    [path] = ingress["spec"]["rules"][0]["http"]["paths"]
    assert (path["path"], path["pathType"]) == ("/api/v1/webhooks/stripe", "Exact")
    assert path["backend"]["service"]["name"] == service["metadata"]["name"]


def test_kubernetes_settings_exist_and_no_secret_is_written_down() -> None:
    [config] = kind("ConfigMap")
    named = {
        entry["name"]
        for one in kind("Deployment")
        for entry in one["spec"]["template"]["spec"]["containers"][0].get("env", ())
    }
    assert {*config["data"], *named} <= setting_names()
    assert not kind("Secret")


def test_kubectl_puts_the_manifest_together() -> None:
    shown = run(tool("kubectl", "kubectl"), "kustomize", str(DEPLOY / "kubernetes"))
    made = list(yaml.safe_load_all(shown))
    assert len(made) == len(objects())
    assert {one["metadata"].get("namespace") for one in made if one["kind"] != "Namespace"} == {"kamiyo"}
