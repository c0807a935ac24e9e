# SPDX-License-Identifier: Apache-2.0
"""docker/: the files are what their specifications say, and agree with each other and the code."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import compose_spec
import kubernetes_validate
import pytest
import yaml
from support.audio import DATA

from qwen3_asr_vllm.cli.doctor import SERVE_ENVIRONMENT

DOCKER = Path(__file__).parent.parent / "docker"
HELLO = DATA / "hello.flac"
NGINX = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="needs nginx")


def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    """By kind and name."""
    documents = yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text())
    return {(each["kind"], each["metadata"]["name"]): each for each in documents}


# ---- the files ----


def test_compose_matches_its_specification():
    merged = yaml.safe_dump(compose())  # compose resolves << itself; the parser does not
    assert set(compose_spec.PyCompose.from_yaml(merged).service_names()) == {
        "asr",
        "aligner",
        "nginx",
    }
    with pytest.raises(ValueError, match="restart"):
        compose_spec.PyCompose.from_yaml(merged.replace("unless-stopped", "sometimes"))


@pytest.mark.parametrize("key", manifests(), ids="-".join)
def test_manifests_match_their_schemas(key):
    kubernetes_validate.validate(
        manifests()[key], kubernetes_validate.latest_version(), strict=True
    )


def test_misspelt_manifest_fields_are_found():
    broken = manifests()["Deployment", "asr"]
    broken["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def test_manifests_refer_to_each_other():
    found = manifests()
    for deployment in ("asr", "aligner"):
        spec = found["Deployment", deployment]["spec"]
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == labels
        assert found["Service", deployment]["spec"]["selector"] == labels
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        drain = int(container["args"][container["args"].index("--shutdown-timeout") + 1])
        stop = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert stop + drain + 15 <= pod["terminationGracePeriodSeconds"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    for path in found["Ingress", "asr"]["spec"]["rules"][0]["http"]["paths"]:
        assert ("Service", path["backend"]["service"]["name"]) in found
    scaler = found["HorizontalPodAutoscaler", "asr"]["spec"]
    rule = yaml.safe_load(found["ConfigMap", "prometheus-adapter-rule"]["data"]["config.yaml"])
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == rule["rules"][0]["name"]["as"]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_images_use_the_limits_of_serve(name):
    text = (DOCKER / name).read_text().replace("\\\n", " ")
    given = re.search(r"^ENV (.*)$", text, re.M)
    assert given
    environment = dict(item.split("=", 1) for item in shlex.split(given[1]))
    assert environment == SERVE_ENVIRONMENT


def test_compose_mounts_the_tested_configuration():
    assert "./nginx.conf:/etc/nginx/nginx.conf:ro" in compose()["services"]["nginx"]["volumes"]
