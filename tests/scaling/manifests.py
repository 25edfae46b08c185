"""The Kubernetes examples without a cluster.

Kinds of Kubernetes itself are checked against its schemas, strictly; pods inside Dynamo's resource as the
pods they are. The schemas of other projects' kinds are in no package: of those only the shape is checked.
"""

from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
FILES = ["dynamo/kubernetes.yaml", "gateway-api/kubernetes.yaml", "vllm-router/kubernetes.yaml"]
VERSION = "1.34"


def validate() -> str:
    """Raises at the first fault."""
    core, others = 0, 0
    for file in FILES:
        for resource in yaml.safe_load_all((DEPLOY / file).read_text()):
            group = resource["apiVersion"].rpartition("/")[0]
            if check := FOREIGN.get((group, resource["kind"])):
                check(resource["spec"])
                others += 1
            else:
                kubernetes_validate.validate(resource, VERSION, strict=True)
                core += 1
    return f"manifests: {core} resources are valid for Kubernetes {VERSION}, {others} of other projects have the right shape"


def graph(spec: dict[str, Any]) -> None:
    """Dynamo's DynamoGraphDeployment, v1beta1."""
    assert set(spec) == {"components"}, spec
    for component in spec["components"]:
        assert set(component) == {"name", "type", "replicas", "podTemplate"}, component
        assert component["type"] in ("frontend", "worker"), component
        template = component["podTemplate"]
        names = [container["name"] for container in template["spec"]["containers"]]
        assert "main" in names, names
        labels = {"metadata": {"labels": {"app": "any"}}}
        deployment = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "any"},
            "spec": {"selector": {"matchLabels": {"app": "any"}}, "template": labels | template},
        }
        kubernetes_validate.validate(deployment, VERSION, strict=True)


def pool(spec: dict[str, Any]) -> None:
    """The Inference Extension's InferencePool, v1."""
    assert set(spec) == {"selector", "targetPorts", "endpointPickerRef"}, spec
    assert set(spec["selector"]) == {"matchLabels"}, spec
    assert all(set(port) == {"number"} for port in spec["targetPorts"]), spec
    picker = spec["endpointPickerRef"]
    assert set(picker) <= {"group", "kind", "name", "port", "failureMode"} and picker["name"], picker
    assert picker["failureMode"] in ("FailOpen", "FailClose") and picker["port"]["number"], picker


def route(spec: dict[str, Any]) -> None:
    """The Gateway API's HTTPRoute, v1."""
    assert set(spec) == {"parentRefs", "rules"}, spec
    for rule in spec["rules"]:
        assert set(rule) <= {"matches", "backendRefs", "timeouts", "filters"} and rule["backendRefs"], rule


FOREIGN = {
    ("nvidia.com", "DynamoGraphDeployment"): graph,
    ("inference.networking.k8s.io", "InferencePool"): pool,
    ("gateway.networking.k8s.io", "HTTPRoute"): route,
}
