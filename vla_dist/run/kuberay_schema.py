"""Which fields Kubernetes and KubeRay know: a typing error in a manifest may be dropped in silence.

Source: KubeRay's API types v1 (RayClusterSpec, HeadGroupSpec, WorkerGroupSpec, AutoscalerOptions,
GcsFaultToleranceOptions, RayServiceSpec), whose fields are listed here; pods and everything else are held against the
schemas of Kubernetes itself, which the package kubernetes-validate brings.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

_KUBERNETES = "1.31"
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 0}
_POD = {
    "type": "object",
    "required": ["spec"],
    "additionalProperties": False,
    "properties": {"metadata": {"type": "object"}, "spec": {"type": "object"}},
}
_CREDENTIAL = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"value": {"type": "string"}, "valueFrom": {"type": "object"}},
}
_GROUP = {
    "rayStartParams": _STRINGS,
    "template": _POD,
    "resources": _STRINGS,
    "labels": _STRINGS,
}
_CLUSTER = {
    "type": "object",
    "required": ["headGroupSpec"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"type": "string"},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "suspend": {"type": "boolean"},
        "managedBy": {"type": "string"},
        "headServiceAnnotations": _STRINGS,
        "authOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"mode": {"enum": ["disabled", "token"]}, "secretName": {"type": "string"}},
        },
        "autoscalerOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "version": {"enum": ["v1", "v2"]},
                "resources": {"type": "object"},
                "image": {"type": "string"},
                "imagePullPolicy": {"type": "string"},
                "env": {"type": "array"},
                "envFrom": {"type": "array"},
                "volumeMounts": {"type": "array"},
                "securityContext": {"type": "object"},
                "idleTimeoutSeconds": _COUNT,
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
            },
        },
        "gcsFaultToleranceOptions": {
            "type": "object",
            "required": ["redisAddress"],
            "additionalProperties": False,
            "properties": {
                "redisAddress": {"type": "string"},
                "redisUsername": _CREDENTIAL,
                "redisPassword": _CREDENTIAL,
                "externalStorageNamespace": {"type": "string"},
            },
        },
        "headGroupSpec": {
            "type": "object",
            "required": ["template"],
            "additionalProperties": False,
            "properties": {
                **_GROUP,
                "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
                "headService": {"type": "object"},
                "enableIngress": {"type": "boolean"},
            },
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["groupName", "template"],
                "additionalProperties": False,
                "properties": {
                    **_GROUP,
                    "groupName": {"type": "string"},
                    "replicas": _COUNT,
                    "minReplicas": _COUNT,
                    "maxReplicas": _COUNT,
                    "numOfHosts": {"type": "integer", "minimum": 1},
                    "idleTimeoutSeconds": _COUNT,
                    "suspend": {"type": "boolean"},
                    "scaleStrategy": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {"workersToDelete": {"type": "array", "items": {"type": "string"}}},
                    },
                },
            },
        },
    },
}
_SERVICE = {
    "type": "object",
    "required": ["rayClusterConfig", "serveConfigV2"],
    "additionalProperties": False,
    "properties": {
        "serveConfigV2": {"type": "string"},
        "rayClusterConfig": _CLUSTER,
        "serveService": {"type": "object"},
        "upgradeStrategy": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"type": {"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]}},
        },
        "excludeHeadPodFromServeSvc": {"type": "boolean"},
        "rayClusterDeletionDelaySeconds": _COUNT,
        "serviceUnhealthySecondThreshold": _COUNT,
        "deploymentUnhealthySecondThreshold": _COUNT,
    },
}
_SPECS = {"RayCluster": _CLUSTER, "RayService": _SERVICE}


def manifest_trouble(manifest: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each field that is missing, of another type, or unknown."""
    kind, name = manifest.get("kind", "?"), manifest.get("metadata", {}).get("name", "?")
    if kind not in _SPECS:
        yield from _kubernetes_trouble(manifest, f"{kind} {name!r}")
        return
    import jsonschema

    if manifest.get("apiVersion") != "ray.io/v1":
        yield f"{kind} {name!r}: apiVersion {manifest.get('apiVersion')!r}, expected 'ray.io/v1'"
    validator = jsonschema.Draft202012Validator(_SPECS[kind])
    for error in validator.iter_errors(manifest.get("spec", {})):
        where = ".".join(map(str, ["spec", *error.absolute_path]))
        yield f"{kind} {name!r}: {error.message} (at {where})"
    spec = manifest.get("spec", {})
    cluster = spec.get("rayClusterConfig", {}) if kind == "RayService" else spec
    groups = [("head", cluster.get("headGroupSpec", {}))]
    groups += [(one.get("groupName", "?"), one) for one in cluster.get("workerGroupSpecs", [])]
    for group, one in groups:
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "pod"},
            "spec": one.get("template", {}).get("spec", {}),
        }
        yield from _kubernetes_trouble(pod, f"{kind} {name!r}, pod of {group!r}")


def has_kubernetes_schemas() -> bool:
    return importlib.util.find_spec("kubernetes_validate") is not None


def _kubernetes_trouble(manifest: Mapping[str, Any], name: str) -> Iterator[str]:
    if not has_kubernetes_schemas():
        return
    import kubernetes_validate  # pyright: ignore[reportMissingImports]  an extra

    try:
        kubernetes_validate.validate(dict(manifest), _KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        where = ".".join(map(str, error.path))
        yield f"{name}: {error.message} (at {where or 'the top'})"
