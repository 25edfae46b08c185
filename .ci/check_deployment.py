"""Second half of .ci/deployment: whether what the tools rendered is what clusters and the server accept.

Argument: the folder with compose.json, rendered.yaml and crates.cdx.json. LOCKET names the binary.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import kubernetes_validate
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

KUBERNETES = "1.34"
# Kinds of operators, whose schemas no package has: the fields that they must have.
CUSTOM = {
    ("keda.sh/v1alpha1", "ScaledObject"): ["scaleTargetRef", "triggers", "minReplicaCount", "maxReplicaCount"],
    ("monitoring.coreos.com/v1", "PodMonitor"): ["selector", "podMetricsEndpoints"],
}
ROOT = pathlib.Path(__file__).resolve().parent.parent


def check_settings(where, environment, config=""):
    """The server must take these LOCKET_ variables, and this file, as they are."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "locket.toml")
        file.write_text(config)
        settings = {name: value for name, value in environment.items() if name.startswith("LOCKET_")}
        # Names of files and devices that are not here.
        settings.pop("LOCKET_API_KEY_FILE", None)
        if settings.get("LOCKET_BACKEND") == "cuda":
            settings.pop("LOCKET_BACKEND")
        settings["LOCKET_CONFIG"] = str(file)
        command = [os.environ["LOCKET"], "config"]
        result = subprocess.run(command, env=settings, capture_output=True, text=True, cwd=folder, timeout=60)
    if result.returncode:
        sys.exit(f"{where}: the server refuses its settings: {result.stderr}")


def check_compose(folder):
    """Mounted files are there, services are bounded and locked down, monitoring waits for nothing unhealthy."""
    services = json.loads((folder / "compose.json").read_text())["services"]
    assert set(services) == {"locket", "locket-cuda", "prometheus", "grafana"}, set(services)
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], f"{name} is not locked down"
        assert service["restart"] == "unless-stopped", name
        assert int(service["deploy"]["resources"]["limits"]["memory"]) > 0, f"{name} has no memory limit"
        for port in service["ports"]:
            assert port["host_ip"] == "127.0.0.1", f"{name} listens beyond this machine"
        for mount in service["volumes"]:
            if mount["type"] == "bind":
                assert pathlib.Path(mount["source"]).exists(), f"{name} mounts {mount['source']}, which is not there"
        if name.startswith("locket"):
            check_settings(name, service["environment"])
    assert services["grafana"]["depends_on"]["prometheus"]["condition"] == "service_healthy"
    mounted = {mount["target"] for mount in services["grafana"]["volumes"]}
    for file in (ROOT / "deploy/grafana/provisioning").rglob("*.yaml"):
        for provider in yaml.safe_load(file.read_text()).get("providers", []):
            path = provider["options"]["path"]
            assert any(path.startswith(target) for target in mounted), f"{file}: nothing is mounted at {path}"


def check_chart(folder):
    """Every manifest fits its schema; every server takes its settings; pods have no rights."""
    seen = []
    documents = [one for one in yaml.safe_load_all((folder / "rendered.yaml").read_text()) if one]
    configs = [one["data"]["locket.toml"] for one in documents if one["kind"] == "ConfigMap"]
    for document in documents:
        kind = (document["apiVersion"], document["kind"])
        seen.append(document["kind"])
        if kind in CUSTOM:
            missing = [field for field in CUSTOM[kind] if field not in document["spec"]]
            assert not missing, f"{kind} lacks {missing}"
            continue
        try:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            sys.exit(f"{document['kind']}: {'.'.join(map(str, error.path))}: {error.message}")
        if document["kind"] == "Deployment":
            pod = document["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            assert pod["securityContext"]["runAsNonRoot"]
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container)
            environment = {entry["name"]: entry.get("value", "") for entry in container["env"]}
            drain = int(environment["LOCKET_DRAIN_TIMEOUT_S"])
            assert pod["terminationGracePeriodSeconds"] > drain, "pods are killed while they drain"
            check_settings("the chart", environment, configs.pop(0))
    expected = {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler", "ScaledObject",
                "PodMonitor", "NetworkPolicy", "Secret", "ConfigMap", "ServiceAccount", "Ingress"}
    assert expected == set(seen), expected ^ set(seen)
    return len(seen)


def check_bill(folder):
    """The bill of materials is CycloneDX."""
    text = (folder / "crates.cdx.json").read_text()
    error = JsonStrictValidator(SchemaVersion.V1_5).validate_str(text)
    if error is not None:
        sys.exit(f"the bill of materials: {error}")
    return len(json.loads(text)["components"])


def main():
    """All of it."""
    folder = pathlib.Path(sys.argv[1])
    check_compose(folder)
    manifests = check_chart(folder)
    crates = check_bill(folder)
    print(f"compose: 4 services; chart: {manifests} manifests; bill of materials: {crates} crates")


if __name__ == "__main__":
    main()
